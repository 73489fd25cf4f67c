"""What is kept of the dense model's trajectory: every call, to the bit."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from safetensors import safe_open
from tiny import CALLS, tiny
from workflow_runs import bytes_of

import ecodiff
from ecodiff.models.pipelines import encode, fingerprint, starting_noise
from ecodiff.models.structures import denoiser_of, discover
from ecodiff.retrain import trajectory
from ecodiff.retrain.trajectory import read, record
from ecodiff.runtime.errors import UserError
from ecodiff.trajectory.rollout import dense_steps, prediction_of

PROMPTS, SEEDS = ["a red ring", "a blue square", "a star"], [3, 4, 5]


def recorded(pipe, family, folder, batch=2):
    record(pipe, PROMPTS, SEEDS, CALLS[family], batch, folder)
    return read([folder], pipe, fingerprint(pipe))


@pytest.mark.parametrize("family", CALLS)
def test_the_dense_model_predicts_again_what_was_recorded(family, tmp_path):
    pipe = tiny(family)
    batches = recorded(pipe, family, tmp_path)
    assert [len(batch.prompts) for batch in batches] == [2, 1]
    denoiser = denoiser_of(pipe)
    for batch in batches:
        for number in range(batch.steps):
            step = batch.step(number, denoiser.device, denoiser.dtype)
            with torch.no_grad():
                output = denoiser(*step.args, **step.kwargs)
            assert torch.equal(prediction_of(output), step.prediction)


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_where_a_pruned_model_leads_the_dense_one_answers(family, tmp_path):
    """The latents are those of the pruned model's own loop, the predictions the dense model's."""
    pipe, pruned = tiny(family), tiny(family)
    ecodiff.prune(pruned, {s.name: torch.arange(s.units) % 2 == 0 for s in discover(pruned)})
    record(pipe, PROMPTS, SEEDS, CALLS[family], 3, tmp_path, leader=pruned)
    (batch,) = read([tmp_path], pipe, fingerprint(pipe))
    embeds = encode(pruned, PROMPTS, CALLS[family])
    met = dense_steps(pruned, embeds, starting_noise(pruned, SEEDS, CALLS[family]), CALLS[family])
    denoiser = denoiser_of(pipe)
    for number, own in enumerate(met):
        step = batch.step(number, denoiser.device, denoiser.dtype)
        for one, other in zip(
            (*step.args, *step.kwargs.values()), (*own.args, *own.kwargs.values()), strict=True
        ):
            assert not isinstance(one, torch.Tensor) or torch.equal(one, other)
        with torch.no_grad():
            assert torch.equal(prediction_of(denoiser(*step.args, **step.kwargs)), step.prediction)
        assert not torch.allclose(step.prediction, own.prediction, atol=1e-4)


def test_a_leader_pruned_from_another_model_is_refused(tmp_path):
    pruned = tiny("flux", seed=1)
    ecodiff.prune(pruned, {s.name: torch.arange(s.units) % 2 == 0 for s in discover(pruned)})
    with pytest.raises(UserError, match="pruned"):
        record(tiny("flux"), PROMPTS, SEEDS, CALLS["flux"], 3, tmp_path, leader=pruned)


@pytest.fixture
def pictures(tmp_path):
    """A picture for each prompt."""
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{number}.png" for number in range(len(PROMPTS))]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    return [*map(str, paths)]


def latents_of(pipe, paths, scale, shift):
    """diffusers' own way to latents."""
    pixels = pipe.image_processor.preprocess([Image.open(path) for path in paths])
    return (pipe.vae.encode(pixels).latent_dist.mode() - shift) * scale


def test_pictures_are_noised_as_far_as_each_step_of_flow_matching(pictures, tmp_path):
    pipe, call, out = tiny("flux"), CALLS["flux"], tmp_path / "out"
    out.mkdir()
    record(pipe, PROMPTS, SEEDS, call, 3, out, pictures=pictures)
    (batch,) = read([out], pipe, fingerprint(pipe))
    config = pipe.vae.config
    z0 = latents_of(pipe, pictures, config.scaling_factor, config.shift_factor or 0.0)
    z0 = pipe._pack_latents(z0, *z0.shape)
    noise = starting_noise(pipe, SEEDS, call)
    assert batch.steps == call["num_inference_steps"]
    for number in range(batch.steps):
        step = batch.step(number, z0.device, z0.dtype)
        sigma = pipe.scheduler.sigmas[number]
        expected = (1 - sigma) * z0 + sigma * noise
        torch.testing.assert_close(step.kwargs["hidden_states"], expected, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            assert torch.equal(prediction_of(pipe.transformer(**step.kwargs)), step.prediction)


def test_pictures_are_noised_as_the_scheduler_does_it_in_both_branches(pictures, tmp_path):
    pipe, call, out = tiny("sdxl"), CALLS["sdxl"], tmp_path / "out"
    out.mkdir()
    record(pipe, PROMPTS, SEEDS, call, 3, out, pictures=pictures)
    (batch,) = read([out], pipe, fingerprint(pipe))
    z0 = latents_of(pipe, pictures, pipe.vae.config.scaling_factor, 0.0)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    noise = starting_noise(pipe, SEEDS, call)
    for number, timestep in enumerate(pipe.scheduler.timesteps):
        step = batch.step(number, z0.device, z0.dtype)
        times = timestep.long().repeat(3)
        expected = scheduler.add_noise(z0, noise, times).repeat(2, 1, 1, 1)
        torch.testing.assert_close(step.args[0], expected, rtol=1e-4, atol=1e-5)


def test_pictures_that_cannot_be_read_are_counted_before_anything_is_drawn(pictures, tmp_path):
    for path in pictures[1:]:
        Path(path).write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"2 of 3 pictures cannot be read: '1.png', '2.png'; "):
        record(tiny("flux"), PROMPTS, SEEDS, CALLS["flux"], 1, tmp_path / "out", pictures=pictures)
    assert not (tmp_path / "out").exists()


class Killed(BaseException):
    """As a process ends that is killed: nothing catches it."""


@pytest.mark.parametrize("change", [None, "call", "leader", "picture"])
def test_a_killed_recording_goes_on_after_its_last_whole_batch(
    change, pictures, tmp_path, monkeypatch
):
    pipe, leader, call = tiny("flux"), tiny("flux"), dict(CALLS["flux"])
    ecodiff.prune(leader, {s.name: torch.arange(s.units) % 2 == 0 for s in discover(leader)})
    met = {"pictures": pictures} if change == "picture" else {"leader": leader}
    asked, dense = [], trajectory.dense_steps

    def counted(*words):
        asked.append(1)
        if len(asked) == 2:
            raise Killed
        return dense(*words)

    monkeypatch.setattr(trajectory, "dense_steps", counted)
    with pytest.raises(Killed):
        record(pipe, PROMPTS, SEEDS, call, 1, tmp_path / "shard", **met)
    assert not (tmp_path / "shard").exists()
    if change == "call":
        call["num_inference_steps"] += 1
    elif change == "leader":
        met = {}
    elif change == "picture":
        Image.new("RGB", (64, 64)).save(pictures[0])
    record(pipe, PROMPTS, SEEDS, call, 1, tmp_path / "shard", **met)
    assert len(asked) - 2 == (3 if change else 2)  # what was made of something else is not taken
    record(pipe, PROMPTS, SEEDS, call, 1, tmp_path / "whole", **met)
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert bytes_of(tmp_path / "shard" / file.name) == bytes_of(file)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_both_branches_of_guidance_are_there(tmp_path):
    pipe = tiny("sdxl")
    first, _ = recorded(pipe, "sdxl", tmp_path)
    step = first.step(0, torch.device("cpu"), torch.float32)
    assert len(step.prediction) == 2 * 2
    texts = step.kwargs["encoder_hidden_states"]
    assert not torch.equal(texts[:2], texts[2:])


def test_what_all_steps_share_is_stored_once(tmp_path):
    pipe = tiny("flux")
    first, _ = recorded(pipe, "flux", tmp_path)
    with safe_open(first.path, framework="pt") as file:
        keys = [key.split(".")[1] for key in file.keys() if key != "prediction"]  # noqa: SIM118
    copies = sorted(Counter(keys).values())
    assert copies[-2:] == [first.steps] * 2  # latents and timesteps
    assert copies.count(1) >= 3  # two embeddings, positions


def test_a_file_of_another_model_is_refused(tmp_path):
    recorded(tiny("flux"), "flux", tmp_path)
    other = tiny("flux", seed=1)
    with pytest.raises(UserError, match=r"00000\.safetensors: was made of another model"):
        read([tmp_path], other, fingerprint(other))


@pytest.mark.parametrize("content", [b"", b"cut"])
def test_a_truncated_file_is_named(tmp_path, content):
    pipe = tiny("flux")
    (tmp_path / "00000.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"00000\.safetensors: truncated"):
        read([tmp_path], pipe, fingerprint(pipe))


def test_an_empty_folder_is_named(tmp_path):
    pipe = tiny("flux")
    with pytest.raises(UserError, match="holds no trajectory"):
        read([tmp_path], pipe, fingerprint(pipe))
