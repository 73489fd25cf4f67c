"""Masks as files and as the public verbs make them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import CALLS, calibrated, tiny

from ecodiff.calibrate import calibrate
from ecodiff.config.methods import METHODS, Method
from ecodiff.config.sections import MaskSettings
from ecodiff.mask import Mask, learn_mask, make_mask, methods, score
from ecodiff.models.pruned import Pruned
from ecodiff.models.structures import count_parameters, denoiser_of, discover, modulation_of
from ecodiff.prune.cut import prune
from ecodiff.runtime.errors import UserError

QUICK = MaskSettings(iterations=1, batch=2)


@pytest.fixture(scope="module")
def pipe():
    return tiny("flux")


def removed(pipe, mask):
    """Sparsity counted from the kept units alone."""
    structures = discover(pipe, modulation_of(mask.kept))
    gone = sum(s.removed(int((~mask.kept[s.name]).sum())) for s in structures)
    return gone / count_parameters(pipe.transformer)


@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_a_mask_records_its_exact_sparsity(pipe, method):
    """Fault 20: density logged as sparsity."""
    mask, history = make_mask(pipe, method, 0.2)
    assert mask.info["sparsity"] == pytest.approx(removed(pipe, mask))
    assert 0.2 <= mask.info["sparsity"] < 0.21
    assert (mask.info["method"], mask.info["target"]) == (method, 0.2)
    assert history.empty


def test_a_saved_mask_comes_back_whole(pipe, tmp_path):
    mask, _ = make_mask(pipe, "random", 0.2)
    mask.save(tmp_path / "mask.safetensors")
    loaded = Mask.load(tmp_path / "mask.safetensors")
    assert loaded.info == mask.info
    for name, value in mask.scores.items():
        assert torch.equal(loaded.scores[name], value)
        assert torch.equal(loaded.kept[name], mask.kept[name])
        assert loaded.kept[name].dtype == torch.bool
    loaded.check(pipe)


def test_a_mask_of_another_model_is_refused(pipe):
    mask, _ = make_mask(pipe, "random", 0.2)
    with pytest.raises(UserError, match="another model"):
        mask.check(tiny("sdxl"))


def test_a_mask_of_another_model_of_the_same_shapes_is_refused(pipe, tmp_path):
    made, _ = make_mask(tiny("flux", seed=1), "random", 0.2)
    made.save(tmp_path / "mask.safetensors")
    mask = Mask.load(tmp_path / "mask.safetensors")
    for use in (mask.check, lambda pipe: mask.at(pipe, 0.1), lambda pipe: prune(pipe, mask)):
        with pytest.raises(UserError, match=r"mask\.safetensors: .* another model"):
            use(pipe)


def test_a_mask_serves_the_same_weights_in_another_dtype(pipe):
    mask, _ = make_mask(pipe, "random", 0.2)
    half = tiny("flux").to(torch.bfloat16)
    prune(half, mask)
    assert isinstance(denoiser_of(half), Pruned)


def test_a_mask_serves_another_scheduler(pipe):
    mask, _ = make_mask(pipe, "random", 0.2)
    other = tiny("flux")
    other.scheduler.register_to_config(shift=2.0)
    mask.check(other)


def test_a_mask_of_an_older_version_is_refused(tmp_path):
    path = tmp_path / "mask.safetensors"
    save_file({"scores/a.heads": torch.zeros(2)}, path, metadata={"ecodiff": "{}"})
    with pytest.raises(UserError, match=r"mask\.safetensors: was made by an older ecodiff"):
        Mask.load(path)


@pytest.mark.parametrize("method", ["magnitude", "ecodiff"])
def test_a_calibration_of_another_model_is_refused(pipe, method):
    other = calibrate(tiny("flux", seed=1), ["a ring", "a box"], [0, 1], CALLS["flux"], 2)
    with pytest.raises(UserError, match="calibration: was made of another model"):
        make_mask(pipe, method, 0.1, calibration=other, settings=QUICK)


@pytest.mark.parametrize("content", [None, b"", b"a pickle, perhaps"])
def test_a_broken_file_is_named(tmp_path, content):
    path = tmp_path / "mask.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"mask\.safetensors"):
        Mask.load(path)


def test_the_whole_verb_calibrates_learns_and_selects(pipe, monkeypatch):
    mask = learn_mask(
        pipe, ["a red circle", "a blue square"], 0.1, call=CALLS["flux"], settings=QUICK
    )
    assert 0.1 <= mask.info["sparsity"] == pytest.approx(removed(pipe, mask))
    assert mask.info["seeds"] == [0, 1]


def test_the_random_seed_reaches_the_scores(pipe):
    first, second = (score(pipe, "random", seed=seed) for seed in (0, 1))
    assert any(not torch.equal(first[name], second[name]) for name in first)


def first_go(pipe, request):
    return {s.name: torch.arange(s.units).float() for s in discover(pipe)}


OWN = Method(
    name="first-go",
    title="First go",
    function=f"{__name__}:first_go",
    score="a unit's place",
    source="",
    looks_at="nothing",
    colours=("#000000", "#111111"),
)


def test_a_method_of_ones_own_needs_a_function_and_an_entry(pipe, monkeypatch):
    monkeypatch.setitem(METHODS, OWN.name, OWN)
    mask, _ = make_mask(pipe, "first-go", 0.01)
    assert all(kept.tolist() == sorted(kept.tolist()) for kept in mask.kept.values())


def test_a_method_may_rank_within_structures(pipe, monkeypatch):
    monkeypatch.setitem(METHODS, OWN.name, replace(OWN, ranks="structure"))
    for name, values in score(pipe, OWN.name).items():
        ranks = (torch.arange(len(values)) + 0.5) / len(values)
        torch.testing.assert_close(values, ranks, msg=name)


def test_an_unknown_method_lists_the_known_ones(pipe):
    with pytest.raises(UserError, match=r"ecodiff, sensitivity, .*, random"):
        score(pipe, "ecodif")


def test_learning_needs_a_calibration_and_a_target(pipe):
    with pytest.raises(UserError, match="calibration"):
        score(pipe, "ecodiff")
    with pytest.raises(UserError, match="sparsity"):
        score(pipe, "ecodiff", calibration=calibrate(pipe, ["a ring"], [0], CALLS["flux"], 1))


def test_an_unreachable_sparsity_fails_before_any_learning(pipe, monkeypatch):
    monkeypatch.setattr(methods, "learned", lambda *_: pytest.fail("learned"))
    with pytest.raises(UserError, match="the range is"):
        make_mask(pipe, "ecodiff", 0.999)


@pytest.fixture
def untouched(pipe, monkeypatch):
    """A pipeline that must not run."""
    monkeypatch.setattr(pipe.transformer, "forward", lambda *_, **__: pytest.fail("was run"))
    return pipe


def test_a_text_is_one_prompt(pipe):
    alone = QUICK.model_copy(update={"batch": 1})
    mask = learn_mask(pipe, "a red ring", 0.1, call=CALLS["flux"], settings=alone)
    assert mask.info["seeds"] == [0]


def test_settings_may_be_a_mapping(untouched):
    settings = {"objective": "budget", "seed": 3, "min_units": 1}
    mask, _ = make_mask(untouched, "random", 0.1, settings=settings)
    assert mask.info["settings"]["seed"] == 3
    assert all(kept.any() for kept in mask.kept.values())
    with pytest.raises(UserError, match=r"^iteration: unknown key; did you mean iterations"):
        learn_mask(untouched, ["a"], settings={"iteration": 2})
    with pytest.raises(UserError, match=r"^batch: should be a valid integer"):
        make_mask(untouched, "random", 0.1, settings={"batch": "two"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "0 prompts need as many seeds"),
        ({"prompts": ["a", None]}, "prompt 1 is None, must be a text"),
        ({"prompts": ["a", 3]}, "prompt 1 is 3, must be a text"),
        ({"sparsity": 20}, "sparsity: 20 is not possible; .* for 20 % say 0.2"),
        ({"sparsity": -0.1}, "sparsity: -0.1 is not possible; the range is"),
        ({"sparsity": float("nan")}, "sparsity: nan is not possible"),
        ({"sparsity": "0.2"}, "sparsity: '0.2' is not a number"),
        ({"seeds": [1]}, "2 prompts need as many seeds, got 1"),
        ({"seeds": [1, 1]}, "seeds must differ"),
        ({"seeds": [1, -1]}, "seed -1 is not a whole number from 0 to"),
        ({"seeds": [1, 2**63]}, "seed 9223372036854775808 is not a whole number from 0 to"),
        ({"seeds": [1, 1.5]}, "seed 1.5 is not a whole number from 0 to"),
        ({"call": {**CALLS["flux"], "num_inference_steps": 0}}, "num_inference_steps is 0"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(untouched, changes, message):
    given = {"prompts": ["a", "b"], "sparsity": 0.1, "call": CALLS["flux"], **changes}
    with pytest.raises(UserError, match=message) as caught:
        learn_mask(untouched, given.pop("prompts"), given.pop("sparsity"), **given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mask", ["mask.safetensors", Path("mask.safetensors")])
def test_a_path_is_no_mask_but_says_how_to_read_one(pipe, mask):
    with pytest.raises(UserError, match=r"is not a mask; ecodiff.Mask.load reads a file"):
        prune(pipe, mask)


def test_a_mask_of_another_family_does_not_prune(pipe):
    mask, _ = make_mask(tiny("sdxl"), "random", 0.1)
    with pytest.raises(UserError, match="was made of another model"):
        prune(pipe, mask)


def test_what_is_excluded_is_not_learned_and_stays():
    pipe, calibration = calibrated("flux")
    settings = {"iterations": 2, "batch": 2, "exclude": ["*.ff_context.*", "single_*"]}
    mask, _ = make_mask(pipe, "ecodiff", 0.1, calibration=calibration, settings=settings)
    whole = {n for n in mask.kept if ".ff_context." in n or n.startswith("single_")}
    assert len(whole) > 4 and all(mask.kept[name].all() for name in whole)
    assert all(mask.scores[name].isinf().all() == (name in whole) for name in mask.scores)
    mask.check(pipe)
