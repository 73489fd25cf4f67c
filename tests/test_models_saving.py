"""The folder of a pruned model: read back by us and by diffusers, and refused when damaged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load as tensors_of
from safetensors.torch import save_file
from tiny import CALLS, tiny

import ecodiff
from ecodiff.models import pruned as shipped
from ecodiff.models.loading import load_pipeline
from ecodiff.models.pipelines import denoise, encode, starting_noise
from ecodiff.models.pruned import Pruned
from ecodiff.models.structures import denoiser_of, discover
from ecodiff.runtime.errors import UserError

FAMILIES = ("sdxl", "flux")
WEIGHTS = "diffusion_pytorch_model.safetensors"


def some_units(structure, i):
    """Every third structure empty, every third with one unit, the others halved."""
    units = torch.arange(structure.units)
    return [units < 0, units == 1, units % 2 == 0][i % 3]


def pruned(family):
    pipe = tiny(family)
    ecodiff.prune(pipe, {s.name: some_units(s, i) for i, s in enumerate(discover(pipe))})
    return pipe


@cache
def inputs(family):
    pipe = tiny(family)
    return encode(pipe, ["a red square"], CALLS[family]), starting_noise(pipe, [3], CALLS[family])


def z0(pipe, family):
    return denoise(pipe, *inputs(family), CALLS[family])


def same(first, second):
    """Equal but for rounding: where weights lie in memory decides the order of sums."""
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    """A pruned pipeline and the folder it was saved in; not to be changed."""
    folder = tmp_path_factory.mktemp(request.param) / "model"
    pipe = pruned(request.param)
    ecodiff.save(pipe, folder)
    return request.param, pipe, folder


@pytest.fixture
def damaged(tmp_path):
    """A saved pruned FLUX pipeline that a test may damage."""
    ecodiff.save(pruned("flux"), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("read", [ecodiff.load, DiffusionPipeline.from_pretrained, load_pipeline])
def test_what_is_read_is_what_was_saved(saved, read):
    family, pipe, folder = saved
    again = read(folder)
    assert type(denoiser_of(again)) is type(denoiser_of(pipe))
    same(z0(again, family), z0(pipe, family))


def test_diffusers_reads_it_without_the_shortcut_for_memory(saved):
    family, pipe, folder = saved
    again = DiffusionPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    same(z0(again, family), z0(pipe, family))


@pytest.mark.slow
def test_a_fresh_process_needs_nothing_but_import_ecodiff(saved):
    _, pipe, folder = saved
    script = (
        "import sys, ecodiff; from diffusers import DiffusionPipeline as P;"
        "p = P.from_pretrained(sys.argv[1]); d = getattr(p, 'unet', None) or p.transformer;"
        "print(type(d).__name__, d.num_parameters())"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, folder], capture_output=True, text=True, check=True
    )
    denoiser = denoiser_of(pipe)
    assert run.stdout.split() == [type(denoiser).__name__, str(denoiser.num_parameters())]


@pytest.mark.slow
def test_diffusers_reads_it_without_ecodiff_when_its_code_is_trusted(saved, tmp_path):
    family, pipe, folder = saved
    script = (
        "import sys; sys.modules['ecodiff'] = None;"  # as if it were not installed
        "from diffusers import DiffusionPipeline as P;"
        "p = P.from_pretrained(sys.argv[1], trust_remote_code=True);"
        "p.save_pretrained(sys.argv[2]); d = getattr(p, 'unet', None) or p.transformer;"
        "print(type(d).__name__, d.num_parameters())"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, folder, tmp_path / "again"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HF_HOME": str(tmp_path / "home")},
    )
    denoiser = denoiser_of(pipe)
    assert run.stdout.split() == [type(denoiser).__name__, str(denoiser.num_parameters())]
    same(z0(ecodiff.load(tmp_path / "again"), family), z0(pipe, family))


def test_code_in_a_folder_is_not_run_where_ecodiff_is_imported(damaged):
    (damaged / "transformer/ecodiff.py").write_text("raise RuntimeError('it was run')")
    again = DiffusionPipeline.from_pretrained(damaged, trust_remote_code=True)
    assert isinstance(again.transformer, Pruned)


def test_saving_what_was_loaded_gives_the_same_files(saved, tmp_path):
    _, pipe, folder = saved
    ecodiff.save(ecodiff.load(folder), tmp_path / "again")
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    first, second = (f / name / WEIGHTS for f in (folder, tmp_path / "again"))
    assert first.read_bytes() == second.read_bytes()
    configs = [json.loads((f.parent / "config.json").read_text()) for f in (first, second)]
    assert configs[0]["pruned"] == configs[1]["pruned"] != {}


def test_variant_dtype_and_shards(saved, tmp_path):
    family, pipe, _ = saved
    pipe.save_pretrained(tmp_path, variant="fp16", max_shard_size="100KB")
    name = "unet" if family == "sdxl" else "transformer"
    assert len(list((tmp_path / name).glob("*fp16-0*.safetensors"))) > 1
    again = DiffusionPipeline.from_pretrained(
        tmp_path, variant="fp16", dtype=torch.bfloat16, use_safetensors=True
    )
    denoiser = denoiser_of(again)
    for key, tensor in denoiser_of(pipe).state_dict().items():
        expected = tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
        assert torch.equal(denoiser.state_dict()[key], expected)
    same(z0(again.to(torch.float32), family), z0(again, family))


def test_load_casts_weights_and_not_indices(saved):
    *_, folder = saved
    state = denoiser_of(ecodiff.load(folder, dtype=torch.bfloat16)).state_dict()
    floating = {t.dtype for t in state.values() if t.is_floating_point()}
    indices = {t.dtype for k, t in state.items() if k.endswith(".index")}
    assert floating == {torch.bfloat16}
    assert indices <= {torch.int64}


def test_only_safetensors_are_written(saved):
    *_, folder = saved
    suffixes = {".json", ".safetensors", ".txt", ".py", ".md"}
    assert {f.suffix for f in folder.rglob("*") if f.is_file()} <= suffixes


def test_saved_model_shrinks_on_disk(saved, tmp_path):
    family, _, folder = saved
    ecodiff.save(tiny(family), tmp_path / "dense")
    name = "unet" if family == "sdxl" else "transformer"
    sizes = [(f / name / WEIGHTS).stat().st_size for f in (folder, tmp_path / "dense")]
    assert sizes[0] < 0.9 * sizes[1]


def test_a_dense_pipeline_keeps_its_class(tmp_path):
    ecodiff.save(tiny("flux"), tmp_path / "dense")
    assert not isinstance(ecodiff.load(tmp_path / "dense").transformer, Pruned)


def test_save_replaces_its_own_folder(damaged):
    (damaged / "transformer" / WEIGHTS).write_bytes(b"broken")
    ecodiff.save(pruned("flux"), damaged)
    z0(ecodiff.load(damaged), "flux")
    assert [f.name for f in damaged.parent.iterdir()] == ["model"]


def test_save_leaves_a_folder_that_holds_more_than_it_wrote(damaged):
    (damaged / "mine").touch()
    with pytest.raises(UserError, match="holds mine, which ecodiff did not write"):
        ecodiff.save(pruned("flux"), damaged)
    assert (damaged / "mine").exists()


def test_a_pipeline_can_be_saved_over_the_files_it_was_loaded_from(damaged):
    pipe = ecodiff.load(damaged)
    before = z0(pipe, "flux")
    ecodiff.save(pipe, damaged)
    assert torch.equal(z0(pipe, "flux"), before)
    same(z0(ecodiff.load(damaged), "flux"), before)


def test_save_refuses_a_folder_of_someone_else(tmp_path):
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(UserError, match="not written by ecodiff"):
        ecodiff.save(tiny("flux"), tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years"


def test_a_failed_save_leaves_what_was_there(damaged, monkeypatch):
    pipe = pruned("flux")
    before = sorted(f.name for f in damaged.rglob("*"))
    monkeypatch.setattr(pipe.vae, "save_pretrained", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ecodiff.save(pipe, damaged)
    assert sorted(f.name for f in damaged.rglob("*")) == before
    assert [f.name for f in damaged.parent.iterdir()] == ["model"]


def refuses(folder, message):
    with pytest.raises(UserError, match=message) as caught:
        ecodiff.load(folder)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path):
    refuses(tmp_path / "nowhere", r"nowhere/model_index.json: missing")


def test_missing_weights_are_refused(damaged):
    (damaged / "transformer" / WEIGHTS).unlink()
    refuses(damaged, "transformer: no weights")


def test_missing_text_encoder_weights_are_refused(damaged):
    (damaged / "text_encoder_2" / "model.safetensors").unlink()
    refuses(damaged, "text_encoder_2: no weights")


def test_truncated_weights_are_refused(damaged):
    file = damaged / "transformer" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-10])
    refuses(damaged, f"{WEIGHTS}: truncated")


def test_a_pickle_is_refused_unread(damaged):
    file = damaged / "transformer" / WEIGHTS
    torch.save(tensors_of(file.read_bytes()), file.with_suffix(".bin"))
    file.unlink()
    refuses(damaged, "diffusion_pytorch_model.bin, a pickle, which is never read")


def test_a_pickle_that_is_called_safetensors_is_refused(damaged):
    file = damaged / "transformer" / WEIGHTS
    torch.save(tensors_of(file.read_bytes()), file)
    refuses(damaged, "not safetensors")


def test_a_missing_shard_is_refused(tmp_path):
    pruned("flux").save_pretrained(tmp_path, max_shard_size="100KB")
    sorted((tmp_path / "transformer").glob("*-00002-*.safetensors"))[0].unlink()
    refuses(tmp_path, r"-00002-.*safetensors: missing, but .*index.json names it")


def edit_weights(folder, edit):
    file = folder / "transformer" / WEIGHTS
    state = tensors_of(file.read_bytes())
    edit(state)
    save_file(state, file, metadata={"format": "pt"})


def test_a_missing_tensor_is_refused(damaged):
    edit_weights(damaged, lambda state: state.pop("norm_out.linear.index"))
    refuses(damaged, "disagree: missing tensors: norm_out.linear.index")


def test_a_surplus_tensor_is_refused(damaged):
    edit_weights(damaged, lambda state: state.update(extra=torch.ones(1)))
    refuses(damaged, "disagree: unexpected tensors: extra")


def edit_config(folder, **values):
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_other_sizes_in_the_config_are_refused(damaged):
    config = json.loads((damaged / "transformer" / "config.json").read_text())
    config["pruned"]["shapes"]["norm_out.linear"][0] = 5
    edit_config(damaged, pruned=config["pruned"])
    refuses(damaged, "disagree: .*norm_out.linear")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"shapes": {"nowhere": [1, 1]}}, r"nowhere: \[1, 1\] is not possible \(a linear"),
        ({"shapes": {"norm_out.linear": [99999, 1]}}, r"possible \(at most \["),
        ({"shapes": {"norm_out.linear": [-1, 1]}}, "is not possible"),
        ({"heads": {"transformer_blocks.0.attn": 99}}, r"99 is not possible \(0 to 2\)"),
        ({"heads": {"nowhere": 1}}, "1 is not possible .an attention"),
    ],
)
def test_an_impossible_config_is_refused(damaged, record, message):
    edit_config(damaged, pruned=record)
    refuses(damaged, message)


def test_an_unknown_class_is_refused(damaged):
    file = damaged / "model_index.json"
    file.write_text(file.read_text().replace("PrunedFlux", "PrunedFlax"))
    refuses(damaged, "transformer: ecodiff.PrunedFlax.* is unknown")


def test_the_classes_are_attributes_of_the_package():
    assert ecodiff.PrunedUNet2DConditionModel is shipped.PrunedUNet2DConditionModel
    assert ecodiff.PrunedUNet2DConditionModel.__module__ == "ecodiff"
    with pytest.raises(AttributeError):
        ecodiff.PrunedEulerDiscreteScheduler  # noqa: B018
    with pytest.raises(AttributeError):
        ecodiff.nothing  # noqa: B018


def test_the_package_imports_without_torch():
    script = "import sys, ecodiff; assert not {'torch', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
