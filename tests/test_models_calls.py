"""What a call may ask is known before anything is computed."""

from __future__ import annotations

import logging

import pytest
import torch
from tiny import CALLS, tiny

from ecodiff.calibrate import calibrate
from ecodiff.config.reading import read_settings
from ecodiff.config.sections import CallSettings
from ecodiff.models import calls, pipelines
from ecodiff.models.structures import denoiser_of
from ecodiff.runtime.errors import UserError

GUIDED = {
    family: {**call, "true_cfg_scale": 3.0} if family in ("flux", "kontext") else call
    for family, call in CALLS.items()
    if family != "lcm"
}


def refuses(family, message, **changes):
    pipe = tiny(family)
    denoiser_of(pipe).forward = lambda *_, **__: pytest.fail("was run")
    with pytest.raises(UserError, match=message) as caught:
        pipelines.encode(pipe, ["a red ring"], {**CALLS[family], **changes})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "length"),
    [
        *(("flux", n) for n in (600, 100000)),
        *(("sd3", n) for n in (600, 100000)),
        *((family, 100000) for family in ("qwen", "z-image", "sana", "pixart", "wan")),
    ],
)
def test_more_tokens_than_the_pipeline_takes_are_refused(family, length):
    refuses(family, f"call: .*max_sequence_length.*{length}", max_sequence_length=length)


@pytest.mark.parametrize("family", CALLS)
@pytest.mark.parametrize("side", ["height", "width"])
def test_sides_that_do_not_divide_are_refused(family, side):
    refuses(family, rf"call: .*{side}", **{side: 33})


@pytest.mark.parametrize("steps", [0, -1, 2.5, "4"])
def test_steps_are_a_whole_number(steps):
    refuses("sdxl", f"call: num_inference_steps is {steps}, must be", num_inference_steps=steps)


def test_an_unknown_key_is_refused_before_encoding():
    refuses("sdxl", "call: guidance is not a setting of StableDiffusionXL", guidance=3)


@pytest.mark.parametrize("key", ["guidance_scale", "true_cfg_scale"])
@pytest.mark.parametrize("value", [".inf", ".nan"])
def test_a_config_takes_no_infinite_scale(key, value):
    text = f"{{num_inference_steps: 1, height: 64, width: 64, {key}: {value}}}"
    with pytest.raises(UserError, match=f"^{key}: should be a finite number"):
        read_settings(CallSettings, text)


def test_what_the_pipeline_finds_wrong_later_is_one_line_too():
    pipe, call = tiny("sdxl"), {**CALLS["sdxl"], "denoising_end": 0.5, "guidance_rescale": 0.0}
    embeds, noise = pipelines.encode(pipe, ["a"], call), pipelines.starting_noise(pipe, [1], call)

    def fail(*_, **__):
        raise ValueError("the schedule is too short\nand more")

    pipe.scheduler.set_timesteps = fail
    with pytest.raises(UserError, match=r"^call: the schedule is too short$"):
        pipelines.denoise(pipe, embeds, noise, call)


@pytest.mark.parametrize("family", GUIDED)
def test_a_negative_prompt_is_that_of_the_plain_call(family):
    pipe, call = tiny(family), {**GUIDED[family], "negative_prompt": "blurry"}
    prompts = ["a red ring", "a large blue square"]
    embeds = pipelines.encode(pipe, prompts, call)
    without = pipelines.encode(pipe, prompts, GUIDED[family])
    assert not all(torch.equal(embeds[key], without[key]) for key in embeds)
    noise = pipelines.starting_noise(pipe, [1, 2], call)
    given = {**call, "negative_prompt": ["blurry"] * 2, "output_type": "latent"}
    if family in ("pixart", "sana"):
        given["use_resolution_binning"] = False
    if family == "kontext":  # which would change the sides to have an area of its own
        given["max_area"] = call["height"] * call["width"]
    plain = pipe(prompt=list(prompts), latents=noise, return_dict=False, **given)[0]
    torch.testing.assert_close(
        pipelines.denoise(pipe, embeds, noise, call), plain, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("family", "changes"), [("sdxl", {"guidance_scale": 1.0}), ("flux", {}), ("lcm", {})]
)
def test_a_negative_prompt_without_a_negative_branch_is_refused(family, changes):
    refuses(family, "call: negative_prompt needs .* guidance", negative_prompt="blurry", **changes)


def test_a_negative_prompt_is_recorded_and_used_again():
    pipe, call = tiny("sdxl"), {**CALLS["sdxl"], "negative_prompt": "blurry"}
    record = calibrate(pipe, ["a red ring"], [1], call, 1)
    torch.testing.assert_close(record.drawn_by(pipe, 1), record.z0)


@pytest.mark.parametrize("family", ["sdxl", "flux", "sd3", "qwen", "sana"])
def test_prompts_that_are_cut_are_counted_in_one_line(family, caplog):
    pipe, long = tiny(family), "a small red ring on navy and " * 40
    caplog.set_level(logging.INFO)
    calibrate(pipe, ["a red ring", long, long + "blue"], [1, 2, 3], CALLS[family], 1)
    lines = [one.getMessage() for one in caplog.records if "prompts" in one.getMessage()]
    (line,) = [line for line in lines if "are longer than what is read" in line]
    assert line.startswith("2 of 3 prompts")
    caplog.clear()
    calls.log_cut_prompts(pipe, ["a red ring"], CALLS[family])
    assert not caplog.records


def test_weights_that_are_not_numbers_are_named():
    pipe = tiny("flux")
    with torch.no_grad():
        pipe.transformer.proj_out.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"weights are not, such as transformer: proj_out.weight"):
        calibrate(pipe, ["a red ring"], [1], CALLS["flux"], 1)


@pytest.mark.parametrize(("dtype", "advice"), [("float32", "it is"), ("bfloat16", "try dtype")])
def test_float32_is_advised_where_it_is_not_yet(dtype, advice):
    pipe = tiny("flux").to(getattr(torch, dtype))
    assert calls.why_not_finite(pipe).startswith(advice)


def test_encoders_of_another_dtype_are_named():
    pipe, call = tiny("sdxl"), CALLS["sdxl"]
    pipe.text_encoder.half()
    pipe.text_encoder_2.half()
    wanted = r"text_encoder is torch.float16, the denoiser torch.float32; load it with a dtype"
    with pytest.raises(UserError, match=wanted):
        calibrate(pipe, ["a red ring"], [1], call, 1)
