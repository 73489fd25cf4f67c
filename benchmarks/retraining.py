"""What retraining wins back: `python benchmarks/retraining.py results/retrain docs`.

Prints a table, a row for each base and recipe of the run (means over seeds, ± their standard
deviation), and draws `retraining.png` into the second folder: scenes and error against the numbers
of steps and of prompts, for recipes that differ from `full` in that alone, where most was lost.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
from matplotlib import pyplot as plt

from ecodiff.config.run import Config, load_config
from ecodiff.config.variants import Variant
from ecodiff.report.tables import markdown

METRICS = {  # of main.csv: what they are called, their scale and digits
    "scene_accuracy": ("scenes (%)", 100, ".1f"),
    "latent_error": ("mean error", 1, ".4f"),
    "latent_error_median": ("median (10⁻³)", 1000, ".2f"),
}
VARIED = {"steps": "steps", "prompts": "prompts whose trajectory was recorded"}


def rows_of(run: Path) -> pd.DataFrame:
    """The main table with a row a retrained variant, and its base's values beside its own."""
    table = pd.read_csv(run / "tables" / "main.csv").set_index(["model", "variant"])
    rows = []
    for (model, name), found in table.iterrows():
        variant = Variant.parse(name)
        if variant.retrain:
            before = table.loc[model, replace(variant, retrain=None).name]
            dense = table.loc[model, "dense"]
            row = {"model": model, "percent": variant.percent, "recipe": variant.retrain}
            row["seed"] = variant.seed
            for key in METRICS:
                row |= {key: found[key], f"{key} before": before[key], f"{key} dense": dense[key]}
            rows.append(row)
    return pd.DataFrame(rows)


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """A row a base and recipe, each metric as `before -> after`."""
    lines = []
    for (model, percent, recipe), found in rows.groupby(["model", "percent", "recipe"], sort=False):
        line = {"model": model, "removed": f"{percent} %", "recipe": recipe, "seeds": len(found)}
        for key, (name, scale, digits) in METRICS.items():
            ends = [scale * found[f"{key} before"], scale * found[key]]
            line[name] = " -> ".join(with_spread(values, digits) for values in ends)
        lines.append(line)
    return pd.DataFrame(lines)


def with_spread(values: pd.Series, digits: str) -> str:
    """The mean, and with several seeds their standard deviation."""
    text = format(values.mean(), digits)
    return text if len(values) == 1 else f"{text} ± {values.std(ddof=0):{digits}}"


def alike(config: Config, key: str) -> dict[str, int]:
    """Recipes that differ from `full` in `key` alone: name -> value; of prompts, their number."""
    recipes = {name: recipe.model_dump() for name, recipe in config.retrain.items()}
    rest = {name: {**recipe, key: None} for name, recipe in recipes.items()}
    values = {name: recipes[name][key] for name in rest if rest[name] == rest["full"]}
    if key == "prompts":
        values = {name: config.prompts[value].count for name, value in values.items()}
    return dict(sorted(values.items(), key=lambda one: one[1]))


def draw(config: Config, rows: pd.DataFrame, folder: Path) -> None:
    """Scenes and median error against steps and prompts, where most was lost, of the first seed."""
    first = rows[rows["seed"] == rows["seed"].min()]
    worst = first.loc[first["scene_accuracy before"].idxmin()]
    base = first[(first["model"] == worst["model"]) & (first["percent"] == worst["percent"])]
    base = base.set_index("recipe")
    shown = {key: METRICS[key] for key in ("scene_accuracy", "latent_error_median")}
    figure, axes = plt.subplots(2, 2, figsize=(9, 5.5), sharey="row", layout="constrained")
    for column, (varied, name) in zip(axes.T, VARIED.items(), strict=True):
        values = {one: value for one, value in alike(config, varied).items() if one in base.index}
        for axis, (key, (_, scale, _)) in zip(column, shown.items(), strict=True):
            points = [scale * base.loc[one, key] for one in values]
            axis.plot([*values.values()], points, marker="o", label="retrained in full")
            for level, style in (("before", ":"), ("dense", "--")):
                height = scale * base[f"{key} {level}"].iloc[0]
                if height > 0:  # the dense model's error is 0
                    axis.axhline(height, color="black", linestyle=style, label=level)
            axis.set(xscale="log", xlabel=name)
            axis.set_xticks([*values.values()], [f"{value:,}" for value in values.values()])
            axis.minorticks_off()
    for axis, (title, _, _) in zip(axes[:, 0], shown.values(), strict=True):
        axis.set_ylabel(title)
    axes[0, 1].legend(loc="center right", frameon=False)
    axes[1, 0].set_ylim(bottom=0)
    figure.suptitle(f"{worst['model']}, {worst['percent']} % removed and least squares")
    figure.savefig(folder / "retraining.png", dpi=120)


def main(run: Path, folder: Path) -> None:
    """Print the table and draw the figure."""
    rows = rows_of(run)
    print(markdown(table(rows)))
    draw(load_config(run / "config.yaml"), rows, folder)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
