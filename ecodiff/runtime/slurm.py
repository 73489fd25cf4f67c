"""What a run on a SLURM cluster needs to know before its first job. Imports no torch."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path


def left_behind(name: str) -> list[str]:
    """The ids of the jobs of a name that wait or run.

    Snakemake names all jobs of a run after it. Those of a Snakemake that was killed go on.

    Args:
        name: of the jobs; "" for none.
    """
    if not name:
        return []
    words = ["squeue", "--noheader", "--format=%i", "--name", name]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.split()


def profile_mistake(words: Sequence[str], project: Path) -> str | None:
    """What is wrong with the `--workflow-profile` of a command line; None when nothing is.

    Snakemake silently does without a profile that it cannot find, and runs all jobs here.

    Args:
        words: the command line.
        project: the folder of the Snakefile.
    """
    option = "--workflow-profile"
    names = [word.partition("=")[2] for word in words if word.startswith(f"{option}=")]
    names += [after for word, after in pairwise(words) if word == option]
    for name in names:
        places = [Path(name), Path("profiles", name), Path(project, "profiles", name)]
        if name == "none" or any(place.exists() for place in places):
            continue
        known = sorted(f"profiles/{path.name}" for path in Path(project, "profiles").iterdir())
        return f"{option}: there is no profile {name}; there are {', '.join([*known, 'none'])}"
    return None
