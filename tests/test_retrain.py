"""Retraining: what it changes, what it wins back, and that LoRA merges away."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny import calibrated, tiny

import ecodiff
from ecodiff.config.sections import RetrainSettings
from ecodiff.models.pipelines import denoise
from ecodiff.models.pruned import Pruned
from ecodiff.models.structures import denoiser_of, discover
from ecodiff.retrain.train import retrain
from ecodiff.runtime.errors import UserError

FAMILIES = ("sdxl", "flux")
SETTINGS = {
    "lora": RetrainSettings(kind="lora", rank=4, lr=1e-2, steps=2, batch=2),
    "full": RetrainSettings(kind="full", lr=1e-3, steps=2, batch=2),
}


def pruned(family):
    """A pruned pipeline with halved, nearly empty and empty structures, and its calibration."""
    pipe, calibration = calibrated(family)
    kept = {}
    for i, s in enumerate(discover(pipe)):
        units = torch.arange(s.units)
        kept[s.name] = [units % 2 == 0, units == 0, units < 0][i % 3]
    ecodiff.prune(pipe, kept)
    return pipe, calibration


def half_pruned(family):
    pipe, calibration = calibrated(family)
    ecodiff.prune(pipe, {s.name: torch.arange(s.units) % 2 == 0 for s in discover(pipe)})
    return pipe, calibration


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_retraining_changes_weights_and_nothing_else(family, kind):
    pipe, calibration = pruned(family)
    denoiser = denoiser_of(pipe)
    before = {name: value.clone() for name, value in denoiser.state_dict().items()}
    history = retrain(pipe, calibration, SETTINGS[kind])
    after = denoiser.state_dict()
    assert denoiser_of(pipe) is denoiser and isinstance(denoiser, Pruned)
    assert {k: v.shape for k, v in after.items()} == {k: v.shape for k, v in before.items()}
    assert not any(isinstance(module, BaseTunerLayer) for module in denoiser.modules())
    assert not hasattr(denoiser, "peft_config")
    assert all(parameter.requires_grad for parameter in denoiser.parameters())
    assert any(not torch.equal(after[name], value) for name, value in before.items())
    assert list(history.step) == [0, 1]
    assert history.loss.gt(0).all()


def test_lora_reaches_all_attention_and_feed_forward_linears_and_no_others():
    pipe, calibration = half_pruned("flux")
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    retrain(pipe, calibration, SETTINGS["lora"])
    changed = {n for n, v in pipe.transformer.state_dict().items() if not torch.equal(v, before[n])}
    attention = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
    block, singles = (
        "transformer_blocks.0",
        ("single_transformer_blocks.0", "single_transformer_blocks.1"),
    )
    expected = {f"{block}.attn.{n}.weight" for n in (*attention, "to_out.0", "to_add_out")}
    expected |= {
        f"{block}.{ff}.{n}.weight" for ff in ("ff", "ff_context") for n in ("net.0.proj", "net.2")
    }
    expected |= {f"{s}.attn.{n}.weight" for s in singles for n in attention[:3]}
    expected |= {f"{s}.{n}.weight" for s in singles for n in ("proj_mlp", "proj_out")}
    assert changed == expected


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_retrained_model_is_saved_as_a_pruned_one(kind, tmp_path):
    pipe, calibration = pruned("flux")
    retrain(pipe, calibration, SETTINGS[kind])
    ecodiff.save(pipe, tmp_path / "model")
    again = ecodiff.load(tmp_path / "model")
    z0 = [
        denoise(p, calibration.embeds, calibration.noise, calibration.call) for p in (pipe, again)
    ]
    assert torch.equal(*z0)


def mean_losses(pipe, calibration, teacher=None, **changes):
    """Losses on one and the same sequence of batches, with a model that hardly moves."""
    settings = RetrainSettings(kind="full", lr=1e-12, steps=6, batch=2, seed=9, **changes)
    return retrain(pipe, calibration, settings, teacher).mean()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
# In an untrained net little of the noise's error is within reach of attention and FFNs.
@pytest.mark.parametrize(("kind", "lr", "left"), [("lora", 1e-2, 1.0), ("full", 1e-3, 0.97)])
def test_the_loss_falls(family, kind, lr, left):
    pipe, calibration = half_pruned(family)
    before = mean_losses(pipe, calibration).loss
    settings = RetrainSettings(kind=kind, rank=4, lr=lr, steps=15, batch=2, seed=9)
    retrain(pipe, calibration, settings)
    assert mean_losses(pipe, calibration).loss < left * before


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_distillation_by_lora_wins_back_what_pruning_lost(family):
    pipe, calibration = half_pruned(family)
    teacher = tiny(family)
    before = mean_losses(pipe, calibration, teacher, distillation=1.0).distillation
    settings = RetrainSettings(rank=4, lr=1e-2, steps=15, batch=2, distillation=1e6)
    retrain(pipe, calibration, settings, teacher)
    after = mean_losses(pipe, calibration, teacher, distillation=1.0).distillation
    assert after < 0.9 * before


@pytest.mark.slow
def test_full_retraining_in_half_precision_keeps_small_steps():
    pipe, calibration = half_pruned("flux")
    pipe.to(torch.bfloat16)
    before = torch.cat([v.flatten() for v in pipe.transformer.parameters()])
    # 20 steps of 1e-4 move weights by what bfloat16 can tell apart; one step alone is lost.
    retrain(pipe, calibration, RetrainSettings(kind="full", lr=1e-4, steps=20, batch=2))
    after = torch.cat([v.flatten() for v in pipe.transformer.parameters()])
    assert after.dtype == torch.bfloat16
    large = before.abs() > 0.05  # where a single step is under half a unit in the last place
    assert (after != before)[large].float().mean() > 0.3


def test_the_dense_model_is_at_no_distance_from_itself():
    pipe, calibration = calibrated("sdxl")
    settings = SETTINGS["full"].model_copy(update={"steps": 1, "distillation": 1.0})
    history = retrain(pipe, calibration, settings, tiny("sdxl").unet)
    assert history.distillation[0] == pytest.approx(0, abs=1e-10)


def test_distillation_needs_a_teacher():
    pipe, calibration = half_pruned("flux")
    with pytest.raises(UserError, match="needs the dense model"):
        retrain(pipe, calibration, SETTINGS["lora"].model_copy(update={"distillation": 1.0}))


def test_a_seed_determines_the_result():
    pipe, calibration = half_pruned("flux")
    start = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    results = []
    for seed in (0, 0, 1):
        pipe.transformer.load_state_dict(start)
        torch.randn(len(results) + 1)  # whatever else draws random numbers
        retrain(pipe, calibration, SETTINGS["lora"].model_copy(update={"seed": seed}))
        results.append(torch.cat([v.detach().flatten() for v in pipe.transformer.parameters()]))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_lora_on_half_precision_keeps_the_dtype():
    pipe, calibration = half_pruned("flux")
    pipe.to(torch.bfloat16)
    history = retrain(pipe, calibration, SETTINGS["lora"])
    assert {p.dtype for p in pipe.transformer.parameters()} == {torch.bfloat16}
    assert history.loss.notna().all()


def test_a_loss_that_is_not_finite_stops_lora_and_leaves_the_model():
    pipe, calibration = half_pruned("flux")
    before = torch.cat([v.flatten() for v in pipe.transformer.parameters()])
    calibration.z0[:] = torch.nan
    with pytest.raises(UserError, match="not finite at step 0"):
        retrain(pipe, calibration, SETTINGS["lora"])
    assert torch.equal(torch.cat([v.flatten() for v in pipe.transformer.parameters()]), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_data_of_another_model_are_refused(family):
    pipe, _ = half_pruned(family)
    _, other = calibrated(family, seed=1)
    with pytest.raises(UserError, match="calibration: was made of another model"):
        retrain(pipe, other, SETTINGS["lora"])


def test_a_teacher_that_is_another_model_is_refused():
    pipe, calibration = half_pruned("flux")
    settings = SETTINGS["lora"].model_copy(update={"distillation": 1.0})
    for teacher, why in ((tiny("flux", seed=1), "another model"), (tiny("sdxl"), "another family")):
        with pytest.raises(UserError, match=why):
            retrain(pipe, calibration, settings, teacher)


def test_data_serve_the_model_in_another_dtype():
    pipe, calibration = half_pruned("flux")
    history = retrain(pipe.to(torch.bfloat16), calibration, SETTINGS["lora"])
    assert history.loss.gt(0).all()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"rank": 100_000}, r"rank: 100000 is above the widest layer's \d+"),
        ({"batch": 3}, "batch: 3, but calibration has 2"),
    ],
)
def test_what_the_model_or_the_data_can_not_hold_is_refused(changes, error):
    pipe, calibration = half_pruned("flux")
    with pytest.raises(UserError, match=error):
        retrain(pipe, calibration, SETTINGS["lora"].model_copy(update=changes))
