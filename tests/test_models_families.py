"""Every family of pipelines, on a tiny genuine one: from prompts to a saved, pruned model."""

from __future__ import annotations

from collections import defaultdict
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler
from tiny import CALLS, SMALL, tiny, whole_mask
from torch import nn

import ecodiff
from ecodiff.calibrate import calibrate
from ecodiff.calibrate.grams import gather_grams
from ecodiff.config.methods import METHODS
from ecodiff.config.sections import MaskSettings
from ecodiff.mask import peers
from ecodiff.models.families import runs_per_step
from ecodiff.models.pipelines import call_arguments, decode, denoise, encode, starting_noise
from ecodiff.models.structures import denoiser_of, discover
from ecodiff.runtime.errors import UserError
from ecodiff.trajectory.denoising_loss import conditioned, objective
from ecodiff.trajectory.gates import Gates
from ecodiff.trajectory.rollout import frozen, rollout

PROMPTS = ["a red square", "a small blue ring on navy", "a circle"]  # of different lengths
SEEDS = [5, 6, 7]
# Structures and units of each kind, counted by hand from the configs in tiny.py.
FOUND = {
    "sdxl": {"heads": (22, 60), "neurons": (11, 1920)},
    "flux": {"heads": (3, 6), "neurons": (4, 768), "modulation": (5, 960)},
    "sd15": {"heads": (8, 16), "neurons": (4, 160)},
    "sd2": {"heads": (8, 20), "neurons": (4, 160)},
    "lcm": {"heads": (8, 16), "neurons": (4, 160)},
    "sd3": {"heads": (3, 9), "neurons": (3, 288), "modulation": (5, 600)},
    "pixart": {"heads": (4, 12), "neurons": (2, 192), "modulation": (1, 144)},
    "qwen": {"heads": (2, 6), "neurons": (4, 384), "modulation": (5, 624)},
    "z-image": {"heads": (3, 9), "neurons": (3, 192), "modulation": (3, 216)},
    "sana": {"heads": (4, 10), "neurons": (2, 120), "modulation": (1, 144)},
    "wan": {"neurons": (2, 80)},
    "chroma": {"heads": (3, 9), "neurons": (4, 384)},
    "kontext": {"heads": (2, 4), "neurons": (3, 576), "modulation": (4, 816)},
    "ovis": {"heads": (2, 6), "neurons": (3, 288), "modulation": (4, 408)},
    "auraflow": {"heads": (2, 6), "neurons": (3, 768), "modulation": (4, 480)},
}
# What a plain call needs to mean the same as ours.
PLAIN = {
    "qwen": {"negative_prompt": " "},
    "pixart": {"use_resolution_binning": False},
    "sana": {"use_resolution_binning": False},
    "kontext": {"max_area": 32 * 32},
}
# Families whose training loss isn't known.
UNTRAINED = {"z-image", "sana"}
# The argument that sets guidance, and the largest value at which it is off.
GUIDANCE = dict.fromkeys(("flux", "kontext", "qwen"), ("true_cfg_scale", 1.0))
GUIDANCE["z-image"] = ("guidance_scale", 0.0)


@pytest.fixture(scope="module", params=CALLS)
def dense(request):
    """A dense pipeline that no test changes, with its inputs and its latents."""
    family = request.param
    pipe, call = tiny(family), {**CALLS[family], **SMALL}
    embeds, noise = encode(pipe, PROMPTS, call), starting_noise(pipe, SEEDS, call)
    return SimpleNamespace(
        family=family,
        pipe=pipe,
        call=call,
        embeds=embeds,
        noise=noise,
        structures=discover(pipe),
        z0=denoise(pipe, embeds, noise, call),
    )


def z0_of(pipe, dense):
    return denoise(pipe, dense.embeds, dense.noise, dense.call)


def masked(dense, kept, means=MappingProxyType({})):
    gates = Gates(dense.structures, means=means)
    gates.set(kept)
    with gates.attached(denoiser_of(dense.pipe)):
        return z0_of(dense.pipe, dense)


def most_units(structures):
    """Keep 70 % of the units, at random."""
    generator = torch.Generator().manual_seed(0)
    return {s.name: torch.rand(s.units, generator=generator) < 0.7 for s in structures}


def pruned(dense, kept, grams=None):
    pipe = tiny(dense.family)
    ecodiff.prune(pipe, kept, grams)
    return pipe


def test_discover_finds_what_the_config_says(dense):
    found = defaultdict(list)
    for structure in dense.structures:
        found[structure.kind].append(structure.units)
    counts = {kind: (len(units), sum(units)) for kind, units in found.items()}
    assert counts == FOUND[dense.family]


def test_the_latents_are_those_of_the_plain_call(dense):
    # LCM draws more noise after its first step, which ours takes from other generators.
    call = {**dense.call, "num_inference_steps": 1} if dense.family == "lcm" else dense.call
    generator = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    options = {"generator": generator, "output_type": "latent", "return_dict": False}
    plain = dense.pipe(prompt=PROMPTS, **options, **call, **PLAIN.get(dense.family, {}))[0]
    found = denoise(dense.pipe, dense.embeds, dense.noise, call)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)


def test_pictures_are_those_of_the_plain_call(dense):
    given = call_arguments(dense.pipe, dense.embeds, dense.noise, dense.call)
    plain = dense.pipe(**{**given, "output_type": "np"})[0]
    plain = plain[:, 0] if dense.family == "wan" else plain
    pictures = decode(dense.pipe, dense.z0, dense.call)
    assert pictures.dtype == np.uint8
    assert pictures.shape == (3, dense.call["height"], dense.call["width"], 3)
    assert np.abs(pictures - plain * 255).max() < 0.51  # rounded to the nearest


@pytest.mark.slow
def test_a_batch_gives_what_single_prompts_give(dense):
    for i, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        embeds = encode(dense.pipe, [prompt], dense.call)
        for name, value in dense.embeds.items():
            torch.testing.assert_close(embeds[name], value[i : i + 1])
        noise = starting_noise(dense.pipe, [seed], dense.call)
        alone = denoise(dense.pipe, embeds, noise, dense.call)
        torch.testing.assert_close(alone[0], dense.z0[i], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen", "z-image"])
def test_texts_lose_the_padding_that_a_call_does_not_need(family):
    pipe, call = tiny(family), CALLS[family]
    embeds, noise = encode(pipe, PROMPTS, call), starting_noise(pipe, SEEDS, call)
    lengths = embeds["prompt_embeds_mask"].sum(1).tolist()
    assert len(set(lengths)) > 1 and max(lengths) < call["max_sequence_length"]
    given = call_arguments(pipe, embeds, noise, call)["prompt_embeds"]
    expected = [max(lengths)] * 3 if family == "qwen" else lengths
    assert [len(text) for text in given] == expected


def test_prompts_make_a_difference(dense):
    noise = dense.noise[:1].expand_as(dense.noise)
    z0 = denoise(dense.pipe, dense.embeds, noise, dense.call)
    assert (z0[0] - z0[1]).abs().max() > 1e-5


def test_open_gates_leave_the_picture_as_it_is(dense):
    assert torch.equal(masked(dense, {}), dense.z0)


@pytest.mark.parametrize("keep_steps", [0, 1])
def test_gradients_of_gates_equal_full_backpropagation(dense, keep_steps):
    def gradients(**options):
        gates = Gates(dense.structures, first_logit=0.5)
        gates.draw(len(PROMPTS), torch.Generator().manual_seed(3))
        denoiser = denoiser_of(dense.pipe)
        with frozen(denoiser), gates.attached(denoiser):
            z0 = rollout(dense.pipe, dense.embeds, dense.noise, dense.call, **options)
            z0.square().mean().backward()
        # The text stream of a last block reaches nothing.
        grads = [g.grad if g.grad is not None else torch.zeros_like(g) for g in gates.parameters()]
        return torch.cat(grads)

    full = gradients(checkpoint=False)
    assert full.norm() > 0
    assert (gradients(keep_steps=keep_steps) - full).norm() / full.norm() <= 1e-5


def test_pruned_equals_masked(dense):
    kept = most_units(dense.structures)
    expected = masked(dense, kept)
    assert (expected - dense.z0).abs().max() > 1e-3
    assert (z0_of(pruned(dense, kept), dense) - expected).abs().max() <= 1e-4


@pytest.mark.slow
def test_pruned_equals_masked_where_gates_close_onto_means(dense):
    means = calibrate(dense.pipe, PROMPTS, SEEDS, dense.call, 2).means
    if dense.family == "auraflow":  # which has no biases
        assert not means
        return
    assert means
    kept = most_units(dense.structures)
    expected = masked(dense, kept, means)
    assert (expected - masked(dense, kept)).abs().max() > 1e-4
    pipe = pruned(dense, whole_mask(tiny(dense.family), kept, means))
    assert (z0_of(pipe, dense) - expected).abs().max() <= 1e-4


@pytest.mark.slow
def test_pruned_equals_masked_with_one_structure_gone(dense):
    firsts = {s.kind: s for s in reversed(dense.structures)}
    for structure in firsts.values():
        kept = {structure.name: torch.zeros(structure.units, dtype=torch.bool)}
        expected = masked(dense, kept)
        assert (expected - dense.z0).abs().max() > 1e-4, structure.name
        found = z0_of(pruned(dense, kept), dense)
        assert (found - expected).abs().max() <= 1e-4, structure.name


@pytest.mark.slow
def test_a_saved_pruned_pipeline_draws_the_same_from_prompts(dense, tmp_path):
    pipe = pruned(dense, most_units(dense.structures))
    ecodiff.save(pipe, tmp_path / "model")
    again = ecodiff.load(tmp_path / "model")
    again.set_progress_bar_config(disable=True)
    embeds = encode(again, PROMPTS, dense.call)
    found = denoise(again, embeds, dense.noise, dense.call)
    assert (found - z0_of(pipe, dense)).abs().max() <= 1e-5


@pytest.mark.slow
def test_compensation_stays_finite_and_changes_what_is_left(dense):
    calibration = calibrate(dense.pipe, PROMPTS, SEEDS, dense.call, 2)
    grams = gather_grams(dense.pipe, dense.structures, calibration, 2)
    kept = most_units(dense.structures)
    pipe = pruned(dense, kept, grams)
    assert all(p.isfinite().all() for p in denoiser_of(pipe).parameters())
    found = z0_of(pipe, dense)
    assert found.isfinite().all()
    assert (found - masked(dense, kept)).abs().max() > 1e-3


def test_every_method_that_scores_at_once_knows_the_family(dense, monkeypatch):
    monkeypatch.setattr(peers, "TIMESTEPS", 2)
    record = calibrate(dense.pipe, PROMPTS, SEEDS, dense.call, 3)
    for method in [m.name for m in METHODS.values() if not m.learns]:
        if method == "taylor" and dense.family in UNTRAINED:
            with pytest.raises(UserError, match="can't be trained"):
                ecodiff.mask.score(dense.pipe, method, calibration=record)
            continue
        found = ecodiff.mask.score(dense.pipe, method, calibration=record)
        units = "rank" if METHODS[method].by_rank else "channels"
        structures = discover(dense.pipe, units)
        assert found.keys() == {s.name for s in structures}
        for s in structures:
            assert found[s.name].shape == (s.units,)
            assert not found[s.name].isnan().any()
            known = s.consumers or method not in ("obs", "obs-inner", "wanda")
            assert found[s.name].isfinite().all() or not known or method in ("depth", "obs-inner")


def test_guidance_is_off_where_the_pipeline_says_so(dense):
    scale, threshold = GUIDANCE.get(dense.family, ("guidance_scale", 1.0))
    off, on = ({**dense.call, scale: threshold + more} for more in (0.0, 0.5))
    embeds = encode(dense.pipe, PROMPTS, off)
    assert not [name for name in embeds if name.startswith("negative_")]
    assert denoise(dense.pipe, embeds, dense.noise, off).isfinite().all()
    is_guided = "negative_prompt_embeds" in encode(dense.pipe, PROMPTS, on)
    assert is_guided == (dense.family != "lcm")  # which takes the scale as an input


@pytest.mark.slow
def test_latents_have_the_dtype_that_the_pipeline_gives_them(dense, monkeypatch):
    pipe, dtypes = tiny(dense.family).to(torch.bfloat16), []
    step = pipe.scheduler.step

    def seen(output, timestep, sample, **options):
        dtypes.append(sample.dtype)
        return step(output, timestep, sample, **options)

    monkeypatch.setattr(pipe.scheduler, "step", seen)
    pipe(prompt=PROMPTS, **dense.call, **PLAIN.get(dense.family, {}), output_type="latent")
    noise = starting_noise(pipe, SEEDS, dense.call)
    z0 = denoise(pipe, encode(pipe, PROMPTS, dense.call), noise, dense.call)
    assert (noise.dtype, z0.dtype, z0.shape) == (dtypes[0], dtypes[0], noise.shape)


@pytest.mark.parametrize("family", ["flux", "qwen", "wan"])
def test_kept_steps_count_both_runs_of_guidance(family):
    pipe, call = tiny(family), {**CALLS[family], "num_inference_steps": 3}
    call = {**call, GUIDANCE.get(family, ("guidance_scale", 1.0))[0]: 2.0}
    embeds, noise = encode(pipe, PROMPTS, call), starting_noise(pipe, SEEDS, call)
    gates, denoiser, runs = Gates(discover(pipe)), denoiser_of(pipe), []
    gates.draw(len(PROMPTS), torch.Generator().manual_seed(0))
    with frozen(denoiser), gates.attached(denoiser):
        # An early layer: recomputing stops where nothing more is needed.
        first = next(part for part in denoiser.modules() if isinstance(part, nn.Linear))
        hook = first.register_forward_hook(lambda *_: runs.append(1))
        rollout(pipe, embeds, noise, call, keep_steps=1).sum().backward()
        hook.remove()
    assert len(runs) == 2 * (3 + 2)
    assert runs_per_step(pipe, embeds) == 2


def test_later_noise_is_the_prompts_own():
    pipe, call = tiny("lcm"), {**CALLS["lcm"], "num_inference_steps": 4}
    embeds, noise = encode(pipe, PROMPTS, call), starting_noise(pipe, SEEDS, call)
    together = denoise(pipe, embeds, noise, call)
    torch.testing.assert_close(denoise(pipe, embeds, noise, call), together, rtol=0, atol=0)
    alone = denoise(pipe, {k: v[1:2] for k, v in embeds.items()}, noise[1:2], call)
    torch.testing.assert_close(alone[0], together[1], rtol=1e-4, atol=1e-4)


def test_a_video_of_one_frame_is_a_picture():
    pipe, call = tiny("wan"), {**CALLS["wan"], "num_frames": 1}
    noise = starting_noise(pipe, SEEDS, call)
    assert noise.shape == (3, 4, 1, 8, 8)
    z0 = denoise(pipe, encode(pipe, PROMPTS, call), noise, call)
    assert decode(pipe, z0, call).shape == (3, 32, 32, 3)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("wan", {"num_frames": 4}, "num_frames is 4, must be 1 or 1 plus a multiple of 2"),
        ("wan", {"height": 20}, "height is 20, must be a multiple of 8"),
        ("flux", {"width": 60}, "width is 60, must be a multiple of 8"),
        ("z-image", {"height": None}, "height is None, must be a multiple of 8"),
    ],
)
def test_sizes_that_cannot_be_drawn_are_refused(family, change, message):
    with pytest.raises(UserError, match=f"^call: {message}$"):
        starting_noise(tiny(family), SEEDS, {**CALLS[family], **change})


def test_settings_of_other_families_are_refused(dense):
    foreign = "num_frames" if dense.family != "wan" else "true_cfg_scale"
    name = type(dense.pipe).__name__
    with pytest.raises(UserError, match=f"^call: {foreign} is not a setting of {name}$"):
        denoise(dense.pipe, dense.embeds, dense.noise, {**dense.call, foreign: 3})


def test_a_pipeline_with_two_denoisers_is_refused():
    pipe = tiny("wan")
    pipe.transformer_2 = pipe.transformer
    with pytest.raises(UserError, match="WanPipeline: has two denoisers"):
        encode(pipe, PROMPTS, CALLS["wan"])


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in CALLS if family != "z-image"])
def test_retraining_sees_one_prediction_a_latent_and_no_guidance(family):
    pipe, call = tiny(family), CALLS[family]
    noise = starting_noise(pipe, SEEDS, call)
    prepared = conditioned(pipe, encode(pipe, PROMPTS, call), noise, call)
    timesteps = pipe.scheduler.timesteps[:1].expand(len(PROMPTS))
    with torch.no_grad():
        found = prepared.predict(denoiser_of(pipe), noise, timesteps)
    assert found.shape == noise.shape


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("kind", ["lcm", "turbo", "schnell"])
def test_step_distilled_models_are_pruned_over_their_few_steps(kind, steps, tmp_path):
    family = {"lcm": "lcm", "turbo": "sdxl", "schnell": "flux"}[kind]
    pipe, call = tiny(family), {**CALLS[family], **SMALL, "num_inference_steps": steps}
    if family != "flux":
        call["guidance_scale"] = 1.0 if kind == "lcm" else 0.0
    if kind == "turbo":
        pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(
            pipe.scheduler.config, timestep_spacing="trailing"
        )
    embeds = encode(pipe, PROMPTS, call)
    assert not any(key.startswith("negative") for key in embeds)  # guidance is off
    runs = []
    hook = denoiser_of(pipe).register_forward_pre_hook(lambda *_: runs.append(1))
    settings = MaskSettings(iterations=2, batch=3, lr={"heads": 1.0, "neurons": 1.0})
    mask = ecodiff.learn_mask(pipe, PROMPTS, 0.1, call=call, settings=settings)
    hook.remove()
    assert len(runs) == 4 * steps  # the dense trajectory, where to start, two updates
    assert any(scores.unique().numel() > 1 for scores in mask.scores.values())
    ecodiff.prune(pipe, mask)
    noise = starting_noise(pipe, SEEDS, call)
    z0 = denoise(pipe, embeds, noise, call)
    ecodiff.save(pipe, tmp_path / "small")
    assert torch.equal(denoise(ecodiff.load(tmp_path / "small"), embeds, noise, call), z0)


def test_retraining_z_image_is_refused():
    pipe, call = tiny("z-image"), CALLS["z-image"]
    embeds, noise = encode(pipe, PROMPTS, call), starting_noise(pipe, SEEDS, call)
    with pytest.raises(UserError, match=r"^ZImagePipeline: can't be trained"):
        conditioned(pipe, embeds, noise, call)


def test_retraining_with_a_solver_that_predicts_flow_is_refused():
    with pytest.raises(UserError, match="flow_prediction can't be trained"):
        objective(tiny("sana").scheduler)
