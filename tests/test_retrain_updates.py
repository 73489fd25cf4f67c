"""Updates of retraining: what they add up to, in one process or two, stopped or not."""

from __future__ import annotations

import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_retrain import PROMPTS, SETTINGS, half_pruned, weights
from tiny import CALLS, tiny
from two_processes import in_two_processes

from ecodiff.config.sections import RetrainSettings
from ecodiff.models.structures import denoiser_of
from ecodiff.retrain.kinds import trainable
from ecodiff.retrain.train import retrain
from ecodiff.retrain.trajectory import read, record
from ecodiff.retrain.updates import Updates
from ecodiff.runtime.state import State


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The dense model's trajectory on four prompts, each a batch."""
    return recorded(tmp_path_factory.mktemp("flux"))


def recorded(folder):
    record(tiny("flux"), PROMPTS, [1, 2, 3, 4], CALLS["flux"], 1, folder)
    return folder


def updates_of(pipe, data, settings, parameters, held_out=1):
    batches = read([data], pipe, pipe.transformer.config.pruned["dense"])
    learned, others = batches[held_out:], batches[:held_out]
    return Updates(denoiser_of(pipe), learned, others, settings, parameters, torch.float32)


def gradients(data, settings, number=0):
    pipe = half_pruned("flux")
    if settings.checkpoint:
        pipe.transformer.enable_gradient_checkpointing()
    with trainable(pipe.transformer, settings) as parameters:
        row = updates_of(pipe, data, settings, parameters).differentiate(number)
        return row["loss"], {name: value.grad.clone() for name, value in parameters.items()}


def test_an_update_is_the_mean_of_its_batches(data):
    """Of two batches at a time, the first update is that of the first two of one at a time."""
    one = SETTINGS["full"].model_copy(update={"clip": 1e9})
    two = one.model_copy(update={"accumulate": 2})
    (first, a), (second, b) = (gradients(data, one, number) for number in (0, 1))
    loss, together = gradients(data, two)
    assert loss == pytest.approx((first + second) / 2, rel=1e-5)
    for name, value in together.items():
        torch.testing.assert_close(value, (a[name] + b[name]) / 2, rtol=1e-4, atol=1e-7)


def test_every_call_is_seen_before_any_is_seen_again(data):
    pipe = half_pruned("flux")
    with trainable(pipe.transformer, SETTINGS["light"]) as parameters:
        updates = updates_of(pipe, data, SETTINGS["light"], parameters)
        count = len(updates.places)
        seen = [updates._chosen(number)[0] for number in range(2 * count)]
    for epoch in (seen[:count], seen[count:]):
        assert len({(batch.path, call) for batch, call in epoch}) == count
    assert count == 3 * CALLS["flux"]["num_inference_steps"]
    assert seen[:count] != seen[count:]


@pytest.mark.parametrize("kind", SETTINGS)
def test_gradient_checkpointing_changes_no_gradient(kind, data):
    plain = SETTINGS[kind]
    (loss, expected), (again, found) = (
        gradients(data, plain.model_copy(update={"checkpoint": on})) for on in (False, True)
    )
    assert again == loss
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-8)


def test_gradient_checkpointing_keeps_less(data):
    """Counted in bytes that autograd saves."""
    saved = {}
    for on in (False, True):
        sizes = []

        def keep(tensor, sizes=sizes):
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            gradients(data, SETTINGS["light"].model_copy(update={"checkpoint": on}))
        saved[on] = sum(sizes)
    assert saved[True] < saved[False]


def test_what_did_best_on_held_out_prompts_is_kept(data, monkeypatch):
    """Losses as they might come: the second check is the best one."""
    losses = iter([0.5, 0.4, 0.3, 0.6, 0.35])  # of the start, then of each check
    monkeypatch.setattr(Updates, "_held_out", lambda updates: next(losses))
    pipe, path = half_pruned("flux"), []
    settings = SETTINGS["full"].model_copy(update={"steps": 4})
    apply = Updates.apply

    def watched(updates, row):
        found = apply(updates, row)
        path.append(weights(pipe))
        return found

    monkeypatch.setattr(Updates, "apply", watched)
    retrain(pipe, [data], settings)
    assert [torch.equal(weights(pipe), one) for one in path] == [False, True, False, False]


def test_a_model_that_only_gets_worse_stays_as_it_was(data, caplog):
    pipe = half_pruned("flux")
    before = weights(pipe)
    retrain(pipe, [data], RetrainSettings(kind="full", lr=1.0, steps=3, batch=1))
    assert torch.equal(weights(pipe), before)
    assert "no check was better than the pruned model, which stays as it was" in caplog.text


def test_the_average_is_the_mean_of_what_came_before(data):
    """diffusers' decay after the first updates is 2/11 and 3/12, until it reaches the setting."""
    settings = RetrainSettings(kind="light", lr=1e-3, steps=20, warmup=0, average=0.2)
    pipe, path = half_pruned("flux"), []
    with trainable(pipe.transformer, settings) as parameters:
        updates = updates_of(pipe, data, settings, parameters)
        name, value = next(iter(parameters.items()))
        expected = value.detach().clone()
        for number in range(3):
            updates.apply(updates.differentiate(number))
            path.append(value.detach().clone())
        for decay, one in zip((0.0, 2 / 11, 0.2), path, strict=True):
            expected = decay * expected + (1 - decay) * one
        average = updates.copies["average"][name]
        torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-8)
        assert not torch.equal(average, value)


needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao isn't installed")
EIGHT_BITS = RetrainSettings(kind="full", optimiser="adamw8bit", lr=1e-3, steps=2, batch=1)


def in_bfloat16(pipe):
    pipe.transformer.to(torch.bfloat16)
    return pipe


@needs_torchao
def test_eight_bits_move_bfloat16_by_what_float32_moves():
    """Fifty steps of 1e-6, each of which bfloat16 would lose; on average they are not lost."""
    denoiser = in_bfloat16(half_pruned("flux")).transformer
    with trainable(denoiser, EIGHT_BITS) as parameters:
        assert {value.dtype for value in parameters.values()} == {torch.bfloat16}
        updates = Updates(
            denoiser, [], [], EIGHT_BITS.model_copy(update={"lr": 1e-6}), parameters, torch.bfloat16
        )
        before = {name: value.detach().clone().double() for name, value in parameters.items()}
        for _ in range(50):
            for value in parameters.values():
                value.grad = torch.ones_like(value)
            updates.optimiser.step()
        moved = sum((before[n] - v.detach()).sum() for n, v in parameters.items())
        count = sum(value.numel() for value in parameters.values())
        assert moved.item() / count == pytest.approx(5e-5, rel=0.05)


@needs_torchao
def test_eight_bits_take_six_bytes_a_parameter():
    denoiser = in_bfloat16(half_pruned("flux")).transformer
    with trainable(denoiser, EIGHT_BITS) as parameters:
        updates = Updates(denoiser, [], [], EIGHT_BITS, parameters, torch.bfloat16)
        for value in parameters.values():
            value.grad = torch.ones_like(value)
        updates.optimiser.step()
        tensors = State(None, {}, parameters, updates.optimiser)._tensors()
        large = {name for name, value in parameters.items() if value.numel() % 4096 == 0}
        numbers = sum(parameters[name].numel() for name in large)
        weights_and_moments = [
            value.nbytes
            for key, value in tensors.items()
            if key.split("/")[1] in large
            and not key.startswith(("step", "best"))
            and "qmap" not in key
        ]
        gradients = sum(parameters[name].grad.nbytes for name in large)
        assert (sum(weights_and_moments) + gradients) / numbers == pytest.approx(6, abs=0.1)


STOPPED = {
    "full": SETTINGS["full"].model_copy(update={"steps": 6}),
    "average": RetrainSettings(kind="lora", rank=4, lr=1e-2, steps=6, batch=1, average=0.9),
    "8 bits": EIGHT_BITS.model_copy(update={"steps": 6}),
}
# A whole run in a process of its own, which prints as each update is differentiated.
RUN = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_retrain_updates import STOPPED, run
from ecodiff import cli
from ecodiff.retrain.updates import Updates

apply = Updates.apply

def slowly(updates, row):
    print(int(row["step"]), flush=True)
    time.sleep(float(sys.argv[5]))
    return apply(updates, row)

Updates.apply = slowly
cli.app = lambda **_: run(STOPPED[sys.argv[4]], Path(sys.argv[2]), Path(sys.argv[3]))
cli.main()
"""


def run(settings, data, folder):
    """Retrain a model and write its weights; its state is written every second update."""
    pipe = half_pruned("flux")
    if settings.optimiser == "adamw8bit":
        in_bfloat16(pipe)
    settings = settings.model_copy(update={"save_every": 2})
    found = retrain(pipe, [data], settings, folder / "state")
    save_file({"weights": weights(pipe)}, folder / "weights.safetensors")
    found.history.drop(columns="seconds").to_csv(folder / "history.csv")


def start(data, folder, settings, sleep=0.0):
    command = [sys.executable, "-c", RUN, Path(__file__).parent, data, folder, settings, str(sleep)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [pytest.param(one, marks=needs_torchao if one == "8 bits" else ()) for one in STOPPED],
)
def test_a_killed_run_goes_on_and_gives_the_same_weights_to_the_bit(data, tmp_path, settings):
    """kill -9 loses no more than to the last save, SIGTERM nothing."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir()
    stopped.mkdir()
    run(STOPPED[settings], data, whole)
    exits = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 75}
    for number, at in ((signal.SIGKILL, 3), (signal.SIGTERM, 4)):
        job = start(data, stopped, settings, sleep=0.5)
        for line in job.stdout:
            if int(line) == at:
                job.send_signal(number)
        assert job.wait() == exits[number]
    again = start(data, stopped, settings)
    assert again.stdout.readline() == "5\n"
    again.communicate()
    assert again.returncode == 0
    assert (whole / "history.csv").read_text() == (stopped / "history.csv").read_text()
    a, b = (load_file(folder / "weights.safetensors")["weights"] for folder in (whole, stopped))
    assert torch.equal(a, b)
    assert not (stopped / "state").exists()


@pytest.mark.slow
def test_two_processes_learn_what_one_does_with_the_doubled_batch(data, tmp_path):
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]);"
        "from test_retrain_updates import STOPPED, run;"
        "run(STOPPED[sys.argv[4]], Path(sys.argv[2]), Path(sys.argv[3]))"
    )
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    words = [[data, tmp_path / str(rank), "average"] for rank in range(2)]
    assert in_two_processes(script, words.__getitem__) == [0, 0]
    (tmp_path / "alone").mkdir()
    run(STOPPED["average"].model_copy(update={"accumulate": 2}), data, tmp_path / "alone")
    found = {
        name: load_file(tmp_path / name / "weights.safetensors")["weights"]
        for name in ("0", "1", "alone")
    }
    assert torch.equal(found["0"], found["1"])
    torch.testing.assert_close(found["0"], found["alone"], rtol=1e-3, atol=1e-4)
    assert not torch.equal(found["alone"], weights(half_pruned("flux")))
    losses = [pd.read_csv(tmp_path / name / "history.csv")["loss"] for name in ("0", "alone")]
    assert losses[0].tolist() == pytest.approx(losses[1].tolist(), rel=1e-3)
