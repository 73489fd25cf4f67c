"""Second moments: exact, of one model, and within the memory that is allowed."""

import copy
import json
import weakref
from pathlib import Path

import diffusers
import pytest
import torch
from accelerate import init_empty_weights
from tiny import CALLS, calibrated, tiny

import ecodiff
from ecodiff.calibrate import Calibration, calibrate
from ecodiff.calibrate import grams as grams_module
from ecodiff.calibrate.grams import Grams, gather_grams, in_parts, store_grams
from ecodiff.config.sections import MaskSettings
from ecodiff.evaluate.memory import peak_memory, tensors_of
from ecodiff.mask.methods import Request, obs, wanda
from ecodiff.models.structures import denoiser_of, discover
from ecodiff.runtime.errors import UserError

PROMPTS = ["a red circle", "a blue square", "a green triangle"]
SEEDS = [11, 12, 13]
ROOM = 200_000  # bytes: some consumers of the tiny models, not all


@pytest.fixture(params=["sdxl", "flux"])
def recorded(request):
    pipe = tiny(request.param)
    return pipe, calibrate(pipe, PROMPTS, SEEDS, CALLS[request.param], batch_size=2)


@pytest.fixture
def short_of_memory(monkeypatch):
    monkeypatch.setattr(grams_module, "free_memory", lambda device: ROOM / grams_module.SHARE)


def consumers(structures):
    return {port.module for s in structures for port in s.consumers}


def test_grams_hold_every_input_of_every_step(recorded):
    pipe, calibration = recorded
    structures = discover(pipe)
    grams = gather_grams(pipe, structures, calibration, batch_size=2)
    names = consumers(structures)
    assert set(grams.gram) == names
    for module in (min(names), max(names)):
        inputs = []
        hook = (
            denoiser_of(pipe)
            .get_submodule(module)
            .register_forward_pre_hook(
                lambda _, args, inputs=inputs: inputs.append(args[0].flatten(0, -2).double())
            )
        )
        pipe(**calibration.embeds, latents=calibration.noise, **calibration.call)
        hook.remove()
        x = torch.cat(inputs)
        assert grams.count[module] == len(x)
        torch.testing.assert_close(grams.total[module], x.sum(0), rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(grams.gram[module], x.T @ x, rtol=1e-4, atol=1e-3)


def test_sums_of_half_precision_activations_do_not_overflow():
    """A product of 300 x 300 is beyond float16, whose largest number is 65,504."""
    pipe = tiny("flux").to(torch.float16)
    calibration = calibrate(pipe, PROMPTS, SEEDS, CALLS["flux"], batch_size=3)
    name = "transformer_blocks.0.ff.net.2"
    linear = denoiser_of(pipe).get_submodule(name)
    hook = linear.register_forward_pre_hook(lambda _, args: (torch.full_like(args[0], 300),))
    grams = gather_grams(pipe, discover(pipe), calibration, batch_size=3)
    hook.remove()
    assert grams.gram[name].dtype == torch.float64
    expected = torch.full_like(grams.gram[name], 300**2 * grams.count[name])
    torch.testing.assert_close(grams.gram[name], expected)


def test_activations_that_are_not_finite_are_named():
    pipe = tiny("flux")
    calibration = calibrate(pipe, PROMPTS, SEEDS, CALLS["flux"], batch_size=3)
    linear = denoiser_of(pipe).get_submodule("transformer_blocks.0.ff.net.2")
    hook = linear.register_forward_pre_hook(lambda _, args: (args[0] * torch.inf,))
    with pytest.raises(UserError, match=r"inputs of \S+ are not finite; it is float32 already"):
        gather_grams(pipe, discover(pipe), calibration, batch_size=3)
    hook.remove()


def test_grams_refuse_a_calibration_of_another_model():
    pipe = tiny("flux")
    calibration = calibrate(pipe, PROMPTS, SEEDS, CALLS["flux"], batch_size=3)
    with pytest.raises(UserError, match="another model"):
        gather_grams(tiny("flux", seed=1), discover(pipe), calibration, batch_size=3)


def test_a_record_serves_the_same_weights_in_another_dtype(recorded, tmp_path):
    pipe, calibration = recorded
    half = copy.deepcopy(pipe).to(torch.bfloat16)
    grams = gather_grams(half, discover(half), calibration, batch_size=3)
    dense = gather_grams(pipe, discover(pipe), calibration, batch_size=3)
    for name, gram in dense.gram.items():
        assert (grams.gram[name] - gram).norm() < 0.1 * gram.norm()


def test_parts_hold_each_consumer_once_and_fit(recorded, short_of_memory):
    pipe, _ = recorded
    parts = in_parts(pipe, discover(pipe))
    assert len(parts) > 2
    found = [name for part in parts for name in consumers(part)]
    assert sorted(found) == sorted(consumers(discover(pipe)))
    assert {s.name for part in parts for s in part} == {s.name for s in discover(pipe)}
    for part in parts:
        sizes = [denoiser_of(pipe).get_submodule(n).weight.shape[1] for n in consumers(part)]
        assert sum(8 * size**2 for size in sizes) <= ROOM or len(sizes) == 1


def test_stored_in_parts_they_are_those_gathered_at_once(recorded, short_of_memory, tmp_path):
    pipe, calibration = recorded
    store_grams(pipe, calibration, 3, tmp_path / "grams")
    assert len(list((tmp_path / "grams").glob("*.safetensors"))) > 2
    found = Grams.load(tmp_path / "grams")
    expected = gather_grams(pipe, discover(pipe), calibration, 3)
    assert found.fingerprint == calibration.fingerprint
    assert (found.count, found.prompts, found.seeds) == (expected.count, PROMPTS, SEEDS)
    assert found.gram.keys() == expected.gram.keys() == found.total.keys()
    for name, gram in expected.gram.items():
        assert torch.equal(found.gram[name], gram) and gram.any()
        assert torch.equal(found.total[name], expected.total[name])


def test_a_killed_job_goes_on_after_its_last_part(short_of_memory, tmp_path, monkeypatch):
    pipe, calibration = calibrated("flux")
    gathered, real = [], gather_grams

    def killed(*args):
        if len(gathered) == 2:
            raise KeyboardInterrupt
        gathered.append(args[1])
        return real(*args)

    monkeypatch.setattr(grams_module, "gather_grams", killed)
    with pytest.raises(KeyboardInterrupt):
        store_grams(pipe, calibration, 2, tmp_path / "grams")
    assert not (tmp_path / "grams").exists()
    again = []
    monkeypatch.setattr(grams_module, "gather_grams", lambda *args: again.append(1) or real(*args))
    store_grams(pipe, calibration, 2, tmp_path / "grams")
    assert len(again) == len(in_parts(pipe, discover(pipe))) - 2
    assert [path.name for path in tmp_path.iterdir()] == ["grams"]


def test_gathering_takes_the_memory_that_it_may(tmp_path, monkeypatch):
    """Counted, tensor by tensor: beside what the model takes as it runs, a part's matrices and the
    product of one layer's inputs."""
    pipe, calibration = calibrated("flux")
    held = tensors_of(*(part for part in pipe.components.values() if hasattr(part, "parameters")))
    sizes = [denoiser_of(pipe).get_submodule(n).weight.shape[1] for n in consumers(discover(pipe))]

    def peak(work):
        return peak_memory(work, held, "cpu")

    plain = peak(lambda: calibration.drawn_by(pipe, 2))
    at_once = peak(lambda: store_grams(pipe, calibration, 2, tmp_path / "a"))
    monkeypatch.setattr(grams_module, "free_memory", lambda device: ROOM / grams_module.SHARE)
    in_turn = peak(lambda: store_grams(pipe, calibration, 2, tmp_path / "b"))
    rows = 2 * 2 * 80 * max(sizes) * 4  # of two prompts, as float32
    slack = (rows + 4 * max(sizes) ** 2) / 1e6
    assert at_once > plain + 8e-6 * sum(size**2 for size in sizes)
    assert in_turn < plain + ROOM / 1e6 + slack


def test_a_prune_job_holds_one_matrix_at_a_time(tmp_path, monkeypatch):
    pipe, calibration = calibrated("sdxl")
    store_grams(pipe, calibration, 2, tmp_path / "grams")
    read, get = [], grams_module._Stored.__getitem__

    def watched(self, name):
        assert not any(reference() is not None for reference in read)
        found = get(self, name)
        read.append(weakref.ref(found))
        return found

    monkeypatch.setattr(grams_module._Stored, "__getitem__", watched)
    kept = {s.name: torch.arange(s.units) % 2 == 0 for s in discover(pipe)}
    ecodiff.prune(pipe, kept, Grams.load(tmp_path / "grams"))
    assert len(read) == len(consumers(discover(tiny("sdxl"))))


@pytest.mark.parametrize("method", [wanda, obs])
def test_scores_from_parts_are_those_of_all_at_once(method, recorded, monkeypatch):
    pipe, calibration = recorded
    request = Request(0, MaskSettings(), calibration)
    expected = method(pipe, request)
    monkeypatch.setattr(grams_module, "free_memory", lambda device: ROOM / grams_module.SHARE)
    assert len(in_parts(pipe, discover(pipe))) > 2
    found = method(pipe, request)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], score) for name, score in expected.items())


def test_flux_is_gathered_in_two_parts_of_forty_gigabytes():
    facts = json.loads((Path(__file__).parent / "configs/flux.json").read_text())
    with init_empty_weights():
        denoiser = getattr(diffusers, facts["class"])(**facts["config"])
    parts = in_parts(denoiser, discover(denoiser), memory_mb=40_000)
    bytes_of = [
        sum(4 * denoiser.get_submodule(name).weight.shape[1] ** 2 for name in consumers(part))
        for part in parts
    ]
    assert len(parts) == 2 and max(bytes_of) <= 40e9
    assert sum(bytes_of) == pytest.approx(60.2e9, rel=0.01)


@pytest.mark.parametrize("made", ["nothing", "an empty folder", "a calibration"])
def test_what_are_no_stored_moments_is_named(made, tmp_path):
    folder = tmp_path / "grams"
    if made != "nothing":
        folder.mkdir()
    if made == "a calibration":
        calibrated("flux")[1].save(folder / "0.safetensors")
    with pytest.raises(UserError, match="grams"):
        Grams.load(folder)


def test_a_part_is_no_calibration(tmp_path):
    pipe, calibration = calibrated("flux")
    gather_grams(pipe, discover(pipe), calibration, 2).save(tmp_path / "file")
    with pytest.raises(UserError, match="is not a calibration file"):
        Calibration.load(tmp_path / "file")
