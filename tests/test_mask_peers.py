"""Scores of published methods, against cases worked by hand and against what they estimate."""

import math

import pytest
import torch
from test_mask_scores import PAIR, Pair
from tiny import CALLS, tiny
from torch import nn
from torch.nn import functional

from ecodiff.calibrate import calibrate
from ecodiff.calibrate.grams import Grams, gather_grams
from ecodiff.mask import make_mask, peers
from ecodiff.models.structures import denoiser_of, discover
from ecodiff.models.units import Port, Structure
from ecodiff.prune.compensate import solve
from ecodiff.trajectory.denoising_loss import conditioned, objective

PROMPTS = ["a red circle", "a blue square", "a small red ring"]


def grams_of(module, gram):
    return Grams({module: gram}, {module: torch.zeros(len(gram))}, {module: 1}, "")


@pytest.fixture(scope="module", params=["sdxl", "flux"])
def recorded(request):
    pipe = tiny(request.param)
    return pipe, calibrate(pipe, PROMPTS, [0, 1, 2], CALLS[request.param], batch_size=3)


def test_wanda_weighs_columns_by_the_norm_of_their_input():
    """By hand: both columns sum to 3, and the first unit's input is the larger: 3 * 3 > 3 * 2."""
    found = peers.wanda(Pair(), [PAIR], grams_of("down", torch.diag(torch.tensor([9.0, 4.0]))))
    assert found["pair.neurons"].tolist() == [9.0, 6.0]


def errors_without(weight, x, groups):
    """The squared error that is left when each group of columns is removed and the rest solved."""
    errors = []
    for group in groups:
        kept = torch.tensor([c for c in range(len(x)) if c not in group])
        solved, _ = solve(weight, None, x @ x.T, x.sum(1), x.shape[1], kept, ridge=1e-9)
        errors.append((weight @ x - solved @ x[kept]).square().sum().item())
    return errors


def layer_of_stand_ins():
    """A linear of eight inputs whose columns 0 and 1 are the largest, and 2 and 3 nearly theirs."""
    torch.manual_seed(0)
    x = torch.randn(8, 50, dtype=torch.float64)
    x[:2] = 5 * x[2:4] + 0.1 * x[:2]
    model = nn.ModuleDict({"out": nn.Linear(8, 5, bias=False)})
    return model, model["out"].weight.detach().double(), x


def test_obs_scores_neurons_by_the_error_that_is_left_once_the_rest_is_solved_again(monkeypatch):
    monkeypatch.setattr(peers, "DAMP", 1e-9)
    model, weight, x = layer_of_stand_ins()
    neurons = Structure("a.neurons", "neurons", 8, (), (Port("out"),), 5)
    found = peers.obs(model, [neurons], grams_of("out", x @ x.T))["a.neurons"]
    errors = errors_without(weight, x, [[c] for c in range(8)])
    torch.testing.assert_close(found.double(), torch.tensor(errors).double(), rtol=1e-4, atol=0)


def test_obs_removes_heads_one_by_one_and_scores_the_others_again(monkeypatch):
    monkeypatch.setattr(peers, "DAMP", 1e-9)
    model, weight, x = layer_of_stand_ins()
    heads = Structure("a.heads", "heads", 4, (), (Port("out", width=2),), 10)
    found = peers.obs(model, [heads], grams_of("out", x @ x.T))["a.heads"]
    gone, order = [], []
    for _ in range(3):  # the head whose loss, after those that are gone, costs least
        left = [head for head in range(4) if head not in order]
        errors = errors_without(weight, x, [[*gone, 2 * h, 2 * h + 1] for h in left])
        order.append(left[errors.index(min(errors))])
        gone += [2 * order[-1], 2 * order[-1] + 1]
    order += {0, 1, 2, 3} - {*order}
    assert found.argsort().tolist() == order
    alone = errors_without(weight, x, [[2 * h, 2 * h + 1] for h in range(4)])
    assert order != sorted(range(4), key=alone.__getitem__)  # or the test would show nothing


def test_inner_blocks_leaves_the_first_and_the_last_block_for_the_end():
    names = [f"blocks.{n}.ff.neurons" for n in (0, 1, 2)] + ["mid_block.attentions.0.ff.neurons"]
    found = peers.inner_blocks({name: torch.ones(2) for name in ["embedder.neurons", *names]})
    assert [name for name, score in found.items() if score.isinf().all()] == [names[0], names[2]]


def test_units_that_nothing_consumes_stay_for_as_long_as_possible(recorded):
    pipe, calibration = recorded
    structures = discover(pipe)
    for method in ("wanda", "obs"):
        mask, _ = make_mask(pipe, method, 0.1, calibration=calibration)
        for s in structures:
            assert mask.scores[s.name].isinf().all() == (not s.consumers)
            assert s.consumers or mask.kept[s.name].all()


def test_weights_of_steps_fall_with_their_logarithm():
    """OBS-Diff's weights of ten steps, by hand."""
    weights = [peers.decreasing_weight(step, 10) for step in range(10)]
    assert weights[0] == 1.2 and weights[9] == 0.8
    assert weights[5] == pytest.approx(0.8 + 0.4 * math.log(5) / math.log(10))
    assert weights == sorted(weights, reverse=True)
    assert peers.decreasing_weight(0, 1) == 1.2


def test_grams_of_weighted_steps_are_the_weighted_sum_of_each_steps(recorded):
    pipe, calibration = recorded
    structures = discover(pipe)
    name = next(s for s in structures if s.consumers).consumers[0].module
    alone = [
        gather_grams(pipe, structures, calibration, 2, lambda step, _, only=k: step == only)
        for k in range(3)
    ]
    found = gather_grams(pipe, structures, calibration, 2, lambda step, steps: 10**step / steps)
    expected = sum(10**k / 3 * one.gram[name] for k, one in enumerate(alone))
    torch.testing.assert_close(found.gram[name], expected, rtol=1e-5, atol=1e-5)
    assert found.count[name] == pytest.approx(
        sum(10**k / 3 * o.count[name] for k, o in enumerate(alone))
    )
    assert len({one.count[name] for one in alone}) == 1 and alone[0].count[name] > 0


def test_taylor_multiplies_weights_with_the_gradient_of_the_training_loss(recorded, monkeypatch):
    """Against one backward pass through the whole model on all prompts and both timesteps."""
    monkeypatch.setattr(peers, "TIMESTEPS", 2)
    monkeypatch.setattr(peers, "THRESHOLD", 0.0)
    pipe, calibration = recorded
    found = peers.taylor(pipe, calibration, batch=2, seed=5)
    denoiser = denoiser_of(pipe)
    prepared = conditioned(pipe, calibration.embeds, calibration.noise, calibration.call)
    loss_of, z0 = objective(pipe.scheduler), calibration.z0
    noise = torch.randn(z0.shape, generator=torch.Generator().manual_seed(5))
    for timestep in loss_of.spread(2):
        times = timestep.repeat(3)
        predicted = prepared.predict(denoiser, loss_of.noised(z0, noise, times), times)
        functional.mse_loss(predicted, loss_of.target(z0, noise, times)).backward()
    for s in discover(pipe):
        expected = torch.zeros(s.units)
        for ports, axis in ((s.producers, 0), (s.consumers, 1)):
            for port in ports:
                weight = denoiser.get_submodule(port.module).weight
                lines = (weight * weight.grad).detach().abs().sum(1 - axis)
                for unit in range(s.units):
                    expected[unit] += lines[s.columns(port, torch.tensor([unit]))].sum()
        rises = expected[found[s.name].argsort()].diff()
        assert (rises >= -1e-5 * expected.max()).all()
        assert expected.max() > 1.01 * expected.min()
    denoiser.zero_grad()


def test_taylor_stops_where_the_loss_has_become_small(recorded, monkeypatch):
    monkeypatch.setattr(peers, "TIMESTEPS", 4)
    monkeypatch.setattr(peers, "THRESHOLD", 2.0)  # no loss is twice the largest
    pipe, calibration = recorded
    runs = []
    handle = denoiser_of(pipe).register_forward_hook(lambda *_: runs.append(1))
    peers.taylor(pipe, calibration, batch=3)
    handle.remove()
    assert len(runs) == 1


def test_depth_drops_the_block_that_changes_nothing_first():
    pipe = tiny("flux")
    calibration = calibrate(pipe, PROMPTS, [0, 1, 2], CALLS["flux"], batch_size=3)
    idle = pipe.transformer.single_transformer_blocks[1]
    nn.init.zeros_(idle.proj_out.weight)
    nn.init.zeros_(idle.proj_out.bias)
    calibration = calibrate(pipe, PROMPTS, [0, 1, 2], CALLS["flux"], batch_size=3)
    found = peers.depth(pipe, calibration, batch=2)
    name = "single_transformer_blocks.1."
    assert all((score == 0).all() for n, score in found.items() if n.startswith(name))
    assert all((score > 0).all() for n, score in found.items() if not n.startswith(name))
    mask, _ = make_mask(pipe, "depth", 0.05, calibration=calibration)
    assert all(kept.all() for n, kept in mask.kept.items() if not n.startswith(name))


def test_depth_compares_a_blocks_output_with_its_input(recorded):
    pipe, calibration = recorded
    found = peers.depth(pipe, calibration, batch=3)
    name = next(s.name for s in discover(pipe) if peers._block(s.name))
    block, seen = denoiser_of(pipe).get_submodule(peers._block(name)), []

    def look(_, args, kwargs, output):
        before = args[0] if args else kwargs["hidden_states"]
        after = output[1] if isinstance(output, tuple) else output
        seen.append(((after - before).norm() / before.norm()) ** 2)

    handle = block.register_forward_hook(look, with_kwargs=True)
    calibration.drawn_by(pipe, 3)
    handle.remove()
    torch.testing.assert_close(found[name][0], torch.stack(seen).mean(), rtol=1e-4, atol=0)
