import json
import re
import sys

import pandas as pd
import pytest
import torch
import yaml
from disks import mounted
from imports import loaded_by

from ecodiff import cli
from ecodiff.prompts import read_prompts

CALL_VALUES = {"num_inference_steps": 2, "guidance_scale": 3, "height": 64, "width": 64}
CALL = yaml.safe_dump(CALL_VALUES)
CPU = ("--load", "device: cpu")


def ecodiff(*words):
    """Runs the command in this process; its exit status."""
    before = sys.argv
    sys.argv = ["ecodiff", *map(str, words)]
    try:
        cli.main()
    except SystemExit as error:
        return error.code
    finally:
        sys.argv = before
    return 0


def make_prompts(folder, name="p", count=4):
    settings = f"{{source: shapeworld, count: {count}, seed: 5}}"
    out = folder / f"{name}.parquet"
    assert ecodiff("prompts", out, "--pictures", folder / name, "--settings", settings) == 0
    return out


def test_help_names_every_stage(capsys):
    assert ecodiff("--help") == 0
    shown = capsys.readouterr().out
    stages = ["prompts", "calibrate", "mask", "prune", "retrain", "generate", "evaluate", "report"]
    assert all(stage in shown for stage in stages)


def test_an_error_of_the_users_is_one_line_and_status_2(tmp_path, capsys):
    words = ("prompts", tmp_path / "p.parquet", "--pictures", tmp_path / "p")
    assert ecodiff(*words, "--settings", "{source: shapeworld, count: 0}") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("ecodiff: error: --settings: count: ")
    assert not list(tmp_path.iterdir())


def test_a_missing_extra_is_one_line_that_installs_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)  # as if it were not installed
    for module in ("ecodiff.retrain.kinds", "ecodiff.retrain.train", "ecodiff.retrain"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    assert ecodiff("retrain", tmp_path, tmp_path, "--data", tmp_path) == 2
    error = capsys.readouterr().err
    assert error == (
        "ecodiff: error: retrain: peft is not installed; pip install 'ecodiff[retrain]'\n"
    )


def test_a_missing_library_of_no_extra_is_no_error_of_the_users(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ecodiff.calibrate", None)
    assert ecodiff("grams", "a", "b", "c") == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("ecodiff: error: internal: ModuleNotFoundError: ")


@pytest.mark.parametrize("way", ["option", "variable"])
def test_debug_shows_where_an_error_comes_from(tmp_path, capsys, monkeypatch, way):
    if way == "variable":
        monkeypatch.setenv("ECODIFF_DEBUG", "1")
    debug = ["--debug"] if way == "option" else []
    words = ("prompts", tmp_path / "p", "--settings", "{source: shapeworld, count: 0}")
    assert ecodiff(*debug, *words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1].startswith("ecodiff: error: --settings: count: ")


def test_a_word_that_is_no_verb_is_status_2(capsys):
    assert ecodiff("prunes") == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_missing_model_is_one_line(tmp_path, capsys):
    table = make_prompts(tmp_path)
    words = ("generate", tmp_path / "none", table, tmp_path / "out", "--call", CALL, *CPU)
    assert ecodiff(*words) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("ecodiff: error: source: ")


def test_a_job_that_asks_for_a_gpu_does_not_silently_run_without(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    model = {"source": "m", "call": CALL_VALUES, "resources": {"gpu": 2}}
    prompts = {"source": "shapeworld", "count": 4, "seed": 5}
    config = {
        "run": "r",
        "models": {"m": model},
        "variants": [{"method": "random", "sparsities": [0.2]}],
        "prompts": {
            "calibration": prompts,
            "evaluation": {**prompts, "seed": 99, "split": "held-out"},
        },
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    words = ("generate", "m", make_prompts(tmp_path), tmp_path / "out")
    capsys.readouterr()
    assert ecodiff(*words, "--config", tmp_path / "c.yaml", "--model", "m") == 2
    said = capsys.readouterr().err
    assert "models.m.resources.gpu: 2, but torch sees no GPU here" in said
    assert not (tmp_path / "out").exists()


def test_two_ways_to_compensate_are_one_too_many(tmp_path, capsys):
    words = ("prune", tmp_path, tmp_path / "mask", tmp_path / "out", "--grams", tmp_path / "g")
    assert ecodiff(*words, "--calibration", tmp_path / "c") == 2
    assert "--grams" in capsys.readouterr().err


def test_prompts_leave_a_table_pictures_and_a_manifest(tmp_path):
    table = make_prompts(tmp_path, count=3)
    assert read_prompts(table)["seed"].tolist() == [5, 6, 7]
    assert len(list((tmp_path / "p").glob("*.png"))) == 3
    manifest = json.loads((tmp_path / "p.parquet.manifest.json").read_text())
    assert manifest["settings"]["seed"] == 5


MASK = ("--method", "magnitude", "--percent", 10)
DRAWN = ("--settings", "{source: shapeworld, count: 2}")
# A verb and the output that stands for something else; there is no model, so what comes first is
# seen. `d` is a folder of someone's, `f` a file of someone's, `p` and `p.parquet` are prompts.
REFUSED = {
    "mask to a folder": ("mask", "none", "d", *MASK),
    "mask to a file": ("mask", "none", "f", *MASK),
    "history to a folder": ("mask", "none", "m", *MASK, "--history", "d"),
    "history to the mask": ("mask", "none", "m", *MASK, "--history", "./m"),
    "history to a manifest": ("mask", "none", "m", *MASK, "--history", "m.manifest.json"),
    "mask into its model": ("mask", "d", "d/m", *MASK),
    "prompts to a folder": ("prompts", "d", *DRAWN),
    "prompts to a file": ("prompts", "f", *DRAWN),
    "prompts to their pictures": ("prompts", "q", *DRAWN),
    "prompts to their source": ("prompts", "f", "--settings", "{source: file, path: f, count: 1}"),
    "pictures to a folder": ("prompts", "q.parquet", "--pictures", "d", *DRAWN),
    "pictures around their table": ("prompts", "q/q.parquet", "--pictures", "q", *DRAWN),
    "images to a folder": ("generate", "none", "p.parquet", "d", "--call", CALL),
    "images to their table": ("generate", "none", "p.parquet", "p.parquet", "--call", CALL),
    "images to real ones": ("generate", "none", "p.parquet", "p", "--call", CALL),
    "images to their folder": ("generate", "none", "p.parquet", ".", "--call", CALL),
    "images to the root": ("generate", "none", "p.parquet", "/", "--call", CALL),
    "record to a folder": ("calibrate", "none", "p.parquet", "d", "--call", CALL),
    "record to its table": ("calibrate", "none", "p.parquet", "p.parquet", "--call", CALL),
    "record below a file": ("calibrate", "none", "p.parquet", "f/r", "--call", CALL),
    "figures to a file": ("evaluate", "mask-cost", "none", "p.parquet", "f", "--call", CALL),
    "a toy to a folder": ("toys", "train", "toy-vae", "--out", "d"),
}


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A working folder with things of someone else's, and prompts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    (tmp_path / "d/thesis").write_text("years")
    (tmp_path / "f").write_text("mine")
    make_prompts(tmp_path)
    return tmp_path


def contents(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.mark.parametrize("name", REFUSED)
def test_what_ecodiff_did_not_write_and_what_it_reads_is_not_touched(desk, capsys, name):
    before = contents(desk)
    assert ecodiff(*REFUSED[name]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search("choose another place|not a folder", error)
    assert contents(desk) == before


def test_a_command_replaces_what_it_wrote_before(tmp_path):
    make_prompts(tmp_path, count=3)
    assert len(read_prompts(make_prompts(tmp_path, count=2))) == 2
    assert len([*(tmp_path / "p").glob("*.png")]) == 2


@pytest.mark.parametrize(
    ("options", "line", "status"),
    [("size=5m", "p: about .* MB are free", 1), ("ro", "p: Read-only file system", 2)],
)
def test_a_disk_that_will_not_take_it_is_told_first(tmp_path, capsys, options, line, status):
    (tmp_path / "mask").write_text("")
    (tmp_path / "model").mkdir()
    with (tmp_path / "model/a.safetensors").open("wb") as file:
        file.truncate(6_000_000)
    words = ("retrain", tmp_path / "model")
    with mounted(tmp_path / "disk", options) as disk:
        assert ecodiff(*words, disk / "p", "--data", tmp_path / "data") == status
        assert not [*disk.iterdir()]
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(line, error)


def test_starting_the_command_needs_no_torch():
    assert not {"torch", "diffusers"} & loaded_by("ecodiff.cli")


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (["dense"], "'dense' is not name=value"),
        (["dense="], "'dense=' is not name=value"),
        (["=a"], "'=a' is not name=value"),
        (["dense=a", "b=c", "dense=d"], "dense is given twice: a and d"),
        (["b=c", "dense=a"], "the first one must be dense="),
    ],
)
def test_variants_are_named_once_and_the_dense_one_first(given, error, tmp_path, capsys):
    words = [word for variant in given for word in ("--variant", variant)]
    table = make_prompts(tmp_path, count=1)
    call = ("--call", CALL)
    assert ecodiff("evaluate", "efficiency", table, tmp_path / "out", *words, *call) == 2
    assert f"--variant: {error}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "settings", "key"),
    [
        (["efficiency", "TABLE", "OUT", "--variant", "dense=x"], "batch_size", "efficiency"),
        (["mask-cost", "x", "TABLE", "OUT"], "batch", "mask_cost"),
    ],
)
def test_a_batch_is_as_large_as_it_says_or_refused(words, settings, key, tmp_path, capsys):
    places = {"TABLE": make_prompts(tmp_path, count=4), "OUT": tmp_path / "out"}
    words = [places.get(word, word) for word in words]
    given = ("--call", CALL, "--settings", f"{settings}: 5")
    assert ecodiff("evaluate", *words, *given) == 2
    error = capsys.readouterr().err
    assert f"evaluate.{key}.{settings}: 5, but {places['TABLE']} has 4 prompts" in error
    assert not (tmp_path / "out").exists()


def test_masks_in_folders_of_one_name_are_refused(tmp_path, capsys):
    from ecodiff.mask import Mask

    paths = [tmp_path / side / "ecodiff-20/mask.safetensors" for side in "ab"]
    for path in paths:
        Mask({}, {}, "m::").save(path)
    masks = [word for path in paths for word in ("--mask", path)]
    words = ("evaluate", "mask-error", "x", "y", tmp_path / "out", *masks, "--sparsity", 0.1)
    assert ecodiff(*words) == 2
    assert f"{paths[1]} and {paths[0]} are both called ecodiff-20" in capsys.readouterr().err


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """All stages on a tiny pipeline, one after another."""
    from tiny import tiny_sdxl

    from ecodiff.toys import clip

    folder = tmp_path_factory.mktemp("stages")
    tiny_sdxl().save_pretrained(folder / "dense")
    torch.manual_seed(0)
    clip.save(clip.CLIP(**clip.CONFIG), folder / "clip")
    table, record = make_prompts(folder), folder / "calibration.safetensors"
    dense, pruned, data, tuned = (folder / name for name in ("dense", "pruned", "data", "tuned"))
    mask, history = folder / "mask.safetensors", folder / "history.csv"
    learn = "{iterations: 2, batch: 2}"
    judge = f"{{features: clip, clip_model: 'local-dir:{folder}/clip', clip_pretrained: null}}"
    done = [
        ecodiff("calibrate", dense, table, record, "--call", CALL, *CPU),
        ecodiff("grams", dense, record, folder / "grams", *CPU),
        ecodiff(
            *("mask", dense, mask, "--method", "ecodiff", "--percent", 20, "--settings", learn),
            *("--calibration", record, "--history", history, *CPU),
        ),
        ecodiff("prune", dense, mask, pruned, "--grams", folder / "grams", *CPU),
        ecodiff("trajectory", dense, table, data, "--call", CALL, "--batch-size", 2, *CPU),
        ecodiff("retrain", pruned, tuned, "--data", data, "--settings", "{steps: 2}", *CPU),
        ecodiff("generate", dense, table, folder / "a", "--call", CALL, *CPU),
        ecodiff("generate", tuned, table, folder / "b", "--call", CALL, *CPU),
        ecodiff(
            *("evaluate", "see", table, folder / "b", folder / "seen"),
            *("--dense", folder / "a", "--settings", judge, "--device", "cpu"),
        ),
        ecodiff("evaluate", "quality", folder / "quality.json", "--seen", folder / "seen"),
        ecodiff(
            *("evaluate", "efficiency", table, folder / "efficiency.json", "--call", CALL),
            *("--variant", f"dense={dense}", "--variant", f"ecodiff-20={pruned}"),
            *("--settings", "{repeats: 1, warmup: 0}", *CPU),
        ),
        ecodiff(
            *("evaluate", "mask-cost", dense, table, folder / "cost.csv", "--call", CALL),
            *("--settings", "{steps: [1, 2], batch: 2}", *CPU),
        ),
    ]
    assert done == [0] * 12
    return folder


@pytest.mark.slow
def test_the_chain_ends_in_a_smaller_model(stages):
    found = json.loads((stages / "efficiency.json").read_text())
    ratio = found["ecodiff-20"]["denoiser_parameters"] / found["dense"]["denoiser_parameters"]
    assert ratio == pytest.approx(0.8, abs=0.01)


@pytest.mark.slow
def test_the_chain_ends_in_judged_pictures(stages):
    quality = json.loads((stages / "quality.json").read_text())
    assert quality["count"] == 4
    assert quality["latent_error"] > 0


@pytest.mark.slow
def test_learning_and_retraining_leave_their_history(stages):
    assert len(pd.read_csv(stages / "history.csv")) == 2
    assert len(pd.read_csv(stages / "tuned/history.csv")) == 2


@pytest.mark.slow
def test_masks_that_were_stopped_in_one_folder_go_on_each_for_itself(stages, tmp_path, monkeypatch):
    from ecodiff.mask import Mask
    from ecodiff.mask.learner import Learner
    from ecodiff.runtime.errors import Stopped

    def learn(name, folder):
        words = ("--percent", 20, "--settings", "{iterations: 2, batch: 2}", *CPU)
        words += ("--method", "ecodiff", "--calibration", stages / "calibration.safetensors")
        return ecodiff("mask", stages / "dense", folder / name, *words)

    seen, differentiate = [], Learner.differentiate

    def stopped(self, iteration):
        seen.append(iteration)
        if stop and iteration == 1:
            raise Stopped
        return differentiate(self, iteration)

    monkeypatch.setattr(Learner, "differentiate", stopped)
    stop = True
    assert [learn(name, tmp_path) for name in "ab"] == [75, 75]
    stop = False
    seen.clear()
    assert learn("a", tmp_path) == 0
    assert seen == [1]
    assert [path.name for path in tmp_path.glob(".*")] == [".b.unfinished"]
    whole = Mask.load(stages / "mask.safetensors")
    assert all(torch.equal(v, whole.scores[k]) for k, v in Mask.load(tmp_path / "a").scores.items())


@pytest.mark.slow
def test_mask_cost_is_a_table(stages):
    assert pd.read_csv(stages / "cost.csv")["steps"].tolist() == [1, 1, 2, 2]


@pytest.mark.slow
def test_every_output_has_a_manifest(stages):
    outputs = [path for path in stages.iterdir() if "manifest" not in path.name]
    made_here = {"dense", "clip", "tuned.pictures"}  # the last to be looked at while one waits
    bare = [
        path.name
        for path in outputs
        if path.name not in made_here and not (stages / f"{path.name}.manifest.json").exists()
    ]
    assert not bare


@pytest.mark.slow
def test_one_mask_serves_another_sparsity(stages):
    from ecodiff.mask import Mask

    mask, out = stages / "mask.safetensors", stages / "tenth"
    assert ecodiff("prune", stages / "dense", mask, out, "--percent", 10, *CPU) == 0
    first, cut = Mask.load(mask), Mask.load(out / "mask.safetensors")
    assert all(torch.equal(first.scores[name], cut.scores[name]) for name in first.scores)
    assert cut.info["sparsity"] == pytest.approx(0.1, abs=0.01)
    assert cut.info["scored_for"] == 0.2


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A model of the same shapes as the one of `stages`."""
    from tiny import tiny_sdxl

    folder = tmp_path_factory.mktemp("other") / "other"
    tiny_sdxl(seed=1).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("prune", "OTHER", "mask.safetensors", "OUT"),
        ("prune", "dense", "mask.safetensors", "OUT", "--load", "{device: cpu, dtype: bfloat16}"),
        ("grams", "OTHER", "calibration.safetensors", "OUT"),
        ("mask", "OTHER", "OUT", "--method", "wanda", "--percent", "20", "--calibration", "RECORD"),
        ("retrain", "OTHER", "OUT", "--data", "DATA", "--settings", "{steps: 1}"),
        ("evaluate", "mask-error", "OTHER", "RECORD", "OUT", "--mask", "MASK", "--sparsity", "0.1"),
    ],
    ids=lambda words: "-".join(words[:2]),
)
def test_what_is_of_another_model_is_one_line_with_both_names(
    words, stages, other, tmp_path, capsys
):
    places = {"OTHER": other, "OUT": tmp_path / "out", "dense": stages / "dense"}
    places |= {"RECORD": stages / "calibration.safetensors", "MASK": stages / "mask.safetensors"}
    places["DATA"] = stages / "data"
    places |= {name: stages / name for name in ("mask.safetensors", "calibration.safetensors")}
    given = [places.get(word, word) for word in words]
    status = ecodiff(*given, *(() if "--load" in words else CPU))
    if "OTHER" not in words:
        assert status == 0  # the same weights in another dtype
        return
    assert status == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "another model than" in error
    assert str(other) in error and str(stages) in error
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_efficiency_of_a_variant_of_another_model_is_refused(stages, other, tmp_path, capsys):
    words = ("evaluate", "efficiency", stages / "p.parquet", tmp_path / "out", "--call", CALL)
    variants = ("--variant", f"dense={other}", "--variant", f"ecodiff-20={stages / 'pruned'}")
    assert ecodiff(*words, *variants, "--settings", "{repeats: 1, warmup: 0}", *CPU) == 2
    assert f"pruned: was pruned from another model than {other}" in capsys.readouterr().err
