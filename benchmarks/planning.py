"""Time and memory of planning against the number of jobs: `python benchmarks/planning.py docs`.

Plans runs of a model that is not there, by a dry-run each: more variants, and more shards of
pictures. Writes `planning.png` to the folder and prints the table in Markdown.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import yaml
from matplotlib import pyplot as plt

ROOT = Path(__file__).parents[1]
SIZES = [(10, 1), (100, 1), (1000, 1), (10, 10), (10, 100), (10, 400)]  # variants, shards of each


def config(variants: int, shards: int) -> dict:
    """A run of so many variants beside the dense one; a shard holds two pictures."""
    seeds = list(range(max(1, variants // 10)))
    prompts = {"source": "shapeworld", "count": 1, "seed": 10**6}
    call = {"num_inference_steps": 1, "height": 64, "width": 64}
    return {
        "run": "plan",
        "models": {"m": {"source": "model", "call": call}},
        "variants": [
            {
                "method": "random",
                "sparsities": [percent / 100 for percent in range(5, 55, 5)],
                "seeds": seeds,
            }
        ],
        "prompts": {
            "calibration": prompts,
            "evaluation": {**prompts, "count": 2 * shards, "seed": 0, "split": "held-out"},
        },
        "mask": {"batch": 1},
        "generate": {"shard_size": 2},
        "evaluate": {
            "features": "clip",
            "clip_model": "ViT-B-16",
            "efficiency": None,
            "mask_cost": None,
        },
    }


def planned(variants: int, shards: int) -> dict[str, float]:
    """Jobs, seconds of a core and MB of one plan."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model").mkdir()
        (Path(folder) / "model/model_index.json").write_text("{}")
        (Path(folder) / "plan.yaml").write_text(yaml.safe_dump(config(variants, shards)))
        command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile")]
        command += ["--configfile", "plan.yaml", "--dry-run", "--cores", "1", "--quiet", "rules"]
        text, taken = measured(command, Path(folder))
    jobs = int(re.findall(r"^total +(\d+)", text, re.M)[-1])
    return {"variants": variants, "shards": shards, "jobs": jobs, **taken}


# A process is born with the largest memory of its parent, so a small one starts the command.
START = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stderr=subprocess.STDOUT)
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print("\\n", usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)
sys.exit(done.returncode)
"""


def measured(command: list[str], folder: Path) -> tuple[str, dict[str, float]]:
    """What a command says in a folder, and the seconds of a core and MB that it takes."""
    done = subprocess.run(
        [sys.executable, "-c", START, *command],
        cwd=folder,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:])
    text, _, usage = done.stdout.rstrip().rpartition("\n")
    seconds, megabytes = map(float, usage.split())
    # Of one core; not of what else runs there.
    return text, {"seconds": seconds, "MB": megabytes}


def main(folder: Path) -> None:
    """All sizes, as a table and a figure."""
    table = pd.DataFrame([planned(*size) for size in SIZES])
    print(table.round(1).to_string(index=False))
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    for axis, key in zip(axes, ("seconds", "MB"), strict=True):
        for label, rows in {
            "more variants": table[table["shards"] == 1],
            "more shards of 10 variants": table[table["variants"] == 10],
        }.items():
            rows = rows.sort_values("jobs")
            axis.plot(rows["jobs"], rows[key], marker="o", label=label)
        axis.set(xlabel="jobs", ylabel=key, xlim=(0, None), ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle("Planning a run")
    figure.savefig(folder / "planning.png", dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
