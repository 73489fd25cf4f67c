from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from looks import assert_readable
from matplotlib import pyplot as plt
from safetensors.numpy import save_file

from ecodiff.config.run import Config, load_config
from ecodiff.report.ablations import ablation_table, draw, readable, write_ablations
from ecodiff.runtime.errors import UserError

CALL = {"num_inference_steps": 4, "height": 64, "width": 64}
ERRORS = {
    "default": (0.1, 0.2),
    "batch-3": (0.3, 0.4),
    "batch-2": (0.7, 0.8),
    "loss-per-step": (0.5, 0.6),
}


@pytest.fixture
def run(tmp_path: Path) -> tuple[Config, Path]:
    """A sweep of two models as the stages would have left it; `b` errs twice as much as `a`."""
    for scale, model in enumerate("ab", start=1):
        rows = [
            (name, sparsity, scale * error + 1, scale * error)
            for name, errors in ERRORS.items()
            for sparsity, error in zip((0.1, 0.2), errors, strict=True)
        ]
        folder = tmp_path / model / "ablations"
        for number, name in enumerate(ERRORS):
            (folder / name).mkdir(parents=True)
            pd.DataFrame({"seconds": [number, 10]}).to_csv(folder / name / "history.csv")
            # Each mask removes two units; the second is the default's in half of them.
            kept = {"kept/a.heads": np.arange(4) != number % 2, "kept/b.heads": np.arange(2) > 0}
            save_file(kept, folder / name / "mask.safetensors", metadata={"ecodiff": "{}"})
        table = pd.DataFrame(rows, columns=["mask", "sparsity", "latent_error", "median_error"])
        table.to_csv(folder / "mask_error.csv", index=False)
    config = load_config(
        {
            "run": "test",
            "models": {name: {"source": name, "call": CALL} for name in "ab"},
            "allow_overlap": True,
            "variants": [{"method": "random", "sparsities": [0.1]}],
            "prompts": {
                name: {"source": "shapeworld", "count": 4}
                for name in ("calibration", "evaluation", "validation")
            },
            "ablations": {
                "prompts": "validation",
                "judged_at": [0.1, 0.2],
                "vary": {"batch": [3, 2], "loss": ["per-step"]},
            },
        }
    )
    return config, tmp_path


def test_a_row_a_model_point_and_sparsity(run: tuple[Config, Path]) -> None:
    table = ablation_table(*run)
    assert len(table) == 2 * 4 * 2
    found = table.set_index(["model", "setting", "value", "sparsity"]).loc[("b", "batch", "3", 0.2)]
    assert (found["latent_error"], found["median_error"]) == (1.8, 0.8)
    assert found["seconds"] == 11
    assert found["common"] == 0.5


def test_sparsities_stand_side_by_side(run: tuple[Config, Path]) -> None:
    table = ablation_table(*run)
    shown = readable(table[table["model"] == "a"])
    assert shown.to_numpy().tolist() == [
        ["default", "", "100.00", "200.00", "1.1000", "1.2000", "100", "10"],
        ["batch", "3", "300.00", "400.00", "1.3000", "1.4000", "50", "11"],
        ["batch", "2", "700.00", "800.00", "1.7000", "1.8000", "100", "12"],
        ["loss", "per-step", "500.00", "600.00", "1.5000", "1.6000", "50", "13"],
    ]


def test_the_figure_has_a_panel_a_model_and_a_marker_a_number(run: tuple[Config, Path]) -> None:
    figure = draw(ablation_table(*run))
    assert [axis.get_title() for axis in figure.axes] == ["a", "b"]
    drawn = [line for line in figure.axes[1].get_lines() if line.get_marker() == "o"]
    assert [line.get_xdata().tolist() for line in drawn] == [
        [0.2, 0.6, 1.4, 1.0],
        [0.4, 0.8, 1.6, 1.2],
    ]
    names = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert names == ["default", "batch 3", "batch 2", "loss per-step"]
    named = ablation_table(*run).assign(setting="modulation of the channels")
    assert_readable(draw(named))
    plt.close(figure)


def test_tables_and_figures_are_written(run: tuple[Config, Path]) -> None:
    write_ablations(ablation_table(*run), run[1])
    assert "| batch | 3 | 300.00 |" in (run[1] / "tables/ablations.md").read_text()
    assert len(pd.read_csv(run[1] / "tables/ablations.csv")) == 16
    for suffix in ("png", "pdf"):
        assert (run[1] / f"figures/ablations.{suffix}").stat().st_size > 1000


def test_what_is_missing_is_named(run: tuple[Config, Path]) -> None:
    config, folder = run
    (folder / "b/ablations/batch-3/history.csv").unlink()
    with pytest.raises(UserError, match=r"b/ablations/batch-3/history.csv"):
        ablation_table(config, folder)
    with pytest.raises(UserError, match="ablations is null"):
        ablation_table(config.model_copy(update={"ablations": None}), folder)
