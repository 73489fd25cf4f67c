from pathlib import Path

import pandas as pd
import pytest

from ecodiff.report.ranking import ranking, side_by_side, write_ranking
from ecodiff.report.style import QUALITY


@pytest.fixture
def table() -> pd.DataFrame:
    """Two methods at 20 %, one of them with two seeds; one at 30 %; and the dense model."""
    rows = [
        ("a", "Dense", 0.0, 0.0),
        ("a", "Random", 0.2, 0.5),
        ("a", "EcoDiff", 0.2, 0.1),
        ("a", "EcoDiff", 0.2, 0.3),
        ("a", "Random", 0.3, 0.9),
    ]
    table = pd.DataFrame(rows, columns=["model", "method", "target_sparsity", "latent_error"])
    others = [metric.key for metric in QUALITY if metric.key != "latent_error"]
    return table.assign(**dict.fromkeys(others, 0.25))


def test_methods_are_ranked_by_the_mean_over_their_seeds(table: pd.DataFrame) -> None:
    found = ranking(table)
    places = found[["target_sparsity", "rank", "method", "seeds"]].to_numpy().tolist()
    assert places == [[0.2, 1, "EcoDiff", 2], [0.2, 2, "Random", 1], [0.3, 1, "Random", 1]]
    assert found["latent_error"][0] == pytest.approx(0.2)
    assert found["latent_error_std"][0] == pytest.approx((0.02) ** 0.5)  # of a sample of two
    assert pd.isna(found["latent_error_std"][1])


def test_a_deviation_is_shown_where_there_is_one(table: pd.DataFrame, tmp_path: Path) -> None:
    write_ranking(table, tmp_path)
    text = (tmp_path / "ranking.md").read_text()
    assert "# a, 20% removed" in text
    assert "| 0.2000 ± 0.1414 |" in text
    assert "| 0.5000 |" in text
    assert len(pd.read_csv(tmp_path / "ranking.csv")) == 3


def test_sparsities_stand_side_by_side_with_the_best_in_bold(table: pd.DataFrame) -> None:
    error = next(metric for metric in QUALITY if metric.key == "latent_error")
    shown = side_by_side(ranking(table), error)
    assert shown.columns.tolist() == ["Method", "20%", "30%"]
    assert shown.to_numpy().tolist() == [
        ["EcoDiff", "**0.2000 ± 0.1414**", "-"],
        ["Random", "0.5000", "**0.9000**"],
    ]
    higher = next(metric for metric in QUALITY if metric.better == "higher")
    better = ranking(table.assign(**{higher.key: [0.9, 0.1, 0.2, 0.2, 0.3]}))
    assert side_by_side(better, higher)["20%"][0].startswith("**")  # EcoDiff's .2, not Random's .1
