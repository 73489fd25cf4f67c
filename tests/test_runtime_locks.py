import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from imports import loaded_by

from ecodiff.runtime import locks
from ecodiff.runtime.errors import UserError
from ecodiff.runtime.locks import claim_of, claimant, claimed, lock

HOLD = """
import os, sys, time
from pathlib import Path
from ecodiff.runtime.locks import claimed
with claimed(Path(sys.argv[1]), "mask"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process, a job of SLURM, that makes `out`."""
    environment = {**os.environ, "SLURM_JOB_ID": "123"}
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert other.stdout.readline() == "held\n"
    yield other
    other.kill()
    other.wait()


def test_what_another_process_makes_is_refused_and_it_is_named(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(locks, "PATIENCE", 0)
    with pytest.raises(UserError, match=r"out: job 123 on \S+ is making it; "):
        claimed(tmp_path / "out", "mask").__enter__()


def test_one_that_is_about_to_die_is_waited_for(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(locks, "PATIENCE", 20)
    waited = time.monotonic()
    os.kill(holder.pid, signal.SIGKILL)
    with claimed(tmp_path / "out", "mask"):
        assert time.monotonic() - waited < 10


def test_a_kill_leaves_word_of_the_stage_and_an_end_does_not(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert claimant(tmp_path / "out") == "mask"
    with claimed(tmp_path / "out", "prune"):
        assert claimant(tmp_path / "out") == "prune"
    assert claimant(tmp_path / "out") is None
    assert not [*tmp_path.iterdir()]


def test_different_things_are_made_at_once(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(locks, "PATIENCE", 0)
    with claimed(tmp_path / "other", "mask"):
        assert claim_of(tmp_path / "other").exists()


@pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/usr/bin/python3").exists(),
    reason="becomes another user, which only root can, with a python that all can run",
)
def test_another_users_lock_is_respected_and_its_file_is_no_obstacle(tmp_path):
    tmp_path.chmod(0o1777)
    for folder in tmp_path.parents:
        if folder.name.startswith(("pytest-", "popen-")):
            folder.chmod(0o755)
    name = str(tmp_path / "gpu.lock")
    hold = (
        "import fcntl, os, sys; os.umask(0o077);"
        "f = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o644); os.fchmod(f, 0o644);"
        "fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    )
    python = ["/usr/bin/python3", "-c", hold, name]
    other = subprocess.Popen(
        python, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, user="nobody"
    )
    assert other.stdout.readline() == "held\n"
    assert lock(tmp_path / "gpu.lock") is None
    other.communicate()
    file = lock(tmp_path / "gpu.lock")
    assert file is not None
    os.close(file)


def test_importing_locks_needs_no_torch():
    assert not {"torch", "diffusers"} & loaded_by("ecodiff.runtime.locks")
