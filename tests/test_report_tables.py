from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from safetensors.numpy import save_file
from synthetic import PRUNED, write_run

from ecodiff.config.sections import EvaluateSettings
from ecodiff.report.results import Results
from ecodiff.report.style import QUALITY, colour, label, method
from ecodiff.report.tables import how_measured, main_table, print_table, write_tables
from ecodiff.runtime.errors import UserError


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return write_run(tmp_path_factory.mktemp("run"), ("toy-sdxl",))


def test_a_row_for_each_variant_with_the_values_of_its_files(results: Results) -> None:
    table = main_table(results).set_index("variant")
    assert list(table.index) == ["dense", *PRUNED]
    row = table.loc["ecodiff-20-comp"]
    folder = results.folder / "toy-sdxl"
    judged = json.loads((folder / "ecodiff-20-comp/quality/evaluation.json").read_text())
    cost = json.loads((folder / "efficiency.json").read_text())["ecodiff-20-comp"]
    for metric in QUALITY:
        assert row[metric.key] == judged[metric.key]
    for key in ("parameters", "gmacs", "latency_ms_per_image", "peak_memory_mb", "disk_mb"):
        assert row[key] == cost[key]
    assert row["method"] == "EcoDiff + least squares"
    assert row["target_sparsity"] == 0.2


def test_each_prompt_set_has_a_block_of_columns(tmp_path: Path) -> None:
    results = write_run(tmp_path, ("toy-flux",), ["random-20"], ("coco", "flickr30k"))
    path = tmp_path / "toy-flux/random-20/quality/flickr30k.json"
    judged = json.loads(path.read_text()) | {"fid": 12.5, "resampled": {"fid": [12.0, 13.0]}}
    path.write_text(json.dumps(judged))
    table = main_table(results)
    row = table.set_index("variant").loc["random-20"]
    assert row["fid"] == results.quality("toy-flux", results.of("toy-flux")[1])["fid"] != 12.5
    assert row["fid_flickr30k"] == 12.5
    assert row["fid_flickr30k_se"] == pytest.approx(0.5**0.5)
    write_tables(table, tmp_path / "tables", sets=results.sets)
    header, _, _, line, *_ = (tmp_path / "tables/main.md").read_text().splitlines()[2:]
    cells = dict(zip(header.split("|"), line.split("|"), strict=True))
    assert cells[" flickr30k: FID ↓ "] == " 12.50 ± 0.71 "
    names = [*cells]
    blocks = [[n for n in names if n.startswith(f" {name}: ")] for name in results.sets]
    assert len(blocks[0]) == len(blocks[1]) == len(QUALITY)
    assert names.index(blocks[0][-1]) + 1 == names.index(blocks[1][0])


def test_exact_sparsity_is_that_of_the_counted_parameters(results: Results) -> None:
    row = main_table(results).set_index("variant").loc["magnitude-30"]
    assert row["sparsity"] == 1 - 2098800 / 3000000  # not the target
    assert main_table(results)["sparsity"][0] == 0


def test_unmeasured_efficiency_leaves_its_columns_out(tmp_path: Path) -> None:
    results = write_run(tmp_path, ("toy-flux",))
    (tmp_path / "toy-flux" / "efficiency.json").unlink()
    table = main_table(results)
    assert table["sparsity"][3] == pytest.approx(0.3004)  # the mask's
    write_tables(table, tmp_path / "tables")
    assert "GMACs" not in (tmp_path / "tables" / "main.md").read_text()


def test_the_csv_reads_back_and_identical_pictures_have_infinite_psnr(
    results: Results, tmp_path: Path
) -> None:
    table = main_table(results)
    write_tables(table, tmp_path)
    again = pd.read_csv(tmp_path / "main.csv")
    pd.testing.assert_frame_equal(again, table)
    assert np.isinf(again["psnr"][0])


def test_every_number_of_the_markdown_stands_under_a_name_with_its_unit(
    results: Results, tmp_path: Path
) -> None:
    write_tables(main_table(results), tmp_path)
    header, _, dense, first, *_ = (tmp_path / "main.md").read_text().splitlines()[2:]
    cells = dict(zip(header.split("|"), first.split("|"), strict=True))
    assert cells[" Scene accuracy (%) ↑ "] == " 94.4 "
    assert cells[" Parameters (M) "] == " 4.20 "
    assert cells[" Time an image (ms) "].strip().startswith("3")
    assert cells[" Exact sparsity (%) "] == " 10.04 "
    assert (
        dict(zip(header.split("|"), dense.split("|"), strict=True))[" PSNR to dense (dB) ↑ "]
        == " ∞ "
    )


def test_the_latex_is_ascii_and_escaped(results: Results, tmp_path: Path) -> None:
    write_tables(main_table(results), tmp_path)
    text = (tmp_path / "main.tex").read_text()
    assert text.isascii()
    assert r"Scene accuracy (\%) $\uparrow$" in text
    rows = [line for line in text.splitlines() if line.startswith("toy-sdxl")]
    assert len(rows) == len(PRUNED) + 1
    assert {row.count(" & ") for row in rows} == {19}


def test_published_results_stand_below_ours(results: Results, tmp_path: Path) -> None:
    published = tmp_path / "published.csv"
    published.write_text("model,method,coco_fid\nSDXL,dense,27.43\nSDXL,EcoDiff,\n")
    write_tables(main_table(results), tmp_path, published)
    assert "| SDXL | dense | 27.43 |\n| SDXL | EcoDiff | - |" in (tmp_path / "main.md").read_text()
    with pytest.raises(UserError, match=r"none\.csv: there is no such file"):
        write_tables(main_table(results), tmp_path, tmp_path / "none.csv")


def test_the_papers_results_can_stand_below_ours(results: Results, tmp_path: Path) -> None:
    published = Path(__file__).parents[1] / "resources/published.csv"
    write_tables(main_table(results), tmp_path, published)
    text = (tmp_path / "main.md").read_text()
    assert "| SDXL | EcoDiff | 0.2 | 2.1 | 32.19 | 0.33 | 40.91 | EcoDiff paper main table" in text
    assert text.count(" (via a digest) |") + text.count("arXiv 2510.06751 |") == 29


def test_the_printed_table_fits_its_width_without_cuts(results: Results) -> None:
    out = io.StringIO()
    print_table(main_table(results), Console(file=out, width=120))
    text = out.getvalue()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 120
    assert text.count("EcoDiff + least squares") == 3


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    results = write_run(tmp_path, ("toy-sdxl",))
    path = tmp_path / "toy-sdxl/random-10/quality/evaluation.json"
    path.write_text("{")
    with pytest.raises(UserError, match=r"random-10.quality.evaluation\.json: cannot be read"):
        main_table(results)
    path.unlink()
    with pytest.raises(
        UserError, match=r"random-10.quality.evaluation\.json: there is no such file"
    ):
        main_table(results)


def test_what_may_be_better_by_chance_alone_is_marked(tmp_path: Path) -> None:
    """Both variants' FID goes up and down together, so that a small gap is told all the same."""
    results = write_run(tmp_path, ("toy-flux",), ["ecodiff-20", "random-20", "magnitude-20"])
    drawn = {"ecodiff": [9.0, 10, 11], "random": [9.5, 10.6, 11.6], "magnitude": [12.0, 9, 10]}
    for method_, values in drawn.items():
        path = tmp_path / f"toy-flux/{method_}-20/quality/evaluation.json"
        judged = json.loads(path.read_text()) | {"fid": sum(values) / 3}
        path.write_text(json.dumps(judged | {"resampled": {"fid": values}}))
    table = main_table(results)
    rows = table.set_index("variant")
    assert rows["fid_se"]["ecodiff-20"] == 1
    assert [rows["fid_tied"][name] for name in ("ecodiff-20", "random-20")] == [False, False]
    assert rows["fid_tied"]["magnitude-20"] is True
    write_tables(table, tmp_path / "tables")
    text = (tmp_path / "tables/main.md").read_text()
    assert "| 10.00 ± 1.00 |" in text
    assert "| 10.33 ± 1.53 ≈ |" in text
    assert (tmp_path / "tables/main.tex").read_text().isascii()


def test_efficiency_of_an_older_run_is_refused(tmp_path: Path) -> None:
    results = write_run(tmp_path, ("toy-sdxl",))
    path = tmp_path / "toy-sdxl" / "efficiency.json"
    measured = json.loads(path.read_text())
    del measured["random-30"]
    path.write_text(json.dumps(measured))
    with pytest.raises(UserError, match=r"has no variant random-30"):
        main_table(results)


@pytest.mark.parametrize(
    ("file", "variant", "key", "value", "error"),
    [
        ("quality", "random-30", "ssim", "missing", "random-30 has no ssim"),
        ("quality", "dense", "psnr", "missing", "dense has no psnr"),
        ("quality", "random-30", "fid", "bad", "fid of random-30 is 'bad'"),
        ("quality", "random-30", "fid", None, "has no fid, others have"),
        ("quality", "random-30", "fid", float("nan"), "NaN is no JSON"),
        ("efficiency", "dense", "gmacs", "missing", "dense has no gmacs"),
        ("efficiency", "dense", "gmacs", None, "gmacs of dense is None"),
        ("efficiency", "dense", "device", "missing", "dense has no device"),
    ],
)
def test_a_number_that_is_missing_or_none_is_named(
    tmp_path: Path, file: str, variant: str, key: str, value: object, error: str
) -> None:
    results = write_run(tmp_path, ("toy-sdxl",))
    own = file == "quality"  # a file of each variant
    path = tmp_path / "toy-sdxl" / (f"{variant}/quality/evaluation" if own else file)
    path = path.with_suffix(".json")
    found = json.loads(path.read_text())
    values = found if own else found[variant]
    if value == "missing":
        del values[key]
    else:
        values[key] = value
    path.write_text(json.dumps(found))
    with pytest.raises(UserError, match=rf"{path.name}: .*{error}"):
        main_table(results)


def test_a_bar_or_a_new_line_in_a_cell_ends_no_cell(results: Results, tmp_path: Path) -> None:
    published = tmp_path / "published.csv"
    published.write_text('model,method\nSDXL,"a|b\nc"\n')
    write_tables(main_table(results), tmp_path, published)
    assert "| SDXL | a\\|b c |\n" in (tmp_path / "main.md").read_text()


def test_a_mask_without_its_sparsity_is_named(tmp_path: Path) -> None:
    results = write_run(tmp_path, ("toy-sdxl",))
    path = tmp_path / "toy-sdxl/ecodiff-20/model/mask.safetensors"
    save_file({"kept/a.heads": np.ones(2, bool)}, path, metadata={"ecodiff": "{}"})
    with pytest.raises(UserError, match=r"mask\.safetensors: its sparsity is None"):
        main_table(results)


def test_methods_differ_in_colour_and_every_variant_in_name(results: Results) -> None:
    variants = results.of("toy-sdxl")
    assert len({label(variant) for variant in variants}) == len(variants)
    plain = [variant for variant in variants if variant.retrain is None]
    assert len({colour(v) for v in plain}) == len({method(v) for v in plain})
    assert {one.better for one in QUALITY} == {"higher", "lower"}


def test_the_report_starts_without_torch() -> None:
    code = (
        "import sys, ecodiff.report.tables, ecodiff.report.figures;sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({}, ["Inception's 2,048", "open_clip's ViT-B-16 (datacomp_xl_s13b_b90k)"]),
        (
            {"features": "clip", "clip_model": "local-dir:toy", "clip_pretrained": None},
            ["FID and KID on open_clip's local-dir:toy;"],
        ),
    ],
)
def test_the_library_and_settings_of_each_metric_stand_below(
    results: Results, tmp_path: Path, settings: dict[str, str], named: list[str]
) -> None:
    notes = how_measured(EvaluateSettings(**settings))
    write_tables(main_table(results), tmp_path, notes=notes)
    assert (tmp_path / "main.md").read_text().endswith(notes)
    assert all(part in notes for part in named)
