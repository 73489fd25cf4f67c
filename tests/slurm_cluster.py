"""A SLURM of one node with a fake GPU, on this machine, for as long as tests run.

Debian's packages suffice, without systemd, cgroups or accounting. SLURM strips SLURM_CONF from
steps of jobs, so its files must lie in /etc/slurm: on a machine that has a SLURM of its own nothing
is done.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
ETC = Path("/etc/slurm")
FILES = (ETC / "slurm.conf", ETC / "gres.conf")
WITH_US = ("setpriv", "--pdeathsig", "KILL")  # before a command: it ends when the tests do
MEMORY = 6000  # MB that jobs may ask for together

OURS = "# Of the tests of ecodiff; may be removed.\n"  # what a killed test left is known by it
CONF = """\
ClusterName=drills
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
MinJobAge=3600
KillWait=10
OverTimeLimit=0
EnforcePartLimits=ALL
GresTypes=gpu
StateSaveLocation={state}/ctld
SlurmdSpoolDir={state}/d
SlurmctldPidFile={state}/slurmctld.pid
SlurmdPidFile={state}/slurmd.pid
SlurmctldLogFile={state}/slurmctld.log
SlurmdLogFile={state}/slurmd.log
ReturnToService=2
NodeName=localhost NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} Gres=gpu:1
PartitionName=main Nodes=localhost Default=YES State=UP
PartitionName=closed Nodes=localhost AllowAccounts=others State=UP
"""
GRES = "NodeName=localhost Name=gpu File=/dev/null\n"


@contextmanager
def cluster(state: Path) -> Iterator[None]:
    """Start it, and stop it whatever happens; skips where that is not possible.

    Args:
        state: a folder for what its daemons write.
    """
    _install()
    for number in (signal.SIGINT, signal.SIGTERM):  # either way, what follows is cleaned up
        signal.signal(number, signal.default_int_handler)
    for folder in (state / "ctld", state / "d"):
        folder.mkdir(parents=True)
    ETC.mkdir(exist_ok=True)
    values = {
        "host": socket.gethostname(),
        "state": state,
        "memory": MEMORY,
        "cpus": os.cpu_count(),
    }
    started = []
    try:
        for file, text in zip(FILES, (CONF.format(**values), GRES), strict=True):
            file.write_text(OURS + text)
        Path("/run/munge").mkdir(exist_ok=True)
        shutil.chown("/run/munge", "munge", "munge")
        for daemon in (
            ["runuser", "-u", "munge", "--", "/usr/sbin/munged", "--foreground"],
            ["slurmctld", "-D", "-c"],
            ["slurmd", "-D", "-N", "localhost"],
        ):
            log = (state / f"{Path(daemon[0]).name}.out").open("w")
            started.append(subprocess.Popen([*WITH_US, *daemon], stdout=log, stderr=log))
            time.sleep(0.5)
        _wait_until_jobs_run(state)
        yield
    finally:
        _stop(started)
        for file in FILES:
            file.unlink(missing_ok=True)


def _install() -> None:
    """Debian's packages, where they are missing."""
    running = [p.name() for p in psutil.process_iter() if p.name() in ("slurmctld", "slurmd")]
    if running or any(file.exists() and OURS not in file.read_text() for file in FILES):
        pytest.skip("this machine has a SLURM of its own, which tests leave alone")
    if os.geteuid() != 0 or not Path("/etc/debian_version").exists():
        pytest.skip("a SLURM for tests needs root on Debian")
    if all(shutil.which(name) for name in ("slurmctld", "slurmd", "sbatch", "munged")):
        return
    apt = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=60"]
    apt += ["-o", "Acquire::http::Timeout=20", "-o", "Acquire::Retries=0"]
    install = [*apt, "install", "-y", "--no-install-recommends", *PACKAGES]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for words in ([*apt, "update"], install):
        done = subprocess.run(words, capture_output=True, text=True, env=environment)
        if done.returncode:
            pytest.skip(f"apt-get cannot install SLURM here: {done.stderr.strip()[-200:]}")


def _wait_until_jobs_run(state: Path) -> None:
    for _ in range(30):
        with suppress(subprocess.TimeoutExpired):
            if subprocess.run(["srun", "true"], capture_output=True, timeout=10).returncode == 0:
                return
        time.sleep(0.5)
    logs = "".join(file.read_text()[-1000:] for file in state.glob("*.log"))
    pytest.skip(f"a SLURM for tests does not start on this machine:\n{logs}")


def _stop(daemons: list[subprocess.Popen]) -> None:
    """All jobs, then the daemons, the last one first; none may be left."""
    if len(daemons) == 3:
        with suppress(subprocess.TimeoutExpired):
            subprocess.run(["scancel", "--user=root"], capture_output=True, timeout=20)
            for _ in range(20):
                if not queue():
                    break
                time.sleep(0.5)
    for daemon in reversed(daemons):
        # Steps are children of slurmd, munged one of runuser.
        family = [psutil.Process(daemon.pid), *psutil.Process(daemon.pid).children(recursive=True)]
        for one in family:
            with suppress(psutil.NoSuchProcess):
                one.terminate()
        _, left = psutil.wait_procs(family, timeout=10)
        for one in left:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        daemon.wait(10)


def queue() -> dict[str, str]:
    """The jobs that wait or run: id -> comment, which names rule and wildcards."""
    done = subprocess.run(
        ["squeue", "--noheader", "--format=%i|%k"], capture_output=True, text=True, timeout=20
    )
    return dict(line.split("|", 1) for line in done.stdout.splitlines())


def jobs() -> list[dict[str, str]]:
    """All jobs so far, finished ones too: the fields of `scontrol show job`, tries in order."""
    text = subprocess.run(["scontrol", "--oneliner", "show", "job"], capture_output=True, text=True)
    return [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in text.stdout.splitlines()]
