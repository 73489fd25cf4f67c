from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot as plt
from synthetic import write_run
from tiny import tiny

from ecodiff.config.variants import Variant
from ecodiff.models.structures import discover
from ecodiff.report.analysis import analysis, common, overlaps, part_of, removed_of_parts


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("down_blocks.1.attentions.0.transformer_blocks.0.attn1.heads", "self-attention"),
        ("down_blocks.1.attentions.0.transformer_blocks.0.attn2.heads", "cross-attention"),
        ("mid_block.attentions.0.transformer_blocks.0.ff.neurons", "feed-forward"),
        ("transformer_blocks.0.attn.heads", "joint attention"),
        ("transformer_blocks.0.ff_context.neurons", "feed-forward of the text"),
        ("single_transformer_blocks.3.attn.heads", "attention, single stream"),
        ("single_transformer_blocks.3.neurons", "feed-forward, single stream"),
        ("norm_out.modulation", "modulation"),
        ("norm_out.linear.directions", "directions of modulation"),
    ],
)
def test_a_structure_belongs_to_a_part(name: str, part: str) -> None:
    assert part_of(name) == part


@pytest.mark.parametrize("family", ["flux", "sdxl"])
def test_every_structure_of_a_model_has_a_part(family: str) -> None:
    assert all(part_of(s.name) for s in discover(tiny(family)))


def test_a_part_pools_the_units_of_its_layers() -> None:
    kept = {
        "transformer_blocks.0.attn.heads": np.array([True, False]),
        "transformer_blocks.1.attn.heads": np.array([True, True, True, False, True, True]),
        "norm_out.modulation": np.array([False, False]),
    }
    assert removed_of_parts(kept) == {"joint attention": 0.25, "modulation": 1.0}


def test_what_is_common_is_counted_in_the_smaller_set() -> None:
    small, large = np.array([1, 1, 0, 0], bool), np.array([1, 0, 1, 1], bool)
    assert common(small, large) == common(large, small) == 0.5
    assert common(np.zeros(4, bool), large) == 0


def test_overlap_is_the_mean_over_pairs_of_seeds() -> None:
    def mask(*gone: int) -> dict[str, np.ndarray]:
        return {"a.neurons": np.array([i not in gone for i in range(8)])}

    masks = {
        Variant.parse("ecodiff-20-s0"): mask(0, 1),
        Variant.parse("ecodiff-20-s1"): mask(0, 1),
        Variant.parse("ecodiff-20-s2"): mask(1, 2),
        Variant.parse("magnitude-20"): mask(5, 6),  # one seed agrees with nobody
    }
    (row,) = overlaps(masks).itertuples()
    assert (row.variant.method, row.percent) == ("ecodiff", 20)
    assert row.overlap == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert row.chance == 0.25


def test_a_panel_for_each_question_and_a_line_for_each_part(tmp_path: Path) -> None:
    seeds = [f"{m}-{p}-s{s}" for m in ("ecodiff", "random") for p in (10, 30) for s in (0, 1)]
    results = write_run(tmp_path, ("toy-flux",), seeds)
    parts, objects, seeds = analysis(results, "toy-flux").axes
    lines = {line.get_label(): line for line in parts.get_lines()}
    assert set(lines) == {
        "joint attention",
        "attention, single stream",
        "feed-forward",
        "feed-forward, single stream",
        "modulation",
    }
    assert list(lines["modulation"].get_xdata()) == [10, 30]
    first = {line.get_label(): line.get_ydata()[0] for line in objects.get_lines()}
    assert first == {"EcoDiff, one object": 99, "EcoDiff, two objects": 91}
    assert [line.get_label() for line in seeds.get_lines()] == ["EcoDiff", "Random", "by accident"]


def test_masks_are_known_by_variants_that_are_compensated_or_retrained(tmp_path: Path) -> None:
    results = write_run(tmp_path, ("toy-sdxl",), ["ecodiff-20-lora", "magnitude-20-comp"])
    (parts,) = analysis(results, "toy-sdxl").axes
    assert {line.get_label() for line in parts.get_lines()} >= {"self-attention", "feed-forward"}


def test_without_seeds_there_is_nothing_to_compare(tmp_path: Path) -> None:
    figure = analysis(write_run(tmp_path, ("toy-sdxl",)), "toy-sdxl")
    assert [axis.get_title() for axis in figure.axes] == [
        "Which parts go first\n(EcoDiff)",
        "Captions of one and of two objects",
    ]
