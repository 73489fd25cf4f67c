"""Clumsy and hostile inputs on the command line: each ends in one line, and nothing is lost.

The kinds are those of a collection of over five hundred inputs that people gave, or might give.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
from safetensors.torch import load_file, save_file
from test_cli import ecodiff

ROOT = Path(__file__).parents[1]
TOY = ROOT / "resources/toys/toy-flux"
CALL = "{num_inference_steps: 1, height: 64, width: 64, max_sequence_length: 16}"
CPU = ("--load", "device: cpu")
pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Case:
    """A command that must be refused.

    Attributes:
        name: which kind it stands for.
        words: the command; files are named relative to the working folder.
        line: what its last line says, as a regular expression.
        before: what is done in the working folder first.
        status: how it ends: 2 where the user is at fault, 1 where the machine is.
    """

    name: str
    words: tuple[object, ...]
    line: str
    before: Callable[[Path], object] = lambda folder: None
    status: int = 2


def text(name: str, content: str | bytes) -> Callable[[Path], object]:
    """Writes a file."""
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(data)


def thesis(folder: Path) -> None:
    """A folder and a file of the user's own."""
    (folder / "d").mkdir()
    (folder / "d/thesis").write_text("years of work")
    (folder / "own.txt").write_text("mine")


def toy(folder: Path) -> Path:
    """A copy of the toy that may be damaged."""
    shutil.copytree(TOY, folder / "toy")
    return folder / "toy"


def without_tokenizer(folder: Path) -> None:
    (toy(folder) / "tokenizer_2/tokenizer.json").unlink()


def with_a_layer_too_many(folder: Path) -> None:
    path = toy(folder) / "text_encoder/config.json"
    config = json.loads(path.read_text())
    config["num_hidden_layers"] += 1
    path.write_text(json.dumps(config))


def with_nan(folder: Path) -> None:
    path = toy(folder) / "transformer/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    next(iter(weights.values())).fill_(float("nan"))
    save_file(weights, path, metadata={"format": "pt"})


def with_an_unknown_class(folder: Path) -> None:
    path = toy(folder) / "model_index.json"
    path.write_text(path.read_text().replace("FluxPipeline", "FlexPipeline"))


def with_a_broken_tokenizer(folder: Path) -> None:
    (toy(folder) / "tokenizer_2/tokenizer.json").write_text("{")


def another_of_its_shapes(folder: Path) -> None:
    path = toy(folder) / "transformer/diffusion_pytorch_model.safetensors"
    weights = {name: value * 1.5 for name, value in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})


def pickled(folder: Path) -> None:
    toy(folder)
    for file in (folder / "toy").rglob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))


def table(folder: Path, **columns: object) -> None:
    rows = {
        "index": [0, 1],
        "prompt": ["a", "b"],
        "seed": [3, 4],
        "image": [None, None],
    }
    pd.DataFrame({**rows, **columns}).to_parquet(folder / "bad.parquet")


def table_of(**columns: object) -> Callable[[Path], object]:
    return lambda folder: table(folder, **columns)


def another_table(folder: Path) -> None:
    rows = pd.read_parquet(folder / "t.parquet")
    rows["prompt"] = rows["prompt"].tolist()[::-1]
    rows.to_parquet(folder / "other.parquet")


def shard_with_nan(folder: Path) -> None:
    shutil.copytree(folder / "images", folder / "nan")
    path = folder / "nan/latents.safetensors"
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["z0"][2] = float("nan")
    save_file(tensors, path, metadata=metadata)


SHAPES = "{source: shapeworld, count: 2}"
JUDGED_BY = {
    "features": "clip",
    "clip_model": f"local-dir:{ROOT}/resources/toys/toy-clip",
    "clip_pretrained": None,
}
TIMED = ("--call", CALL, "--settings", "batch_size: 100", *CPU)


def draw(out: str = "i", model: object = TOY, rows: str = "t.parquet") -> tuple[object, ...]:
    return ("generate", model, rows, out, "--call", CALL)


def score(out: str = "m", percent: int = 10, method: str = "magnitude") -> tuple[object, ...]:
    return ("mask", TOY, out, "--method", method, "--percent", percent)


def read(name: str, **settings: object) -> tuple[object, ...]:
    chosen = {"source": "file", "path": name, "count": 1, **settings}
    return ("prompts", "out.parquet", "--settings", json.dumps(chosen))


def judge(pictures: str, dense: str = "images", rows: str = "t.parquet") -> tuple[object, ...]:
    words = ("evaluate", "see", rows, pictures, "s.safetensors", "--dense", dense)
    return (*words, "--settings", json.dumps(JUDGED_BY))


CASES = [
    # Nothing of the user's is replaced, and nothing that is read.
    Case("B1 folder", score("d"), "d: exists", thesis),
    Case("B1 file", score("own.txt"), "own.txt: .*not written", thesis),
    Case("B1 prompts", ("prompts", "d", "--settings", SHAPES), "d", thesis),
    Case("B1 pictures", ("prompts", "p", "--pictures", "d", "--settings", SHAPES), "d: ", thesis),
    Case("B1 generate", draw("d"), "d: ", thesis),
    Case("B1 calibrate", ("calibrate", TOY, "t.parquet", "d", "--call", CALL), "d", thesis),
    Case("B1 history", (*score(), "--history", "d"), "d", thesis),
    Case("B1 its model", draw("toy", "toy"), "toy", toy),
    Case("B1 its table", ("calibrate", TOY, "t.parquet", "t.parquet", "--call", CALL), "t.parquet"),
    Case("P5 parent", score("own.txt/m"), "own.txt", thesis),
    Case("P5 long", score("x" * 300), "name"),
    Case("P5 here", draw("."), "."),
    # A pipeline is whole.
    Case("B5", draw(model="toy"), "tokenizer_2", without_tokenizer),
    Case("B6", draw(model="toy"), "text_encoder", with_a_layer_too_many),
    Case("P8", draw(model="toy"), "^(?!.*try dtype)", with_nan),
    Case("P19 class", draw(model="toy"), "FlexPipeline", with_an_unknown_class),
    Case("P19 tokenizer", draw(model="toy"), "tokenizer.json", with_a_broken_tokenizer),
    Case("pickles", draw(model="toy"), "safetensors|pickle", pickled),
    Case("no model", draw(model="none"), "source: "),
    # Prompt files.
    Case(
        "B7", read("p.csv", count=2), "line 3.*separator", text("p.csv", "prompt\na ring\na, b\n")
    ),
    Case("P1 utf-16", read("p.txt"), "UTF", text("p.txt", "a ring".encode("utf-16"))),
    Case("P1 cp1252", read("p.txt"), "line 2.*iconv", text("p.txt", b"a\ncaf\xe9\n")),
    Case("P1 empty", read("p.csv"), "p.csv", text("p.csv", "")),
    Case("P1 parquet", read("p.parquet"), "p.parquet", text("p.parquet", "no")),
    Case("P3 missing", read("none.txt"), "none.txt"),
    Case("P3 folder", read("d"), "d", thesis),
    Case("too few", read("p.txt", count=9), "9 wanted", text("p.txt", "a\nb\n")),
    Case("P10", read("p.txt", seed=2**64), "seed", text("p.txt", "a\n")),
    Case(
        "P14",
        ("prompts", "o", "--settings", '{"source": "shapeworld", "count": 1, "path": "x"}'),
        "path",
    ),
    Case("B12", ("prompts", "o", "--settings", "{source: shapeworld, count: yes}"), "count: "),
    Case("B11", ("prompts", "o", "--settings", "{count: 1, count: 2}"), "stands twice"),
    # Prompt tables.
    Case("P3 no table", draw(rows="none.parquet"), "none.parquet"),
    Case("P3 a folder", draw(rows="images"), "folder"),
    Case("B17", draw(rows="bad.parquet"), "index", table_of(index=[1, 1])),
    Case("P2 index", draw(rows="bad.parquet"), "index", table_of(index=[0, 2.5])),
    Case("P2 seed", draw(rows="bad.parquet"), "seed", table_of(seed=[1.5, 2])),
    Case("P2 prompt", draw(rows="bad.parquet"), "prompt", table_of(prompt=[None, 1])),
    # Devices, lengths, settings.
    *(
        Case(f"P4 {one}", (*draw(), "--load", f"device: {one}"), f"device.*{one}")
        for one in ("cuda", "banana", "cuda:x", "meta", "gpu")
    ),
    Case("P7", (*draw()[:-1], CALL.replace("16", "100000")), "max_sequence_length"),
    Case("P25", (*score(), "--settings", "5"), "--settings: should be a mapping"),
    Case("P25 long", (*score(), "--settings", "x" * 5000), "should be a mapping"),
    Case("P9", (*score(), "--settings", "first_logit: .nan"), "first_logit"),
    Case("P11", score(percent=99), "range"),
    Case("no method", score(method="magnitud"), "magnitud.*not one of"),
    Case("no data", score(method="wanda"), "calibration"),
    Case("no mask", ("prune", TOY, "none", "x"), "none"),
    Case("another file", ("prune", TOY, "t.parquet", "x"), "t.parquet"),
    # Results that belong together.
    Case("B21", ("prune", "toy", "mask", "x"), "another model", another_of_its_shapes),
    Case("B20", judge("images", rows="other.parquet"), "other.parquet", another_table),
    Case("B18", judge("nan"), "2", shard_with_nan),
    Case("P20 no shard", judge("none"), "none"),
    Case(
        "B24",
        ("evaluate", "efficiency", "t.parquet", "e.json", *TIMED, "--variant", f"dense={TOY}"),
        "100",
    ),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a prompt table and pictures that were drawn from it."""
    folder = tmp_path_factory.mktemp("cases")
    shapes = "{source: shapeworld, count: 4, seed: 5}"
    assert ecodiff("prompts", folder / "t.parquet", "--settings", shapes) == 0
    words = ("generate", TOY, folder / "t.parquet", folder / "images", "--call", CALL, *CPU)
    assert ecodiff(*words) == 0
    words = ("mask", TOY, folder / "mask", "--method", "magnitude", "--percent", 10, *CPU)
    assert ecodiff(*words) == 0
    return folder


def contents(folder):
    """All files below a folder, and what is in them."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_it_is_refused_in_one_line_and_nothing_is_touched(
    case, place, tmp_path, monkeypatch, capfd
):
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    case.before(tmp_path)
    before = contents(tmp_path)
    loads = case.words[0] in ("generate", "calibrate", "mask", "prune")
    capfd.readouterr()
    status = ecodiff(*case.words, *(CPU if loads and "--load" not in case.words else ()))
    error = capfd.readouterr().err
    assert status == case.status, error
    assert "Traceback" not in error
    last = error.splitlines()[-1]
    assert last.startswith("ecodiff: error: ")
    assert re.search(case.line, last.removeprefix("ecodiff: error: ")), last
    assert len(last) < 600
    assert contents(tmp_path) == before
