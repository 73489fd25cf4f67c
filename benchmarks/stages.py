"""Time and memory of each stage of a run: `python benchmarks/stages.py results/demo`."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

ORDER = [
    "prompts",
    "calibrate",
    "grams",
    "mask",
    "prune",
    "trajectory",
    "own_trajectory",
    "retrain",
    "generate",
    "real",
    "see",
    "quality",
    "efficiency",
    "mask_cost",
    "tables",
    "figures",
]


def stages(run: Path) -> pd.DataFrame:
    """One row per stage: number of jobs, summed and longest wall-clock seconds, peak memory (MB).

    Args:
        run: `results/<run>`; Snakemake's benchmark files are in its folder `benchmarks`.
    """
    rows = []
    for file in sorted((run / "benchmarks").rglob("*.tsv")):
        named = [part for part in file.relative_to(run).with_suffix("").parts if part in ORDER]
        measured = pd.read_csv(file, sep="\t").iloc[-1]
        rows.append((named[0] if named else "other", measured["s"], measured["max_rss"]))
    jobs = pd.DataFrame(rows, columns=["stage", "seconds", "MB"])
    table = jobs.groupby("stage").agg(
        jobs=("seconds", "size"),
        seconds=("seconds", "sum"),
        longest=("seconds", "max"),
        peak_MB=("MB", "max"),
    )
    return table.reindex([stage for stage in ORDER if stage in table.index]).round(1)


if __name__ == "__main__":
    print(stages(Path(sys.argv[1])).to_string())
