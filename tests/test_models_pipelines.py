"""Pipelines: everything must be what diffusers itself would have done, whatever the batch."""

import numpy as np
import pytest
import torch
from tiny import tiny_flux, tiny_sdxl

from ecodiff.models import pipelines
from ecodiff.runtime.errors import UserError

SDXL = {"num_inference_steps": 2, "guidance_scale": 4.0, "height": 64, "width": 64}
FLUX = {**SDXL, "max_sequence_length": 16}
PROMPTS = ["a red circle", "a blue square", "a green triangle"]


@pytest.fixture(params=[(tiny_sdxl, SDXL), (tiny_flux, FLUX)], ids=["sdxl", "flux"])
def family(request):
    build, call = request.param
    return build(), call


def given(pipe, call, seeds=(5, 6, 7)):
    return pipelines.encode(pipe, PROMPTS, call), pipelines.starting_noise(pipe, list(seeds), call)


def test_the_final_latent_is_that_of_the_plain_call(family):
    pipe, call = family
    embeds, noise = given(pipe, call)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)]
    plain = pipe(PROMPTS, generator=generators, output_type="latent", **call).images
    torch.testing.assert_close(pipelines.denoise(pipe, embeds, noise, call), plain)


def test_decoding_is_that_of_the_plain_call(family):
    pipe, call = family
    embeds, noise = given(pipe, call)
    pictures = pipe(**embeds, latents=noise, output_type="pil", **call).images
    z0 = pipelines.denoise(pipe, embeds, noise, call)
    decoded = pipelines.decode(pipe, z0, call)
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, np.stack([np.asarray(p) for p in pictures]))


def test_decoding_undoes_the_statistics_of_the_latents():
    pipe = tiny_sdxl()
    mean, deviation = [0.1, -0.2, 0.3, 0.0], [1.5, 0.5, 2.0, 1.0]
    pipe.vae.register_to_config(latents_mean=mean, latents_std=deviation)
    embeds, noise = given(pipe, SDXL)
    picture = pipe(**embeds, latents=noise, output_type="pil", **SDXL).images[0]
    decoded = pipelines.decode(pipe, pipelines.denoise(pipe, embeds, noise, SDXL), SDXL)
    np.testing.assert_array_equal(decoded[0], np.asarray(picture))


def test_noise_depends_on_the_seed_alone(family):
    pipe, call = family
    together = pipelines.starting_noise(pipe, [3, 4], call)
    torch.testing.assert_close(
        together[1:], pipelines.starting_noise(pipe, [4], call), rtol=0, atol=0
    )
    assert not torch.equal(together[0], together[1])


def test_guidance_at_or_below_one_needs_no_negatives():
    pipe, call = tiny_sdxl(), {**SDXL, "guidance_scale": 1.0}
    assert set(pipelines.encode(pipe, PROMPTS, call)) == {"prompt_embeds", "pooled_prompt_embeds"}


def test_prompts_are_encoded_independently_of_their_batch(family):
    pipe, call = family
    alone, together = (pipelines.encode(pipe, prompts, call) for prompts in (PROMPTS[1:2], PROMPTS))
    for key, value in together.items():
        assert len(value) == len(PROMPTS)
        torch.testing.assert_close(alone[key], value[1:2])


def test_the_bar_setting_survives():
    pipe = tiny_flux()
    pipe.set_progress_bar_config(leave=False)
    with pipelines.quiet(pipe):
        assert pipe._progress_bar_config["disable"]
    assert pipe._progress_bar_config == {"leave": False}


def test_pictures_that_are_not_finite_are_told_by_their_rows():
    pipe = tiny_sdxl()
    z0 = pipelines.starting_noise(pipe, [1, 2, 3], SDXL)
    z0[1] = torch.nan
    with pytest.raises(FloatingPointError) as caught:
        pipelines.decode(pipe, z0, SDXL)
    assert caught.value.args == ([1],)


def test_an_unsupported_pipeline_is_named():
    class OtherPipeline:
        pass

    with pytest.raises(UserError, match="OtherPipeline"):
        pipelines.encode(OtherPipeline(), PROMPTS, SDXL)
