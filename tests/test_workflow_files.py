"""Runs on users' own files: every source to the tables, and what happens when a file changes."""

import json
import re
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image
from workflow_runs import run, tiny_models, tiny_run

pytestmark = pytest.mark.slow
CAPTIONS = ["a red ring", "a blue square, large", 'a "big" dog', "two cats | one hat"]


def _pictures(folder):
    folder.mkdir()
    for number in range(len(CAPTIONS)):
        Image.new("RGB", (80 + number, 60), (number * 60, 9, 9)).save(folder / f"{number}.jpg")


def _flickr_bars(path):
    rows = [f"{n}.jpg| 0| {text}" for n, text in enumerate(CAPTIONS)]
    path.write_text("\n".join(["image_name| comment_number| comment", *rows]))


def _flickr_raw(path):
    table = {"filename": [f"{n}.jpg" for n in range(4)], "raw": [json.dumps([t]) for t in CAPTIONS]}
    pd.DataFrame(table).to_csv(path, index=False)


def _flickr_token(path):
    path.write_text("".join(f"{n}.jpg#0\t{text}\n" for n, text in enumerate(CAPTIONS)))


def _coco(path):
    images = [{"id": n, "file_name": f"{n}.jpg"} for n in range(4)]
    notes = [{"id": 10 + n, "image_id": n, "caption": t} for n, t in enumerate(CAPTIONS)]
    path.write_text(json.dumps({"images": images, "annotations": notes}))


def _gcc(path):
    rows = [f"{text}\thttp://example.org/{n}.jpg\n" for n, text in enumerate(CAPTIONS)]
    path.write_text("".join(rows))


TABLE = pd.DataFrame({"prompt": CAPTIONS})
# Name of the set -> its source, its file and who writes that.
SOURCES = {
    "txt": ("file", "p.txt", lambda path: path.write_text("\n".join(CAPTIONS))),
    "csv": ("file", "p.csv", lambda path: TABLE.to_csv(path, index=False)),
    "parquet": ("file", "p.parquet", lambda path: TABLE.to_parquet(path)),
    "coco": ("coco", "captions.json", _coco),
    "bars": ("flickr30k", "bars.csv", _flickr_bars),
    "raw": ("flickr30k", "raw.csv", _flickr_raw),
    "token": ("flickr30k", "results.token", _flickr_token),
    "gcc": ("gcc", "gcc.tsv", _gcc),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder, of a name with a space, with a model and every kind of prompt file."""
    folder = tmp_path_factory.mktemp("a place")
    tiny_models(folder)
    _pictures(folder / "pictures")
    for _, file, write in SOURCES.values():
        write(folder / file)
    return folder


def judged_on(name):
    """A run that is judged on one of the sources."""
    config = tiny_run()
    for place, (key, (source, file, _)) in enumerate(SOURCES.items()):
        config["prompts"][key] = {"source": source, "path": file, "count": 4, "seed": 100 * place}
        if source in ("coco", "flickr30k"):
            config["prompts"][key]["images"] = "pictures"
    config["evaluate"]["prompts"] = name
    return config


def table_of(place):
    return pd.read_csv(place / "results/small/tables/main.csv")


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_goes_to_the_tables(place, name):
    done = run(place, judged_on(name))
    assert done.returncode == 0, done.stdout + done.stderr
    prompts = pd.read_parquet(place / f"results/small/prompts/{name}.parquet")
    assert sorted(prompts["prompt"]) == sorted(CAPTIONS)
    table = table_of(place)
    assert table["variant"].tolist() == ["dense", "random-20"]
    has_pictures = SOURCES[name][0] in ("coco", "flickr30k")
    assert table["fid"].notna().all() == has_pictures
    assert not (place / f"results/small/prompts/{name}").exists()


@pytest.fixture(scope="module")
def finished(place):
    """A run that is done."""
    assert run(place, judged_on("txt")).returncode == 0
    return place


def jobs(done):
    """The rules that a run went through, from the lines of finished jobs."""
    assert done.returncode == 0, done.stdout + done.stderr
    return re.findall(r"^\[\d+/\d+\] (\w+)", done.stderr, re.M)


def test_a_second_run_has_nothing_to_do(finished):
    done = run(finished, judged_on("txt"))
    assert jobs(done) == []
    assert "Nothing to be done" in done.stderr


def test_an_edited_prompt_is_drawn_anew(finished):
    before, file = table_of(finished), finished / "p.txt"
    file.write_text("\n".join(["a green triangle", *CAPTIONS[1:]]))
    done = jobs(run(finished, judged_on("txt")))
    assert {"prompts", "generate", "quality", "tables"} <= set(done)
    assert "prune" not in done
    assert table_of(finished)["clip_score"].tolist() != before["clip_score"].tolist()


def test_a_changed_weight_runs_the_model_anew(finished):
    from safetensors.torch import load_file, save_file

    [file] = (finished / "tiny/transformer").glob("*.safetensors")
    weights = load_file(file)
    next(iter(weights.values())).mul_(1.5)
    save_file(weights, file, metadata={"format": "pt"})
    done = jobs(run(finished, judged_on("txt")))
    assert {"baseline", "prune", "generate", "quality"} <= set(done)
    assert "prompts" not in done


def test_a_deleted_shard_is_drawn_again_and_nothing_else(finished):
    before = table_of(finished)
    shutil.rmtree(finished / "results/small/tiny/random-20/images/txt/0")
    done = jobs(run(finished, judged_on("txt")))
    assert sorted(done) == ["figures", "gallery", "generate", "quality", "see", "tables"]
    pd.testing.assert_frame_equal(table_of(finished), before)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda c: c["models"]["tiny"].update(source="./tony"), "models.tiny.source"),
        (lambda c: c["evaluate"].update(clip_model="local-dir:clup"), "evaluate.clip_model"),
        (lambda c: c.update(report={"published": "none.csv"}), "report.published"),
        (lambda c: c["prompts"]["txt"].update(path="q.txt"), "prompts.txt.path"),
    ],
)
def test_what_is_mistyped_after_a_run_is_refused_and_nothing_changes(finished, change, line):
    tables = finished / "results/small/tables"
    before = {file.name: file.read_bytes() for file in tables.iterdir()}
    config = judged_on("txt")
    change(config)
    done = run(finished, config)
    assert done.returncode == 2
    assert f": {line}: there is no " in done.stderr.splitlines()[-1]
    assert {file.name: file.read_bytes() for file in tables.iterdir()} == before


def test_a_deleted_prompt_file_is_refused(finished):
    (finished / "p.txt").rename(finished / "moved.txt")
    done = run(finished, judged_on("txt"))
    (finished / "moved.txt").rename(finished / "p.txt")
    assert done.returncode == 2
    assert "there is no file p.txt" in done.stderr


def test_a_users_error_in_a_job_is_said_once_and_last(finished):
    config = judged_on("txt")
    config["models"]["tiny"]["call"] = {**config["models"]["tiny"]["call"], "height": 63}
    done = run(finished, config)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    *_, last = [line for line in done.stderr.splitlines() if line.startswith("ecodiff: error: ")]
    assert "63" in last
    assert done.stderr.count("height") < 6


def test_what_only_its_user_can_mend_is_not_tried_again(finished):
    config = judged_on("txt")
    config["models"]["tiny"]["call"] = {**config["models"]["tiny"]["call"], "height": 63}
    target = "results/small/tiny/calibration.safetensors"
    done = run(finished, config, target, "--retries", 2)
    assert done.returncode == 1
    assert done.stderr.count("failed: calibrate") == 1
    assert not [*(finished / "results/small/logs/tiny").rglob("*.try-*.log")]


def test_the_environment_may_lie_in_a_folder_with_a_space(finished, tmp_path):
    place = tmp_path / "an environment"
    place.symlink_to(Path(sys.executable).parents[1])
    config = judged_on("txt")
    config["run"] = "spaced"
    python = place / "bin" / Path(sys.executable).name
    done = run(finished, config, "results/spaced/tiny/calibration.safetensors", python=python)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("source", ["$(touch pwned)/x", "`touch pwned`", "a; touch pwned"])
def test_no_path_of_a_config_reaches_the_shell_as_code(finished, source):
    evil = finished / source
    evil.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(finished / "tiny", evil, dirs_exist_ok=True)
    config = judged_on("txt")
    config["models"]["tiny"]["source"] = source
    done = run(finished, config, "results/small/tiny/calibration.safetensors")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (finished / "pwned").exists()
