"""File systems of their own, for tests of what disks refuse."""

import subprocess
from contextlib import contextmanager

import pytest


@contextmanager
def mounted(folder, options="size=5m"):
    """A folder in memory, mounted with the given options; skips where that is not allowed."""
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        subprocess.run(words, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
