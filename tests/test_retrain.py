"""Retraining: what it changes, what it wins back, and that a stopped run ends like any other."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny import CALLS, tiny

import ecodiff
from ecodiff.config.sections import RetrainSettings
from ecodiff.models.pipelines import denoise, encode, starting_noise
from ecodiff.models.pruned import Pruned
from ecodiff.models.saving import save_adapter
from ecodiff.models.structures import denoiser_of, discover
from ecodiff.retrain.kinds import trainable
from ecodiff.retrain.train import retrain
from ecodiff.retrain.trajectory import record
from ecodiff.runtime.errors import UserError

FAMILIES = ("sdxl", "flux")
PROMPTS = ["a red ring", "a blue square", "a star", "a dot"]
SETTINGS = {
    "lora": RetrainSettings(kind="lora", rank=4, lr=1e-2, steps=2, batch=1),
    "full": RetrainSettings(kind="full", lr=1e-5, steps=2, batch=1),
    "light": RetrainSettings(kind="light", lr=1e-3, steps=2, batch=1),
}


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory):
    """A folder a family: the dense model's trajectory on four prompts, each a batch."""
    found = {}
    for family in FAMILIES:
        found[family] = tmp_path_factory.mktemp(family)
        record(tiny(family), PROMPTS, [1, 2, 3, 4], CALLS[family], 1, found[family])
    return found


def half_pruned(family):
    pipe = tiny(family)
    ecodiff.prune(pipe, {s.name: torch.arange(s.units) % 2 == 0 for s in discover(pipe)})
    return pipe


def pruned(family):
    """A pipeline with halved, nearly empty and empty structures."""
    pipe, kept = tiny(family), {}
    for i, s in enumerate(discover(pipe)):
        units = torch.arange(s.units)
        kept[s.name] = [units % 2 == 0, units == 0, units < 0][i % 3]
    ecodiff.prune(pipe, kept)
    return pipe


def latents(pipe, family):
    embeds = encode(pipe, PROMPTS[:1], CALLS[family])
    return denoise(pipe, embeds, starting_noise(pipe, [1], CALLS[family]), CALLS[family])


def weights(pipe):
    return torch.cat([v.detach().flatten().float() for v in denoiser_of(pipe).parameters()])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", SETTINGS)
def test_retraining_changes_weights_and_nothing_else(family, kind, trajectories):
    pipe = pruned(family)
    denoiser = denoiser_of(pipe)
    before = {name: value.clone() for name, value in denoiser.state_dict().items()}
    history = retrain(pipe, [trajectories[family]], SETTINGS[kind]).history
    after = denoiser.state_dict()
    assert denoiser_of(pipe) is denoiser and isinstance(denoiser, Pruned)
    assert {k: v.shape for k, v in after.items()} == {k: v.shape for k, v in before.items()}
    assert not any(isinstance(module, BaseTunerLayer) for module in denoiser.modules())
    assert not hasattr(denoiser, "peft_config")
    assert all(parameter.requires_grad for parameter in denoiser.parameters())
    assert any(not torch.equal(after[name], value) for name, value in before.items())
    assert list(history.step) == [0, 1]
    assert history.loss.gt(0).all()


def changed_by(kind, trajectories):
    pipe = half_pruned("flux")
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    retrain(pipe, [trajectories["flux"]], SETTINGS[kind])
    now = pipe.transformer.state_dict()
    return {name for name, value in now.items() if not torch.equal(value, before[name])}


def test_lora_reaches_all_attention_and_feed_forward_linears_and_no_others(trajectories):
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
    assert changed_by("lora", trajectories) == expected


def test_the_light_kind_changes_vectors_alone(trajectories):
    shapes = {
        name: value.ndim for name, value in half_pruned("flux").transformer.named_parameters()
    }
    assert {shapes[name] for name in changed_by("light", trajectories)} == {1}


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_retrained_model_is_saved_as_a_pruned_one(kind, trajectories, tmp_path):
    pipe = pruned("flux")
    retrain(pipe, [trajectories["flux"]], SETTINGS[kind])
    ecodiff.save(pipe, tmp_path / "model")
    again = ecodiff.load(tmp_path / "model")
    assert torch.equal(latents(again, "flux"), latents(pipe, "flux"))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapter_loads_in_diffusers_and_draws_what_the_merged_model_draws(
    family, trajectories, tmp_path
):
    merged, plain = half_pruned(family), half_pruned(family)
    settings = SETTINGS["lora"].model_copy(update={"alpha": 9.0, "steps": 6})
    trained = retrain(merged, [trajectories[family]], settings)
    save_adapter(merged, trained.adapter, tmp_path / "adapter")
    before = latents(plain, family)
    plain.load_lora_weights(tmp_path / "adapter")
    expected = latents(merged, family)
    torch.testing.assert_close(latents(plain, family), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("kind", "lr"), [("lora", 1e-3), ("full", 1e-4), ("light", 1e-3)])
def test_what_it_never_saw_is_predicted_better(family, kind, lr, trajectories):
    rank = {"rank": 4} if kind == "lora" else {}
    settings = RetrainSettings(kind=kind, **rank, lr=lr, steps=40, batch=1)
    history = retrain(half_pruned(family), [trajectories[family]], settings).history
    held_out = history.held_out.dropna().tolist()
    assert held_out[-1] < 0.97 * held_out[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_lost_nothing_is_at_no_distance_from_the_dense_one(family, trajectories):
    pipe = tiny(family)
    ecodiff.prune(pipe, {s.name: torch.ones(s.units, dtype=torch.bool) for s in discover(pipe)})
    history = retrain(pipe, [trajectories[family]], SETTINGS["full"]).history
    assert history.loss[0] == pytest.approx(0, abs=1e-10)


def test_a_seed_determines_the_result(trajectories):
    results = []
    for seed in (0, 0, 1):
        pipe = half_pruned("flux")
        torch.randn(len(results) + 1)  # whatever else draws random numbers
        changes = {"seed": seed}
        retrain(pipe, [trajectories["flux"]], SETTINGS["lora"].model_copy(update=changes))
        results.append(weights(pipe))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("kind", SETTINGS)
def test_half_precision_keeps_the_dtype_and_small_steps(kind):
    """Fifty steps of 1e-6 move each parameter by 5e-5, which one by one bfloat16 would lose."""
    pipe = half_pruned("flux")
    denoiser = pipe.to(torch.bfloat16).transformer
    with trainable(denoiser, SETTINGS[kind]) as parameters:
        before = {name: value.detach().clone() for name, value in parameters.items()}
        optimiser = torch.optim.AdamW(parameters.values(), lr=1e-6, weight_decay=0.0)
        for _ in range(50):
            for value in parameters.values():
                value.grad = torch.ones_like(value)
            optimiser.step()
        for name, value in parameters.items():
            moved = (before[name] - value.detach()).abs().mean().item()
            assert moved == pytest.approx(5e-5, rel=0.05), name
    assert {p.dtype for p in denoiser.parameters()} == {torch.bfloat16}


def test_adapters_are_merged_in_float32_and_rounded_once():
    pipe = half_pruned("flux")
    denoiser = pipe.to(torch.bfloat16).transformer
    linear = denoiser.get_submodule("transformer_blocks.0.ff.net.2")
    before = linear.weight.detach().clone().float()
    with trainable(denoiser, SETTINGS["lora"]):
        layer = denoiser.get_submodule("transformer_blocks.0.ff.net.2")
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        b.data.normal_(std=1e-3, generator=torch.Generator().manual_seed(0))
        expected = (before + b.detach() @ a.detach()).to(torch.bfloat16)
    merged = denoiser.get_submodule("transformer_blocks.0.ff.net.2").weight
    assert torch.equal(merged, expected)


def test_a_loss_that_is_not_finite_names_step_and_prompts_and_keeps_the_state(
    trajectories, tmp_path
):
    pipe = half_pruned("flux")
    before = weights(pipe)
    hook = pipe.transformer.proj_out.register_forward_hook(lambda _, args, out: out * torch.nan)
    with pytest.raises(UserError, match=r"update 0: the loss is nan on prompts \[\['a .*lr"):
        retrain(pipe, [trajectories["flux"]], SETTINGS["lora"], tmp_path / "state")
    hook.remove()
    assert (tmp_path / "state").is_file()
    assert torch.equal(weights(pipe), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_data_of_another_model_are_refused(family, trajectories):
    pipe = tiny(family, seed=1)
    ecodiff.prune(pipe, {s.name: torch.arange(s.units) % 2 == 0 for s in discover(pipe)})
    with pytest.raises(UserError, match="was made of another model"):
        retrain(pipe, [trajectories[family]], SETTINGS["lora"])


def test_a_rank_above_all_widths_is_refused(trajectories):
    settings = SETTINGS["lora"].model_copy(update={"rank": 100_000})
    with pytest.raises(UserError, match=r"rank: 100000 is above the widest layer's \d+"):
        retrain(half_pruned("flux"), [trajectories["flux"]], settings)


def test_one_batch_is_too_few(tmp_path):
    record(tiny("flux"), PROMPTS, [1, 2, 3, 4], CALLS["flux"], 4, tmp_path)
    with pytest.raises(UserError, match="too few"):
        retrain(half_pruned("flux"), [tmp_path], SETTINGS["lora"])
