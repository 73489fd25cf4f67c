"""The record of the dense model: exact, batch-free, and never of another model."""

from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny import CALLS, tiny

from ecodiff.calibrate import Calibration, calibrate
from ecodiff.models.structures import denoiser_of
from ecodiff.runtime.errors import UserError

PROMPTS = ["a red circle", "a blue square", "a green triangle"]
SEEDS = [11, 12, 13]


@pytest.fixture(params=["sdxl", "flux"])
def recorded(request):
    pipe = tiny(request.param)
    return pipe, calibrate(pipe, PROMPTS, SEEDS, CALLS[request.param], batch_size=2)


def test_z0_is_that_of_the_plain_call_with_each_prompts_seed(recorded):
    pipe, calibration = recorded
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    plain = pipe(PROMPTS, generator=generators, output_type="latent", **calibration.call).images
    torch.testing.assert_close(calibration.z0, plain, rtol=1e-4, atol=1e-3)


def test_a_batch_holds_the_rows_asked_for_in_order(recorded):
    _, calibration = recorded
    embeds, noise, z0 = calibration.batch([2, 0])
    torch.testing.assert_close(z0, calibration.z0[[2, 0]])
    torch.testing.assert_close(noise, calibration.noise[[2, 0]])
    for key, value in calibration.embeds.items():
        torch.testing.assert_close(embeds[key], value[[2, 0]])


def test_the_first_prompts_alone(recorded):
    _, calibration = recorded
    first = calibration.first(2)
    assert (first.prompts, first.seeds) == (PROMPTS[:2], SEEDS[:2])
    torch.testing.assert_close(first.z0, calibration.z0[:2])
    assert calibration.first(None) is calibration
    assert calibration.first(9) is calibration


def test_a_saved_calibration_comes_back_whole(recorded, tmp_path):
    _, calibration = recorded
    calibration.save(tmp_path / "calibration.safetensors")
    loaded = Calibration.load(tmp_path / "calibration.safetensors")
    assert (loaded.prompts, loaded.seeds, loaded.call) == (PROMPTS, SEEDS, calibration.call)
    assert loaded.fingerprint == calibration.fingerprint
    assert loaded.embeds.keys() == calibration.embeds.keys()
    torch.testing.assert_close(loaded.z0, calibration.z0, rtol=0, atol=0)
    torch.testing.assert_close(loaded.noise, calibration.noise, rtol=0, atol=0)


def test_a_stale_calibration_is_refused(recorded):
    """Fault 10: a cache keyed by its path alone."""
    pipe, calibration = recorded
    calibration.check(pipe)
    with torch.no_grad():
        denoiser_of(pipe).get_submodule("conv_out" if hasattr(pipe, "unet") else "proj_out").bias[
            0
        ] += 1
    with pytest.raises(UserError, match="another model"):
        calibration.check(pipe)


def test_equal_seeds_are_refused():
    """Fault 8: the same starting noise for every prompt."""
    with pytest.raises(UserError, match="seeds must differ"):
        calibrate(tiny("flux"), PROMPTS, [1, 2, 1], CALLS["flux"], batch_size=2)


def test_seeds_must_match_prompts_in_number():
    with pytest.raises(UserError, match="3 prompts"):
        calibrate(tiny("flux"), PROMPTS, [1, 2], CALLS["flux"], batch_size=2)


def test_latents_that_are_not_finite_name_their_seeds():
    pipe = tiny("flux")
    with torch.no_grad():
        pipe.transformer.proj_out.bias.fill_(torch.nan)
    with pytest.raises(UserError, match=r"\[11, 12, 13\]"):
        calibrate(pipe, PROMPTS, SEEDS, CALLS["flux"], batch_size=2)


@pytest.mark.parametrize("content", [None, b"", b"not safetensors"])
def test_a_broken_file_is_named(tmp_path, content):
    path = tmp_path / "calibration.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"calibration\.safetensors"):
        Calibration.load(path)


def test_what_is_of_another_model_is_named_with_it(recorded, tmp_path):
    pipe, calibration = recorded
    family = "sdxl" if hasattr(pipe, "unet") else "flux"
    tiny(family, seed=1).save_pretrained(tmp_path / "other")
    other = DiffusionPipeline.from_pretrained(tmp_path / "other")
    calibration.save(tmp_path / "record")
    with pytest.raises(UserError, match=r"record: .* another model than .*other"):
        Calibration.load(tmp_path / "record").check(other)


def test_a_record_with_latents_that_are_not_finite_is_refused(recorded, tmp_path):
    _, calibration = recorded
    z0 = calibration.z0.clone()
    z0[1].view(-1)[0] = torch.inf
    replace(calibration, z0=z0).save(tmp_path / "record")
    with pytest.raises(UserError, match=r"record: latents of seeds \[12\] are not finite"):
        Calibration.load(tmp_path / "record")


def test_a_record_of_an_older_version_is_refused(recorded):
    pipe, calibration = recorded
    with pytest.raises(UserError, match="calibration: was made by an older ecodiff"):
        replace(calibration, fingerprint="0123456789abcdef").check(pipe)


@pytest.mark.parametrize(
    ("dtype", "advice"),
    [(torch.float32, "it is float32 already"), (torch.bfloat16, "try dtype float32")],
)
def test_float32_is_no_advice_where_it_is_float32(dtype, advice):
    pipe = tiny("flux").to(dtype)
    pipe.transformer.proj_out.register_forward_hook(lambda _, args, out: out * torch.inf)
    with pytest.raises(UserError, match=advice):
        calibrate(pipe, PROMPTS, SEEDS, CALLS["flux"], batch_size=3)
