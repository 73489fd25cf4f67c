"""Mask learning: exact gradients, fair means, reproducible, and never silently broken."""

import json
import logging
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from safetensors import safe_open
from tiny import CALLS, tiny
from two_processes import in_two_processes

from ecodiff.calibrate import calibrate
from ecodiff.config.sections import LearningRates, MaskSettings
from ecodiff.mask import learn
from ecodiff.mask import learner as learner_module
from ecodiff.mask.learn import COLUMNS, learn_mask
from ecodiff.mask.objective import expected_sparsity
from ecodiff.models.structures import denoiser_of, discover
from ecodiff.runtime.errors import UserError
from ecodiff.trajectory.directions import bases_of
from ecodiff.trajectory.rollout import dense_steps

PROMPTS = [f"a {c} {s}" for c in ("red", "blue") for s in ("circle", "square")]
QUICK = {"iterations": 2, "batch": 2, "noise_floor": 0.0}
CALL = {name: {**call, "num_inference_steps": 2} for name, call in CALLS.items()}


def recorded(family, prompts=PROMPTS):
    pipe = tiny(family)
    return pipe, calibrate(pipe, prompts, list(range(len(prompts))), CALL[family], batch_size=4)


@pytest.fixture(scope="module")
def flux():
    return recorded("flux")


@pytest.fixture(scope="module")
def sdxl():
    return recorded("sdxl")


def learner(given, **settings):
    pipe, calibration = given
    flat = {**QUICK, "first_logit": 3.0, **settings}
    return learner_module.Learner(pipe, calibration, MaskSettings(**flat), 0.1)


def update(made, iteration=0):
    return made.apply(made.differentiate(iteration))


def gradients(made, iteration=0):
    made.differentiate(iteration)
    return torch.cat([logits.grad.flatten() for logits in made.gates.logits.values()])


@pytest.mark.parametrize("family", ["flux", "sdxl"])
def test_every_logit_of_every_kind_gets_a_score_and_a_history(family, request):
    pipe, calibration = request.getfixturevalue(family)
    scores, history = learn_mask(pipe, calibration, MaskSettings(**QUICK), 0.1)
    assert {n: tuple(v.shape) for n, v in scores.items()} == {
        s.name: (s.units,) for s in discover(pipe, "rank")
    }
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in scores.values())
    assert any((v != 3.0).any() for v in scores.values())
    assert tuple(history.columns) == COLUMNS
    assert history["iteration"].tolist() == [0, 1]
    assert history["loss"].sub(history["distortion"] + history["regulariser"]).abs().max() < 1e-6


def test_the_weights_stay_as_they_are_and_get_no_gradients(flux):
    pipe, calibration = flux
    before = {k: v.clone() for k, v in denoiser_of(pipe).state_dict().items()}
    wanted = [p.requires_grad for p in denoiser_of(pipe).parameters()]
    learn_mask(pipe, calibration, MaskSettings(**QUICK), 0.1)
    after = denoiser_of(pipe).state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert all(p.grad is None for p in denoiser_of(pipe).parameters())
    assert [p.requires_grad for p in denoiser_of(pipe).parameters()] == wanted


def test_accumulation_is_a_mean_of_the_same_prompts(flux, monkeypatch):
    """Fault 7: the first update after one sample, and sums in the place of means."""
    monkeypatch.setattr(  # the same gates for each prompt, however prompts are batched
        learner_module.Gates, "draw", lambda gates, *_: gates.set_shared(), raising=True
    )

    def shared(gates):
        fixed = torch.Generator().manual_seed(0)
        gates._hold(
            {
                name: learn_gate(logits, torch.rand(len(logits), generator=fixed))[None]
                for name, logits in gates.logits.items()
            }
        )

    def learn_gate(logits, u):
        from ecodiff.trajectory.gates import sample_gate

        return sample_gate(logits, u, 0.0)

    monkeypatch.setattr(learner_module.Gates, "set_shared", shared, raising=False)
    at_once = gradients(learner(flux, batch=4, accumulate=1))
    in_parts = gradients(learner(flux, batch=1, accumulate=4))
    assert at_once.norm() > 0
    assert (at_once - in_parts).norm() / at_once.norm() <= 1e-4


@pytest.mark.parametrize("family", ["flux", "sdxl"])
def test_checkpointing_does_not_change_the_update(family, request):
    given = request.getfixturevalue(family)
    full = gradients(learner(given, checkpoint=False))
    ours = gradients(learner(given))
    assert (ours - full).norm() / full.norm() <= 1e-5


def test_logits_stay_fp32_in_a_bf16_model_and_nothing_decays():
    """Fault 6: logits and Adam state in bf16, and weight decay with no gradient."""
    pipe = tiny("flux").to(torch.bfloat16)
    calibration = calibrate(pipe, PROMPTS, [0, 1, 2, 3], CALL["flux"], batch_size=4)
    made = learner((pipe, calibration))
    update(made)
    for logits in made.gates.logits.values():
        assert logits.dtype == torch.float32
        assert made.optimiser.state[logits]["exp_avg"].dtype == torch.float32
    assert [group["weight_decay"] for group in made.optimiser.param_groups] == [0.0] * 3


def test_each_kind_learns_at_its_own_rate(flux):
    rates = LearningRates(heads=0.5, neurons=0.1, modulation=0.02)
    made = learner(flux, lr=rates, objective="penalty", beta=100.0)
    update(made)
    kinds = {s.name: s.kind for s in discover(flux[0], "rank")}
    for name, logits in made.gates.logits.items():  # Adam's first step is its learning rate
        moved = (logits.detach() - 3.0).abs()
        torch.testing.assert_close(
            moved, torch.full_like(moved, getattr(rates, kinds[name])), rtol=1e-3, atol=1e-4
        )


def test_every_prompt_is_seen_once_before_any_is_seen_again(flux):
    made = learner(flux, batch=1, accumulate=2)
    rows = [row for i in range(4) for batch in made._rows(i) for row in batch]
    assert sorted(rows[:4]) == sorted(rows[4:]) == [0, 1, 2, 3]
    assert rows[:4] != rows[4:]


def test_a_penalty_moves_every_kind_towards_closing(flux):
    """Fault 5: the modulation regulariser never reached the loss."""
    made = learner(flux, objective="penalty", beta=100.0, noise_floor=0.1)
    update(made)
    assert all((logits < 3.0).all() for logits in made.gates.logits.values())


# A whole run in a process of its own, which prints as each iteration ends.
RUN = """
import sys, time
import torch
sys.path.insert(0, sys.argv[1])
from test_mask_learn import LONG, recorded
from ecodiff.cli import main
from ecodiff.mask import learn
from ecodiff.mask.learner import Learner
from ecodiff import cli

apply = Learner.apply

def slowly(made, row):
    print(row["iteration"], flush=True)
    time.sleep(float(sys.argv[3]))
    return apply(made, row)

def run(**_):
    scores, _ = learn.learn_mask(*recorded("flux"), LONG, 0.1, sys.argv[2] + "/state.safetensors")
    torch.save(scores, sys.argv[2] + "/scores.pt")

Learner.apply = slowly
cli.app = run
main()
"""
LONG = MaskSettings(iterations=7, batch=2, save_every=2)


def start(folder, sleep=0.0):
    command = [sys.executable, "-c", RUN, Path(__file__).parent, folder, str(sleep)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "exit_code", "first_again"),
    [(signal.SIGKILL, -signal.SIGKILL, 4), (signal.SIGTERM, 75, 6)],
    ids=["kill -9 loses no more than to the last save", "SIGTERM loses nothing"],
)
def test_a_killed_job_goes_on_and_gives_the_same_mask_to_the_bit(
    flux, tmp_path, number, exit_code, first_again
):
    job = start(tmp_path, sleep=0.5)
    for line in job.stdout:
        if int(line) == 5:  # of iteration 5 the gradients are there and the update is not
            job.send_signal(number)
    assert job.wait() == exit_code
    again = start(tmp_path)
    assert int(again.stdout.readline()) == first_again
    again.communicate()
    assert again.returncode == 0
    whole, _ = learn_mask(*flux, LONG, 0.1)
    resumed = torch.load(tmp_path / "scores.pt", weights_only=True)
    assert all(torch.equal(resumed[name], scores) for name, scores in whole.items())
    assert not (tmp_path / "state.safetensors").exists()


# Of so few prompts most directions of modulation have no gradient but rounding errors, which Adam
# enlarges.
SHARED = MaskSettings(iterations=3, batch=1, accumulate=2, modulation="channels")


@pytest.mark.slow
def test_two_processes_learn_what_one_does_with_the_doubled_batch(flux, tmp_path):
    script = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]);"
        "from test_mask_learn import SHARED, recorded; from ecodiff.mask.learn import learn_mask;"
        "scores, history = learn_mask(*recorded('flux'), SHARED, 0.1, sys.argv[2] + '/state');"
        "history.to_csv(sys.argv[3] + '.csv'); torch.save(scores, sys.argv[3])"
    )
    assert in_two_processes(script, lambda rank: [tmp_path, tmp_path / f"{rank}.pt"]) == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    doubled = SHARED.model_copy(update={"batch": 2})
    alone, history = learn_mask(*flux, doubled, 0.1)
    for name, scores in alone.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], scores, rtol=1e-4, atol=1e-4)
    assert not torch.equal(first[name], torch.full_like(scores, 3.0))
    shared = pd.read_csv(tmp_path / "0.pt.csv")
    assert shared["distortion"].tolist() == pytest.approx(history["distortion"].tolist(), rel=1e-4)


def test_two_runs_give_the_same_mask_to_the_bit(flux):
    first, second = (learn_mask(*flux, MaskSettings(**QUICK), 0.1)[0] for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_learning_rates_rise_in_the_warm_up(flux):
    made = learner(flux, lr_warmup=2, lr={"heads": 0.4, "neurons": 0.2, "modulation": 0.1})
    rates = []
    for iteration in range(3):
        update(made, iteration)
        rates.append([group["lr"] for group in made.optimiser.param_groups])
    assert rates == [[0.2, 0.1, 0.05], [0.4, 0.2, 0.1], [0.4, 0.2, 0.1]]


def test_learning_stops_when_the_ranking_no_longer_changes(flux):
    settings = {"iterations": 9, "batch": 1, "patience": 2, "first_logit": 3.0, "warmup": 0.5}
    still = MaskSettings(**settings, lr={"heads": 1e-9, "neurons": 1e-9, "modulation": 1e-9})
    _, history = learn_mask(*flux, still, 0.1)
    assert len(history) == 5  # not before the target has risen to the end
    assert history["changed"].eq(0).all()
    moving = {**settings, "iterations": 4, "lr": {"heads": 1.0, "neurons": 1.0, "modulation": 1.0}}
    _, restless = learn_mask(*flux, MaskSettings(**moving), 0.1)
    assert len(restless) == 4 and restless["changed"].max() > 0.01
    _, history = learn_mask(*flux, still.model_copy(update={"objective": "penalty"}), 0.1)
    assert len(history) == 2  # a penalty aims at no target, so there is none to wait for


def test_a_kind_that_weighs_nothing_is_not_pulled(flux):
    weights = {"heads": 0.0, "neurons": 1.0, "modulation": 2.0}
    made = learner(flux, objective="penalty", beta=1e3, weights=weights)
    removed = expected_sparsity(made.gates, made.total)
    made.objective.regulariser(removed, 1.0).backward()
    kinds = {s.name: (s.kind, s.unit_parameters) for s in made.gates.structures}
    pulls = {}
    for name, logits in made.gates.logits.items():
        kind, parameters = kinds[name]
        pulls[kind] = (logits.grad / parameters).unique().item()
    assert pulls["heads"] == 0
    assert pulls["modulation"] == pytest.approx(2 * pulls["neurons"])


def test_the_per_step_loss_compares_predictions_on_the_dense_models_own_latents(flux):
    """By hand: one batch, gates drawn anew, each step's relative error, their mean."""
    pipe, calibration = flux
    made = learner(flux, loss="per-step", objective="penalty", beta=0.0, batch=4)
    row = made.differentiate(0)
    embeds, noise, _ = calibration.batch(made._rows(0)[0])
    steps = dense_steps(pipe, embeds, noise, calibration.call)
    structures = discover(pipe, "rank")
    bases = bases_of(pipe.transformer, structures, calibration.moments)
    gates = learner_module.Gates(structures, 3.0, 0.0, calibration.means, bases)
    gates.draw(4, torch.Generator().manual_seed(learner_module._mix(0, 1, 0)))
    with torch.no_grad(), gates.attached(denoiser_of(pipe)):
        errors = [
            (pipe.transformer(*s.args, **s.kwargs)[0] - s.prediction).square().mean()
            / s.prediction.var()
            for s in steps
        ]
    assert len(errors) == CALL["flux"]["num_inference_steps"]
    assert row["distortion"] == pytest.approx(sum(errors).item() / len(errors), rel=1e-5)
    assert any(logits.grad.abs().sum() > 0 for logits in made.gates.logits.values())


@pytest.mark.parametrize(("budget", "kept"), [(1, 0), (100_000, 2)])
def test_the_activation_budget_keeps_what_fits(sdxl, budget, kept):
    made = learner(sdxl, keep_steps="auto", memory_mb=budget)
    reference = gradients(learner(sdxl))
    assert torch.equal(gradients(made), reference)
    assert made.keep_steps == kept


def test_the_state_of_another_run_is_not_continued(flux, tmp_path, caplog):
    pipe, calibration = flux
    scratch = tmp_path / "state.safetensors"
    made = learner(flux)
    state = learn.State(scratch, {"other": 1}, made.gates.logits, made.optimiser)
    state.write({})
    with caplog.at_level(logging.WARNING):
        learn_mask(pipe, calibration, MaskSettings(**QUICK), 0.1, scratch)
    assert "another run" in caplog.text


def test_a_loss_that_is_not_finite_stops_names_prompts_and_keeps_the_state(flux, tmp_path):
    pipe, _ = flux
    broken = calibrate(pipe, PROMPTS, [0, 1, 2, 3], CALL["flux"], batch_size=4)
    order = learner(flux)._rows(1)[0]
    broken.embeds["prompt_embeds"][order[0]] = torch.nan
    scratch = tmp_path / "state.safetensors"
    with pytest.raises(UserError, match=rf"update 1: .*{PROMPTS[order[0]]}"):
        learn_mask(pipe, broken, MaskSettings(**QUICK, first_logit=3.0), 0.1, scratch)
    with safe_open(scratch, framework="pt") as file:
        history = json.loads(file.metadata()["ecodiff"])["info"]["history"]
        assert len(history) == 1
        assert all(file.get_tensor(key).isfinite().all() for key in file.keys())  # noqa: SIM118


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"checkpoint": False}, "checkpoint: true"),
        ({"keep_steps": 1}, "keep_steps: 0"),
        ({"batch": 4, "accumulate": 1}, "batch: 2 and accumulate: 2"),
        ({"batch": 1}, "bfloat16"),
    ],
)
def test_a_batch_that_does_not_fit_comes_with_what_would(flux, monkeypatch, settings, advice):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(learner_module.Learner, "differentiate", fail)
    with pytest.raises(UserError, match=f"out of memory; .*{advice}"):
        learn_mask(*flux, MaskSettings(**{**QUICK, **settings}), 0.1)


def test_tensorboard_is_used_where_it_is_installed(flux, tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder):
            self.folder = folder

        def add_scalar(self, name, value, step):
            written.append((self.folder.name, name, step))

        def close(self):
            written.append("closed")

    module = SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    learn_mask(*flux, MaskSettings(**QUICK), 0.1, tmp_path / "state.safetensors")
    assert ("state.tensorboard", "distortion", 1) in written
    assert written[-1] == "closed"


def test_an_impossible_budget_is_refused_before_learning(flux):
    pipe, calibration = flux
    with pytest.raises(UserError, match="the range is 0 to"):
        learn_mask(pipe, calibration, MaskSettings(**QUICK), 0.99)


def test_a_stale_calibration_is_refused(flux):
    _, calibration = flux
    with pytest.raises(UserError, match="another model"):
        learn_mask(tiny("flux", seed=1), calibration, MaskSettings(**QUICK), 0.1)


def test_no_prompt_is_twice_in_a_batch(flux):
    with pytest.raises(UserError, match=r"mask\.batch: 5 prompts .* there are 4"):
        learn_mask(*flux, MaskSettings(iterations=1, batch=5), 0.1)
    with pytest.raises(UserError, match=r"mask\.batch: 3 prompts .* there are 2"):
        learner(flux, batch=3, prompts=2)
