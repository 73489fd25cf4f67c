"""Gates against hand-worked values, Monte-Carlo, and denoisers that are really cut."""

from __future__ import annotations

import math

import pytest
import torch
from denoisers import call, tiny_transformer, tiny_unet
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ecodiff.models.structures import count_parameters, discover
from ecodiff.trajectory.gates import Gates, open_probability, sample_gate

BUILDERS = pytest.mark.parametrize("build", [tiny_unet, tiny_transformer])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_masks(denoiser: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Half of the units of each structure, at least one."""
    masks = {}
    for s in discover(denoiser):
        masks[s.name] = torch.randperm(s.units, generator=seeded(seed)) < max(1, s.units // 2)
    return masks


def cut(denoiser: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    """Really narrow the linears, plainly; modulation rows become zeros."""
    rows = {n: torch.ones(m.out_features, dtype=bool) for n, m in linears(denoiser).items()}
    columns = {n: torch.ones(m.in_features, dtype=bool) for n, m in linears(denoiser).items()}
    zeroed = {}
    for s in discover(denoiser):
        gone = (~masks[s.name]).nonzero().flatten()
        for port in s.producers:
            if s.consumers:
                rows[port.module][s.columns(port, gone)] = False
            else:
                zeroed[port.module] = gone
        for port in s.consumers:
            columns[port.module][s.columns(port, gone)] = False
        if s.kind == "heads":
            denoiser.get_submodule(s.name.rpartition(".")[0]).heads = int(masks[s.name].sum())
    for name, linear in linears(denoiser).items():
        linear.weight = nn.Parameter(linear.weight[rows[name]][:, columns[name]])
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias[rows[name]])
        for parameter in linear.parameters():
            parameter.requires_grad_(False)
            parameter[zeroed.get(name, [])] = 0
    return denoiser


def linears(denoiser: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in denoiser.named_modules() if isinstance(m, nn.Linear)}


# the distribution


def test_gate_hand_worked():
    # u = 1/2 has no noise: s = sigmoid(0) = 1/2, gate = 0.5 * 1.2 - 0.1.
    logits = torch.zeros(1)
    assert sample_gate(logits, torch.full((1,), 0.5), 0.0).item() == pytest.approx(0.5)
    # a = 3, u = 0.1, d = 0.5: log(0.6 / 1.4) = -0.8473, s = sigmoid(2.1527 / 0.83) = 0.93045.
    gate = sample_gate(torch.full((1,), 3.0), torch.full((1,), 0.1), 0.5)
    assert gate.item() == 1.0
    gate = sample_gate(torch.zeros(1), torch.full((1,), 0.1), 0.5)
    assert gate.item() == pytest.approx(1.2 / (1 + math.exp(0.8472979 / 0.83)) - 0.1, abs=1e-6)


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_extreme_noise_stays_finite_in_value_and_gradient(floor):
    logits = torch.tensor([-60.0, 0.0, 60.0], requires_grad=True)
    gate = sample_gate(logits, torch.tensor([[0.0], [1.0 - 2**-24]]), floor)
    gate.sum().backward()
    assert gate.isfinite().all() and ((gate >= 0) & (gate <= 1)).all()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("floor", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("logit", [-3.0, -1.5, -0.5, 0.0, 1.0, 3.0])
def test_open_probability_equals_monte_carlo(floor, logit):
    """Public fault 4: an L0 formula that ignores the noise floor."""
    n = 200_000
    u = torch.rand(n, 1, generator=seeded(3))
    logits = torch.full((1,), logit)
    frequency = (sample_gate(logits, u, floor) > 0).double().mean().item()
    p = open_probability(logits, floor).item()
    assert frequency == pytest.approx(p, abs=4.5 * math.sqrt(p * (1 - p) / n) + 1e-6)


def test_open_probability_without_floor_is_the_original():
    logits = torch.linspace(-8, 8, 33)
    reference = torch.sigmoid(logits - 0.83 * math.log(0.1 / 1.1))
    torch.testing.assert_close(open_probability(logits, 0.0), reference)


@pytest.mark.parametrize("floor", [0.0, 0.1, 0.5])
def test_open_probability_equals_the_published_form(floor):
    logits = torch.linspace(-5, 5, 41, dtype=torch.float64)
    c = 0.83 * math.log((0.1 / 1.2) / (1 - 0.1 / 1.2)) - logits
    closed = (c.exp() * (1 + floor) - floor) / (1 + c.exp())
    torch.testing.assert_close(open_probability(logits, floor), 1 - closed.clamp(0, 1))


def test_open_probability_does_not_overflow():
    p = open_probability(torch.tensor([-1000.0, 1000.0]), 0.1)
    assert p.tolist() == [0.0, 1.0]


# gating a denoiser


@BUILDERS
def test_masked_equals_cut(build):
    denoiser = build().double()
    masks = random_masks(denoiser)
    gates = Gates(discover(denoiser))
    gates.set(masks)
    dense = call(denoiser)
    with gates.attached(denoiser):
        masked = call(denoiser)
    torch.testing.assert_close(call(cut(denoiser, masks)), masked, rtol=1e-9, atol=1e-12)
    assert (masked - dense).abs().max() > 1e-2


@BUILDERS
def test_open_gates_change_nothing_at_all(build):
    denoiser = build()
    gates = Gates(discover(denoiser))
    gates.set({})
    dense = call(denoiser)
    with gates.attached(denoiser):
        assert torch.equal(call(denoiser), dense)


@BUILDERS
def test_one_sample_serves_all_steps(build):
    """Public fault 2: noise redrawn at every hook call and every step."""
    denoiser = build()
    gates = Gates(discover(denoiser), first_logit=0.0)
    with gates.attached(denoiser), torch.no_grad():
        gates.draw(2, seeded(0))
        first, second = call(denoiser), call(denoiser)
        gates.draw(2, seeded(1))
        redrawn = call(denoiser)
    assert torch.equal(first, second)
    assert not torch.allclose(first, redrawn)


@BUILDERS
def test_recomputation_sees_the_same_sample(build):
    """Public fault 2, in the backward pass: checkpointed gradients equal plain ones."""
    denoiser = build()
    gates = Gates(discover(denoiser), first_logit=0.5)
    gradients = []
    for run in (call, lambda d: checkpoint(call, d, use_reentrant=False)):
        gates.zero_grad()
        gates.draw(2, seeded())
        with gates.attached(denoiser):
            (run(denoiser) + run(denoiser)).square().sum().backward()
        gradients.append([p.grad.clone() for p in gates.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(g.abs().sum() > 0 for g in gradients[0])


@BUILDERS
def test_guidance_branches_share_their_prompts_sample(build):
    denoiser = build()
    gates = Gates(discover(denoiser), first_logit=0.0)
    gates.draw(2, seeded())
    with gates.attached(denoiser), torch.no_grad():
        uncond, cond = call(denoiser, prompts=2, branches=2).chunk(2)
        torch.testing.assert_close(uncond, cond)
        torch.testing.assert_close(cond, call(denoiser, prompts=2))


def test_prompts_have_samples_of_their_own():
    unet = tiny_unet()
    gates = Gates(discover(unet), first_logit=0.0)
    gates.draw(2, seeded())
    seen = {}
    name = next(s for s in gates.structures if s.kind == "neurons").consumers[0].module
    with gates.attached(unet):
        unet.get_submodule(name).register_forward_pre_hook(lambda _, a: seen.update(x=a[0]))
        call(unet, prompts=2)
    zeros = (seen["x"] == 0).all(dim=1)
    assert zeros.any(dim=1).all() and not torch.equal(zeros[0], zeros[1])


def test_the_same_generator_gives_the_same_gates():
    unet = tiny_unet()
    outputs = []
    for _ in range(2):
        gates = Gates(discover(unet), first_logit=0.0)
        gates.draw(2, seeded(7))
        with gates.attached(unet), torch.no_grad():
            outputs.append(call(unet))
    assert torch.equal(*outputs)


def test_hooks_go_even_on_error():
    unet = tiny_unet()
    gates = Gates(discover(unet))
    with pytest.raises(ZeroDivisionError), gates.attached(unet):
        raise ZeroDivisionError
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in unet.modules())


def test_structures_of_a_packed_linear_share_one_hook():
    transformer = tiny_transformer()
    gates = Gates(discover(transformer))
    with gates.attached(transformer):
        packed = transformer.single_transformer_blocks[0].proj_out
        assert len(packed._forward_pre_hooks) == 1


@pytest.mark.parametrize("kind", ["heads", "neurons", "modulation"])
def test_structures_left_out_are_not_gated(kind):
    transformer = tiny_transformer().double()
    masks = random_masks(transformer)
    some = Gates([s for s in discover(transformer) if s.kind == kind])
    some.set({name: mask for name, mask in masks.items() if name.endswith(kind)})
    everything = Gates(discover(transformer))
    everything.set({name: mask for name, mask in masks.items() if name.endswith(kind)})
    with some.attached(transformer):
        partly = call(transformer)
    with everything.attached(transformer):
        assert torch.equal(call(transformer), partly)


def test_modulation_reaches_the_output_and_the_regulariser():
    """Public fault 5: the modulation regulariser never reached the loss."""
    transformer = tiny_transformer()
    structures = discover(transformer)
    gates = Gates(structures, first_logit=0.5)
    gates.draw(2, seeded())
    with gates.attached(transformer):
        call(transformer).square().mean().backward()
    names = [s.name for s in structures if s.kind == "modulation"]
    assert names and all(gates.logits[n].grad.abs().sum() > 0 for n in names)
    gates.zero_grad()
    sum(gates.expected_sparsity(count_parameters(transformer)).values()).backward()
    assert all((gates.logits[n].grad < 0).all() for n in names)


@BUILDERS
def test_logits_and_optimiser_stay_fp32_under_a_bf16_model(build):
    """Public fault 6: logits and Adam state in bf16."""
    denoiser = build().bfloat16()
    gates = Gates(discover(denoiser), first_logit=0.5)
    optimiser = torch.optim.AdamW(gates.parameters(), lr=1e-4, weight_decay=0)
    gates.draw(2, seeded())
    with gates.attached(denoiser):
        output = call(denoiser)
    output.float().square().mean().backward()
    before = [p.detach().clone() for p in gates.parameters()]
    optimiser.step()
    assert output.dtype == torch.bfloat16
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in gates.parameters())
    state = [v for s in optimiser.state.values() for v in s.values()]
    assert state and all(v.dtype == torch.float32 for v in state)
    # A step of 1e-4 is lost on a bf16 logit of 0.5, not on an fp32 one.
    assert all((a != b).any() for a, b in zip(before, gates.parameters(), strict=True))


# sparsity


@BUILDERS
def test_expected_sparsity_of_certain_gates_counts_real_parameters(build):
    """Weights and biases, exactly: the reference is the parameter count of the cut denoiser."""
    denoiser = build()
    masks = random_masks(denoiser)
    structures, total = discover(denoiser), count_parameters(denoiser)
    gates = Gates(structures, floor=0.1)
    for name, logits in gates.logits.items():
        logits.data = torch.where(masks[name], 20.0, -20.0)
    expected = sum(gates.expected_sparsity(total).values()).item()
    modulation = [s for s in structures if s.kind == "modulation"]
    zeroed = sum(int((~masks[s.name]).sum()) * s.unit_parameters for s in modulation)
    removed = total - count_parameters(cut(denoiser, masks)) + zeroed
    assert expected * total == pytest.approx(removed, rel=1e-6)


def test_expected_sparsity_hand_worked():
    structures = discover(nn.ModuleDict({"ff": tiny_unet().mid_block.attentions[0]}))
    gates = Gates(structures, first_logit=0.0)
    closed = 1 - 1 / (1 + (0.1 / 1.1) ** 0.83)  # 1 - sigmoid(-b log(-g / z))
    whole = 4 * 256 + 4 * 224 + 64 * 50  # two attentions of 4 heads, one FFN of 64 neurons
    expected = sum(gates.expected_sparsity(10_000).values()).item()
    assert expected == pytest.approx(closed * whole / 10_000)


# misuse


def test_gates_without_values_are_refused():
    unet = tiny_unet()
    with Gates(discover(unet)).attached(unet), pytest.raises(RuntimeError, match="draw"):
        call(unet)


def test_a_batch_that_does_not_fit_is_refused():
    unet = tiny_unet()
    gates = Gates(discover(unet))
    gates.draw(2, seeded())
    with gates.attached(unet), pytest.raises(RuntimeError, match="batch 3"):
        call(unet, prompts=3)


def test_values_that_do_not_fit_are_refused():
    gates = Gates(discover(tiny_unet()))
    name = gates.structures[0].name
    with pytest.raises(ValueError, match=r"5,.*4 units"):
        gates.set({name: torch.ones(5)})
    with pytest.raises(ValueError, match="no structure is called nonsense"):
        gates.set({"nonsense": torch.ones(1)})
