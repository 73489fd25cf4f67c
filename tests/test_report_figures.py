from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from looks import assert_readable
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file
from synthetic import SHARD, STRUCTURES, write_latents, write_run

from ecodiff.cli.report import figures as draw_figures
from ecodiff.config.methods import METHODS
from ecodiff.config.variants import Variant
from ecodiff.models.identity import LATENTS
from ecodiff.report.figures import FIGURES, draw
from ecodiff.report.pictures import _depth, _short
from ecodiff.report.results import Results
from ecodiff.report.style import QUALITY, method
from ecodiff.runtime.errors import UserError
from ecodiff.toys import world


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def panels(figure: Figure) -> dict[str, plt.Axes]:
    """Panels by their title, or else by what they show."""
    drawn = [axis for axis in figure.axes if axis.axison]
    return {axis.get_title() or " ".join(axis.get_ylabel().split()): axis for axis in drawn}


@pytest.mark.parametrize("name", FIGURES)
def test_every_axis_is_named_and_all_can_be_read(name: str, results: Results) -> None:
    figure = FIGURES[name](results, "toy-flux")
    figure.canvas.draw()
    for axis in figure.axes:
        # Rows of variants and pictures speak for themselves; a colour bar has one axis.
        assert name == "pictures" or not axis.axison or axis.get_xlabel() or axis.get_ylabel()
        if name in ("learning", "mask-cost"):
            assert axis.get_xlabel() and axis.get_ylabel()
    assert_readable(figure)


def test_quality_has_a_panel_a_metric_and_a_line_a_method(results: Results) -> None:
    axes = panels(FIGURES["quality"](results, "toy-sdxl"))
    assert list(axes) == [metric.title for metric in QUALITY]
    fid = {line.get_label(): line for line in axes["FID ↓"].get_lines()}
    methods = {method(v) for v in results.of("toy-sdxl") if not v.is_dense}
    assert set(fid) == methods | {"Dense"}
    found = [results.quality("toy-sdxl", v)["fid"] for v in results.of("toy-sdxl")]
    assert list(fid["EcoDiff"].get_ydata()) == found[1:4]
    assert fid["EcoDiff"].get_xdata() == pytest.approx([10.04, 20.04, 30.04])


def test_a_metric_that_was_not_measured_has_no_panel(tmp_path: Path) -> None:
    results = write_run(tmp_path, ("toy-sdxl",))
    for path in tmp_path.rglob("quality/*.json"):
        path.write_text(
            path.read_text().replace('"scene_accuracy": 0.', '"scene_accuracy": null, "x": 0.')
        )
    assert "Scene accuracy (%) ↑" not in panels(FIGURES["quality"](results, "toy-sdxl"))


def test_removed_shows_the_share_of_units_in_the_order_of_the_forward_pass(
    results: Results,
) -> None:
    axes = panels(FIGURES["removed"](results, "toy-flux"))
    assert set(axes) >= {"Attention heads", "FFN neurons", "Modulation channels"}
    neurons = axes["FFN neurons"]
    masks = results.masks("toy-flux")
    shown = neurons.get_images()[0].get_array()
    single = [label.get_text() for label in neurons.get_xticklabels()].index("single 10")
    expected = results.removed("toy-flux", masks[2])["single_transformer_blocks.10.neurons"]
    assert shown[2, single] == pytest.approx(100 * expected)
    assert shown.shape == (9, 14)


def test_masks_that_take_modulation_in_another_way_have_a_panel_of_their_own(
    tmp_path: Path,
) -> None:
    results = write_run(tmp_path, ("toy-flux",), ["ecodiff-10", "random-10"])
    mask = tmp_path / "toy-flux/ecodiff-10/model/mask.safetensors"
    with safe_open(mask, framework="np") as file:
        kept, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    named = {key.replace(".modulation", ".directions"): units for key, units in kept.items()}
    save_file(named, mask, metadata=metadata)
    axes = panels(FIGURES["removed"](results, "toy-flux"))
    rows = {name: [text.get_text() for text in axes[name].get_yticklabels()] for name in axes}
    assert rows["FFN neurons"] == ["EcoDiff, 10 %", "Random, 10 %"]
    assert rows["Modulation channels"] == ["Random, 10 %"]
    assert rows["Directions of what modulation reads"] == ["EcoDiff, 10 %"]


def test_layers_are_ordered_as_they_run_and_named_shortly() -> None:
    names = [
        "single_transformer_blocks.10.attn.heads",
        "single_transformer_blocks.9.attn.heads",
        "transformer_blocks.2.attn.heads",
        "norm_out.modulation",
    ]
    assert sorted(names, key=_depth) == [names[2], names[1], names[0], names[3]]
    unet = ["up_blocks.0.x.heads", "mid_block.x.heads", "down_blocks.1.x.heads"]
    assert sorted(unet, key=_depth) == unet[::-1]
    long = "down_blocks.1.attentions.0.transformer_blocks.3.attn1.heads"
    assert _short(long) == "down 1.0.3 attn1"
    assert _short("mid_block.attentions.0.transformer_blocks.1.ff.neurons") == "mid 0.1 ff"
    assert _short(names[0]) == "single 10 attn"
    assert _short(names[2]) == "double 2 attn"
    assert _short(names[3]) == "norm_out"


def test_the_grid_holds_the_pictures_themselves(results: Results) -> None:
    figure = FIGURES["pictures"](results, "toy-sdxl")
    mosaic = figure.axes[0].get_images()[0].get_array()
    variants = results.of("toy-sdxl")
    size = 64 + 6
    assert mosaic.shape == (len(variants) * size, results.examples * size, 3)
    place = mosaic[5 * size : 5 * size + 64, 2 * size : 2 * size + 64]
    assert (place == results.picture("toy-sdxl", variants[5], 2)).all()
    assert "30 %" in figure.axes[0].get_yticklabels()[3].get_text()


def test_cost_bars_are_the_measured_values(results: Results) -> None:
    figure = FIGURES["cost"](results, "toy-sdxl")
    named = {axis.get_xlabel().replace("\n", " "): axis for axis in figure.axes}
    memory = named["Peak memory (MB)"]
    measured = results.efficiency("toy-sdxl")
    widths = [patch.get_width() for patch in memory.patches]
    assert widths == [one["peak_memory_mb"] for one in measured.values()]


def test_an_iteration_that_does_not_fit_leaves_a_gap(tmp_path: Path) -> None:
    results = write_run(tmp_path, ("toy-sdxl",))
    path = tmp_path / "toy-sdxl" / "mask_cost.csv"
    table = pd.read_csv(path)
    table.loc[table["steps"] == 16, ["seconds", "floor_seconds", "peak_memory_mb"]] = None
    table.to_csv(path, index=False)
    axes = panels(FIGURES["mask-cost"](results, "toy-sdxl"))
    assert len(axes) == 2


def test_figures_are_written_as_png_and_pdf_with_fonts_within(
    results: Results, tmp_path: Path
) -> None:
    draw("mask-cost", results, "toy-sdxl", tmp_path)
    assert Image.open(tmp_path / "mask-cost-toy-sdxl.png").width == 5.5 * 220
    content = (tmp_path / "mask-cost-toy-sdxl.pdf").read_bytes()
    assert content.startswith(b"%PDF")
    assert b"/FontFile2" in content and b"/Type3" not in content


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """All methods, each with and without least squares."""
    pruned = [f"{one}-{p}{comp}" for one in METHODS for comp in ("", "-comp") for p in (10, 30)]
    return write_run(tmp_path_factory.mktemp("crowd"), ("toy-flux",), pruned)


@pytest.mark.parametrize("name", FIGURES)
def test_figures_of_many_methods_can_be_read(name: str, crowd: Results) -> None:
    assert_readable(FIGURES[name](crowd, "toy-flux"))


def test_many_methods_are_told_apart_a_few_at_a_time(crowd: Results) -> None:
    figure = FIGURES["quality"](crowd, "toy-flux")
    first = [axis for axis in figure.axes if axis.get_legend()]
    legends = [axis.get_legend().get_texts() for axis in first]
    shown = [{text.get_text().replace("\n", " ") for text in legend} for legend in legends]
    assert all(len(names - {"Dense"}) <= 6 for names in shown)
    assert set.union(*shown) == {method(v) for v in crowd.of("toy-flux")}
    assert all(len(axis.get_lines()) == 2 * len(METHODS) + 1 for axis in first)  # others are grey


def test_unknown_figures_and_models_are_refused(results: Results, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"figure: 'pie' is not one of quality, pictures"):
        draw("pie", results, "toy-sdxl", tmp_path)
    with pytest.raises(UserError, match=r"no model 'sd4'; there are toy-sdxl, toy-flux"):
        draw("quality", results, "sd4", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_run_has_the_figures_that_each_of_its_models_can_fill(tmp_path: Path) -> None:
    """Only toy-flux has a learned mask; nothing was timed."""
    write_run(tmp_path, pruned=["random-10"])
    write_run(tmp_path / "other", ("toy-flux",), ["random-10", "ecodiff-10"])
    shutil.rmtree(tmp_path / "toy-flux")
    (tmp_path / "other/toy-flux").rename(tmp_path / "toy-flux")
    call = {"num_inference_steps": 2, "height": 64, "width": 64}
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump(
            {
                "run": "some",
                "models": {name: {"source": f"a/{name}", "call": call} for name in STRUCTURES},
                "variants": [
                    {"method": "random", "sparsities": [0.1]},
                    {"method": "ecodiff", "sparsities": [0.1], "models": ["toy-flux"]},
                ],
                "prompts": {
                    "calibration": {"source": "shapeworld", "count": 20, "seed": 100},
                    "evaluation": {"source": "shapeworld", "count": 10, "split": "held-out"},
                },
                "evaluate": {"efficiency": None, "mask_cost": None},
                "generate": {"shard_size": SHARD},
            }
        )
    )
    draw_figures(tmp_path, only=["learning", "removed"])
    drawn = sorted(file.stem for file in (tmp_path / "figures").glob("*.png"))
    assert drawn == ["learning-toy-flux", "removed-toy-flux", "removed-toy-sdxl"]
    with pytest.raises(UserError, match=r"--only: 'cost' is no figure of this run; it has quality"):
        draw_figures(tmp_path, only=["cost"])


def test_learning_curves_of_nothing_learned_are_refused(tmp_path: Path) -> None:
    results = write_run(tmp_path, ("toy-flux",), ["random-10"])
    with pytest.raises(UserError, match="of toy-flux, no mask was learned and no model retrained"):
        FIGURES["learning"](results, "toy-flux")


SEEDED = [f"ecodiff-{p}-s{s}" for p in (10, 30) for s in (1, 2)]


def test_a_point_of_several_seeds_is_their_mean_with_its_deviation(tmp_path: Path) -> None:
    results = write_run(tmp_path, ("toy-flux",), SEEDED)
    for name, fid in zip(SEEDED, (3.0, 5.0, 10.0, 20.0), strict=True):
        path = tmp_path / f"toy-flux/{name}/quality/evaluation.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"fid": fid}))
    axis = panels(FIGURES["quality"](results, "toy-flux"))["FID ↓"]
    line = next(one for one in axis.get_lines() if one.get_label() == "EcoDiff")
    assert line.get_ydata().tolist() == [4.0, 15.0]
    ends = [path.vertices[:, 1].tolist() for path in axis.collections[0].get_paths()]
    assert ends == [[3.0, 5.0], [10.0, 20.0]]


def test_rows_and_columns_are_of_the_first_seed_and_the_chosen_sparsities(tmp_path: Path) -> None:
    results = write_run(tmp_path, ("toy-flux",), SEEDED)
    assert [v.name for v in results.shown("toy-flux")] == ["dense", SEEDED[0], SEEDED[2]]
    chosen = replace(results, percents=frozenset({30}))
    assert [v.name for v in chosen.shown("toy-flux")] == ["dense", "ecodiff-30-s1"]
    assert [v.name for v in chosen.masks("toy-flux")] == ["ecodiff-30-s1"]
    figure = FIGURES["cost"](chosen, "toy-flux")
    names = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert names == ["Dense", "EcoDiff, 30 %, seed 1"]


def test_pictures_that_an_earlier_shard_size_left_are_never_shown(tmp_path: Path) -> None:
    """Prompt 2 lies in the shard 1 that prompts 2 and 3 once made, too."""
    results = write_run(tmp_path, ("toy-flux",))
    dense = results.of("toy-flux")[0]
    expected = results.picture("toy-flux", dense, 2)
    for number in ("0a", "3"):
        old = tmp_path / "toy-flux/dense/images" / number
        old.mkdir()
        Image.new("RGB", (64, 64), "red").save(old / "00002.png")
    assert (results.picture("toy-flux", dense, 2) == expected).all()


@pytest.mark.parametrize(
    ("name", "odd", "error"),
    [
        ("dense", {"prompts": ["x"] * SHARD}, r"prompt 2 is \('x', 2\), but \('a.*', 2\) in"),
        ("ecodiff-10", {"seeds": [7] * SHARD}, r"prompt 2 is \('a.*', 7\)"),
        ("ecodiff-10", {"call": {"height": 8}}, "call's height was 8, the other one's None"),
        ("ecodiff-10", {"dense": "other::"}, "pruned from another dense model"),
    ],
)
def test_pictures_of_another_table_call_or_model_are_never_shown(
    tmp_path: Path, name: str, odd: dict[str, object], error: str
) -> None:
    results = write_run(tmp_path, ("toy-flux",))
    variant = Variant.parse(name)
    if variant.is_dense:
        odd = {"model": "dense::", **odd}
    rng = np.random.default_rng(0)
    scenes = [world.sample_scene(rng, "held-out") for _ in range(SHARD)]
    write_latents(tmp_path / "toy-flux", variant, range(SHARD), scenes, **odd)
    with pytest.raises(UserError, match=error):
        results.picture("toy-flux", variant, 2)


@pytest.mark.parametrize("damage", ["missing", "cut", "no picture"])
def test_a_damaged_picture_is_named(tmp_path: Path, damage: str) -> None:
    results = write_run(tmp_path, ("toy-flux",))
    path = tmp_path / "toy-flux/dense/images/evaluation/0/00002.png"
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[:60] if damage == "cut" else b"text")
    with pytest.raises(UserError, match=r"00002\.png: (cannot be read|there is no such file)"):
        FIGURES["pictures"](results, "toy-flux")


def test_a_picture_of_another_size_is_named(tmp_path: Path) -> None:
    results = write_run(tmp_path, ("toy-flux",))
    Image.new("RGB", (64, 32)).save(tmp_path / "toy-flux/ecodiff-10/images/evaluation/0/00001.png")
    with pytest.raises(UserError, match=r"prompt 1, ecodiff-10: \(32, 64, 3\)"):
        FIGURES["pictures"](results, "toy-flux")


def test_a_dollar_in_a_caption_is_a_dollar(tmp_path: Path) -> None:
    results = write_run(tmp_path, ("toy-flux",))
    table = pd.read_parquet(results.prompts)
    caption = r"a $5 ring and a $x^{ box"
    table.loc[0, "prompt"] = caption
    table.to_parquet(results.prompts)
    for variant in results.of("toy-flux"):
        shard = tmp_path / "toy-flux" / variant.name / "images/evaluation/0" / LATENTS
        with safe_open(shard, framework="np") as file:
            index, metadata = file.get_tensor("index"), file.metadata()
        made = json.loads(metadata["ecodiff"])
        made["prompts"][0] = caption
        save_file({"index": index}, shard, metadata={"ecodiff": json.dumps(made)})
    draw("pictures", results, "toy-flux", tmp_path)
    figure = FIGURES["pictures"](results, "toy-flux")
    figure.canvas.draw()
    label = figure.axes[0].xaxis.get_label()
    assert label.get_text().startswith(f"1: {caption}")
    assert not label.get_parse_math()


@pytest.mark.parametrize(
    ("file", "figure"),
    [
        ("mask_cost.csv", "mask-cost"),
        ("masks/ecodiff-10/history.csv", "learning"),
        ("ecodiff-30-lora/model/history.csv", "learning"),
    ],
)
@pytest.mark.parametrize("content", ["", "a,b\n1,2\n", b"\xff\xfe"])
def test_a_table_that_is_none_is_named(tmp_path: Path, file: str, figure: str, content) -> None:
    results = write_run(tmp_path, ("toy-flux",))
    path = tmp_path / "toy-flux" / file
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=path.name):
        FIGURES[figure](results, "toy-flux")
