"""README.md of a pruned model's folder says what is true of it, and no place of this machine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, hf_api
from safetensors.torch import load_file
from tiny import tiny

import ecodiff
from ecodiff.models import saving
from ecodiff.models.structures import denoiser_of

ROOT = Path(__file__).parents[1]


def every_other(pipe, *kinds):
    """A mask that removes every other unit of some kinds."""
    structures = [s for s in ecodiff.discover(pipe) if s.kind in kinds]
    return {s.name: torch.arange(s.units) % 2 == 0 for s in structures}


def parameters(folder, part):
    """Of the files that were written, without the places of scattered channels."""
    state = load_file(folder / part / "diffusion_pytorch_model.safetensors")
    return sum(tensor.numel() for tensor in state.values() if tensor.is_floating_point())


def numbers(card):
    """Row -> dense, pruned, removed, percent."""
    rows = re.findall(
        r"^\| ([\w -]+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \(([\d.]+)%\)", card, re.M
    )
    whole = {name: [int(n.replace(",", "")) for n in found] for name, *found, _ in rows}
    return whole, {name: float(percent) for name, *_, percent in rows}


@pytest.mark.parametrize("family", ["flux", "sdxl"])
def test_sizes_are_those_of_the_files(family, tmp_path):
    pipe, part = tiny(family), "unet" if family == "sdxl" else "transformer"
    ecodiff.save(pipe, tmp_path / "dense")
    kept = every_other(pipe, "heads", "neurons", "modulation")
    kept[next(name for name in kept if name.endswith("heads"))][:] = False
    ecodiff.prune(pipe, kept)
    ecodiff.save(pipe, tmp_path / "pruned")
    assert not (tmp_path / "dense/README.md").exists()
    before, after = (parameters(tmp_path / name, part) for name in ("dense", "pruned"))
    sizes, percents = numbers((tmp_path / "pruned/README.md").read_text())
    assert sizes.pop("parameters") == [before, after, before - after]
    assert percents["parameters"] == pytest.approx(100 * (1 - after / before), abs=0.005)
    assert sum(gone for *_, gone in sizes.values()) == before - after


def test_a_kind_that_stays_lost_nothing(tmp_path):
    pipe = tiny("flux")
    ecodiff.prune(pipe, every_other(pipe, "neurons"))
    ecodiff.save(pipe, tmp_path / "pruned")
    _, percents = numbers((tmp_path / "pruned/README.md").read_text())
    assert percents.pop("parameters") > 0
    assert percents == {"attention heads": 0, "feed-forward neurons": 50, "modulation": 0}


def test_lower_ranks_are_counted(tmp_path):
    pipe = tiny("flux")
    structures = ecodiff.discover(pipe, "rank")
    kept = {s.name: torch.arange(s.units) < 2 for s in structures if s.directions_of}
    moments = {s.directions_of: torch.eye(s.units + 1) for s in structures if s.directions_of}
    mask = ecodiff.Mask({}, kept, "", moments=moments)
    mask.check = lambda _: None
    ecodiff.prune(pipe, mask)
    ecodiff.save(pipe, tmp_path / "pruned", mask)
    sizes, _ = numbers((tmp_path / "pruned/README.md").read_text())
    assert sizes["modulation"][2] == sizes["parameters"][2] > 0


def saved_from(source, folder):
    """The card of a pruned pipeline that was loaded from somewhere."""
    pipe = tiny("flux")
    ecodiff.prune(pipe, every_other(pipe, "heads"))
    denoiser_of(pipe).register_to_config(_name_or_path=str(source))
    ecodiff.save(pipe, folder)
    return ModelCard.load(folder / "README.md")


def test_a_base_of_the_hub_is_named(tmp_path):
    assert saved_from("some/model", tmp_path / "out").data.base_model == "some/model"
    cached = tmp_path / "hub/models--some--other/snapshots/0123"
    cached.mkdir(parents=True)
    (cached / "model_index.json").write_text("{}")
    front = "license: other\nlicense_name: theirs\nlicense_link: LICENSE.md\nbase_model: a/b"
    (cached / "README.md").write_text(f"---\n{front}\n---\n")
    data = saved_from(cached / "transformer", tmp_path / "out").data
    assert (data.base_model, data.license) == ("some/other", "other")
    assert (data.license_name, data.license_link) == ("theirs", "LICENSE.md")


def test_a_local_base_is_not_named_but_its_licence_is(tmp_path):
    base = tmp_path / "mine"
    base.mkdir()
    (base / "model_index.json").write_text("{}")
    (base / "README.md").write_text("---\nlicense: mit\nbase_model: a/b\n---\n")
    card = saved_from(base / "transformer", tmp_path / "out")
    assert (card.data.base_model, card.data.license) == (None, "mit")
    assert str(tmp_path) not in card.content
    (base / "README.md").write_text("---\nlicense: [\n---\n")  # not YAML
    assert saved_from(base / "transformer", tmp_path / "out").data.license is None


def test_what_is_saved_again_keeps_its_base(tmp_path):
    saved_from("some/model", tmp_path / "out")
    ecodiff.save(ecodiff.load(tmp_path / "out"), tmp_path / "again")
    first, second = ((tmp_path / name / "README.md").read_bytes() for name in ("out", "again"))
    assert first == second


def test_the_whole_folder_is_published(tmp_path, monkeypatch):
    pipe = tiny("flux")
    mask = ecodiff.learn_mask(
        pipe,
        ["a red square"],
        0.1,
        call={"num_inference_steps": 1, "height": 32, "width": 32, "max_sequence_length": 16},
        settings={"iterations": 1, "batch": 1},
    )
    ecodiff.prune(pipe, mask)
    ecodiff.save(pipe, tmp_path / "out", mask)
    sent = {}
    monkeypatch.setattr(HfApi, "create_commit", lambda self, **given: sent.update(given))
    monkeypatch.setattr(hf_api, "is_xet_available", lambda: False)  # it uploads as it reads
    monkeypatch.setattr(HfApi, "_validate_yaml", lambda *args, **given: None)  # asks the hub
    HfApi().upload_folder(repo_id="you/smaller", folder_path=tmp_path / "out")
    paths = {operation.path_in_repo for operation in sent["operations"]}
    assert {"README.md", saving.MASK, "model_index.json", "transformer/ecodiff.py"} <= paths
    card = (tmp_path / "out/README.md").read_text()
    assert mask.info["method"] in card
    assert f"ecodiff prune BASE {saving.MASK} OUT --percent 25" in card


def test_the_citation_is_that_of_the_project(tmp_path):
    cited = (ROOT / "CITATION.cff").read_text().split("preferred-citation:")[1]
    card = saved_from("", tmp_path / "out").content
    for key in ("title", "year", "url", "family-names"):
        for value in re.findall(rf"\b{key}: (.+)", cited):
            assert value in card, key
