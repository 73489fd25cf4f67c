"""Published logits: a list a kind of structure, in the order in which the denoiser runs them."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny, z0

import ecodiff
from ecodiff.mask.published import published_mask
from ecodiff.models.structures import denoiser_of, discover
from ecodiff.runtime.errors import UserError

FILES = {"heads": "attn.pt", "neurons": "ff.pt", "modulation": "norm.pt"}
# What EcoDiff's code hooks: the linear whose run says when a structure's module runs.
HOOKED = {
    "heads": lambda s: s.producers[0].module.rpartition(".")[0],
    "neurons": lambda s: s.producers[0].module,
    "modulation": lambda s: s.producers[0].module,
}


def as_run(family):
    """Structures of each kind in the order in which a run of the denoiser reaches them."""
    pipe, order = tiny(family), {kind: [] for kind in FILES}
    denoiser, hooks = denoiser_of(pipe), []
    for s in discover(pipe):
        if s.kind == "modulation" and s.name.startswith("norm_out"):
            continue  # which they leave alone

        def note(*_, s=s):
            if s not in order[s.kind]:
                order[s.kind].append(s)

        hooks.append(denoiser.get_submodule(HOOKED[s.kind](s)).register_forward_hook(note))
    z0(pipe, family)
    return order


def written(folder, family, **changes):
    """Files with a logit of its own for each unit, and what a mask should read."""
    generator, files, expected = torch.Generator().manual_seed(0), [], {}
    for kind, structures in as_run(family).items():
        logits = [torch.randn(s.units, generator=generator) for s in structures]
        expected |= {s.name: one for s, one in zip(structures, logits, strict=True)}
        if structures:
            files.append(folder / FILES[kind])
            torch.save([one.clone().requires_grad_() for one in logits], files[-1])
    return files, expected


@pytest.mark.parametrize("family", ["sdxl", "flux", "sd3"])
def test_logits_go_to_the_structures_in_the_order_of_a_run(family, tmp_path):
    files, expected = written(tmp_path, family)
    pipe = tiny(family)
    mask = published_mask(pipe, files[::-1], 0.1)
    for name, scores in mask.scores.items():
        if name in expected:
            torch.testing.assert_close(scores, expected[name], rtol=0, atol=0)
        else:
            assert scores.isinf().all() and mask.kept[name].all()
    assert 0.1 <= mask.info["sparsity"] < 0.12
    before = sum(p.numel() for p in denoiser_of(pipe).parameters())
    ecodiff.prune(pipe, mask)
    after = sum(p.numel() for p in denoiser_of(pipe).parameters())
    assert 1 - after / before == pytest.approx(mask.info["sparsity"], abs=0.01)


def test_older_files_of_flux_know_no_single_blocks(tmp_path):
    order = as_run("flux")
    pairs = {
        "ff.pt": [s for s in order["neurons"] if not s.name.startswith("single")],
        "norm.pt": [s for s in order["modulation"] if "norm1_context" in s.name],
    }
    for name, structures in pairs.items():
        torch.save([torch.arange(s.units).bfloat16() for s in structures], tmp_path / name)
    mask = published_mask(tiny("flux"), [tmp_path / name for name in pairs], 0.05)
    known = {s.name for structures in pairs.values() for s in structures}
    assert {name for name, scores in mask.scores.items() if scores.isfinite().all()} == known


def test_logits_of_another_model_are_refused(tmp_path):
    files, _ = written(tmp_path, "sdxl")
    with pytest.raises(UserError, match=r"attn\.pt: 22 tensors with 60 logits are no kind"):
        published_mask(tiny("flux"), files)


def test_two_files_of_a_kind_are_refused(tmp_path):
    files, _ = written(tmp_path, "sdxl")
    with pytest.raises(UserError, match=r"attn\.pt: is of the heads too"):
        published_mask(tiny("sdxl"), [files[0], files[0]])


class Harmful:
    def __reduce__(self):
        return print, ("it was run",)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ([Harmful()], "does not load with weights_only"),
        ({"attn": torch.ones(3)}, r"must be a list of tensors \(units,\)"),
        ([], "must be a list"),
        ([torch.ones(2, 3)], "must be a list"),
        ([torch.tensor([1.0, torch.nan])], "not a number"),
    ],
)
def test_what_holds_no_logits_is_refused_unrun(content, line, tmp_path, capsys):
    torch.save(content, tmp_path / "attn.pt")
    with pytest.raises(UserError, match=line) as error:
        published_mask(tiny("sdxl"), [tmp_path / "attn.pt"])
    assert "\n" not in str(error.value)
    assert not capsys.readouterr().out


def test_a_missing_or_broken_file_is_refused(tmp_path):
    (tmp_path / "broken.pt").write_bytes(b"PK\x03\x04 no archive")
    for name in ("nowhere.pt", "broken.pt"):
        with pytest.raises(UserError, match=f"{name}: does not load"):
            published_mask(tiny("sdxl"), [tmp_path / name])
