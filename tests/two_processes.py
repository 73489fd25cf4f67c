"""A script in two processes that share an optimisation, as `accelerate launch` would start them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def in_two_processes(script: str, words: Callable[[int], Sequence[object]]) -> list[int]:
    """Run a script twice at once on the CPU; the exit statuses, by rank.

    Args:
        script: the code. Its first argument is the folder of the tests.
        words: its other arguments, by rank.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    jobs = []
    for rank in range(2):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
        environment = {**os.environ, **{key: str(value) for key, value in place.items()}}
        environment |= {"MASTER_ADDR": "localhost", "ACCELERATE_USE_CPU": "true"}
        command = [sys.executable, "-c", script, Path(__file__).parent, *words(rank)]
        jobs.append(subprocess.Popen([*map(str, command)], env=environment))
    return [job.wait() for job in jobs]
