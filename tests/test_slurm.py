"""Drills on a real SLURM of one node: `make test-slurm`. What is counted is printed at the end.

The drills are one story, told in order: each continues where the one before it left the run.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import yaml
from slurm_cluster import WITH_US, cluster, jobs, queue
from workflow_runs import ROOT, bytes_of, run, tiny_models, tiny_run

pytestmark = pytest.mark.slurm
MASK = "results/small/tiny/masks/ecodiff-20/mask.safetensors"
STATE = "results/small/tiny/masks/ecodiff-20/.mask.safetensors.unfinished"
RECORD = "results/small/tiny/calibration.safetensors"
SAME = ("**/*.safetensors", "**/*.png", "tables/*", "**/*.parquet")  # to the byte
MASKING = [str(Path(sys.executable).with_name("ecodiff")), "mask"]  # begins its command line
counted: dict[str, str] = {}


def config(mem_mb):
    """A small run; each job that holds a model asks for the fake GPU and two minutes, enough for a
    busy machine to begin."""
    found = tiny_run(variants=[{"method": "ecodiff", "sparsities": [0.2]}])
    resources = {"gpu": 1, "mem_mb": mem_mb, "runtime": 2}
    found["models"]["tiny"]["resources"] = resources
    found["mask"] = {"batch": 2, "iterations": 160, "save_every": 5}
    return found


class Place:
    """A folder with a run through the profile for SLURM."""

    def __init__(self, folder):
        self.folder = folder

    def command(self, *words):
        command = [sys.executable, "-m", "snakemake", "--snakefile", ROOT / "Snakefile", *words]
        command += ["--configfile", "run.yaml", "--workflow-profile", ROOT / "profiles/slurm"]
        # A cluster without accounting; short jobs on a local disk.
        command += ["--slurm-status-command", "squeue", "--latency-wait", 5]
        command += ["--slurm-init-seconds-before-status-checks", 6, "--set-threads"]
        command += [f"{rule}=1" for rule in ("calibrate", "mask", "prune", "generate", "quality")]
        small = [f"{rule}:mem_mb=2000" for rule in ("real", "see", "quality")]
        command += ["--set-resources", *small]  # the node has room for no more
        return list(map(str, command))

    def start(self, *words):
        """Snakemake, in the background."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path}
        return subprocess.Popen(
            [*WITH_US, *self.command(*words)],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __call__(self, *words):
        """Snakemake until it ends: its exit status and what it said."""
        started = self.start(*words)
        try:
            said, _ = started.communicate(timeout=900)
        finally:
            started.kill()
        return started.returncode, said

    def configure(self, **settings):
        (self.folder / "run.yaml").write_text(yaml.safe_dump(config(**settings)))

    def file(self, name):
        return self.folder / name


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run on a cluster that is there for this module, and gone afterwards."""
    folder = tmp_path_factory.mktemp("slurm")
    with cluster(folder / "state"):
        (folder / "place").mkdir()
        tiny_models(folder / "place")
        shutil.copytree(folder / "place", folder / "alone")
        yield Place(folder / "place")
    print("\n\ndrill                                          what was counted")
    for drill, what in counted.items():
        print(f"{drill:<46} {what}")


@pytest.fixture(scope="module")
def undisturbed(place):
    """The files of a run on this machine, without SLURM and without any harm."""
    folder = place.folder.with_name("alone")
    done = run(folder, config(mem_mb=2000))
    assert done.returncode == 0, done.stdout + done.stderr
    return contents(folder)


def contents(folder):
    results = folder / "results/small"
    files = {file for pattern in SAME for file in results.glob(pattern) if file.is_file()}
    return {str(file.relative_to(results)): bytes_of(file) for file in sorted(files)}


def until(true, seconds=300):
    """Wait until something is true."""
    for _ in range(int(seconds * 5)):
        if true():
            return
        time.sleep(0.2)
    raise AssertionError("it did not come to pass")


def tries(rule):
    """The jobs of a rule so far, in order."""
    return [job for job in jobs() if job.get("Comment", "").startswith(f"rule_{rule}_")]


def iterations(log):
    return [line for line in log.read_text().splitlines() if line.startswith("mask ")]


def slow_down(place, log):
    """Let the process that learns a mask here take its time, once its log has an iteration.

    It sleeps most of the time from then on, and wakes every second to hear what it is told.
    """

    def learners():
        found = psutil.process_iter(["cmdline"])
        found = [one for one in found if (one.info["cmdline"] or [])[1:3] == MASKING]
        return [one for one in found if Path(one.cwd()) == place.folder]

    def learns():
        for one in learners():  # the log may still be that of the try before
            begun = log.exists() and log.stat().st_mtime > one.create_time()
            return begun and iterations(log)
        return False

    def drowse():
        with suppress(psutil.NoSuchProcess):
            while True:
                for word, seconds in ((signal.SIGSTOP, 0.9), (signal.SIGCONT, 0.05)):
                    learner.send_signal(word)
                    time.sleep(seconds)

    until(learns)
    [learner] = learners()
    threading.Thread(target=drowse, daemon=True).start()


def test_a_partition_that_does_not_exist_is_a_line(place):
    place.configure(mem_mb=700)
    status, said = place(RECORD, "--default-resources", "nodes=1", "slurm_partition=nope")
    assert status == 1
    assert "slurm: invalid partition specified: nope" in said.splitlines()[-1]
    counted["partition that does not exist"] = "1 line, 0 jobs ran"


def test_an_account_without_rights_is_a_line(place):
    words = ("nodes=1", "slurm_partition=closed", "slurm_account=mine")
    status, said = place(RECORD, "--default-resources", *words)
    assert status == 1
    assert "Invalid account or account/partition combination" in said.splitlines()[-1]
    counted["an account without rights"] = "1 line, 0 jobs ran"


def test_more_gpus_than_a_node_has_is_a_line(place):
    status, said = place(RECORD, "--default-resources", "nodes=1", "gpu=2")
    assert status == 1
    assert "Requested node configuration is not available" in said.splitlines()[-1]
    counted["a node without the GPUs that are asked for"] = "1 line, 0 jobs ran"


def test_a_job_killed_by_memory_is_tried_with_more(place):
    status, said = place(RECORD)
    assert status == 0, said
    found = tries("calibrate")
    asked = [job["MinMemoryNode"] for job in found]
    assert asked == ["700M", "1400M", "2100M"][: len(found)] and len(found) > 1
    assert [job["JobState"] == "COMPLETED" for job in found] == [False] * (len(found) - 1) + [True]
    assert "ended as" in said
    assert place.file("results/small/logs/tiny/calibrate/calibration.try-1.log").exists()
    counted["memory kill, retried with more"] = f"{len(found)} tries of calibrate: {asked}"


def test_jobs_of_a_killed_snakemake_are_told_and_can_be_cancelled(place):
    place.configure(mem_mb=2000)
    first = place.start(MASK)
    slow_down(place, place.file("results/small/logs/tiny/mask/ecodiff-20.log"))
    first.send_signal(signal.SIGKILL)
    first.wait()
    status, said = place(MASK)
    assert status != 0 and "snakemake --unlock" in said
    assert place("--unlock")[0] == 0
    orphans = queue()
    status, said = place(MASK)
    assert status == 2
    [line] = [line for line in said.splitlines() if line.startswith("slurm: jobs")]
    assert all(job in line for job in orphans) and "scancel --name" in line
    name = place.file("results/small/logs/slurm-name.txt").read_text()
    subprocess.run(["scancel", "--name", name], check=True)
    until(lambda: not queue())
    counted["kill -9 of snakemake"] = f"{len(orphans)} job left, told, cancelled by one command"


def test_time_limit_and_scancel_go_on_to_the_same_files(place, undisturbed):
    before = len(tries("mask"))
    started = place.start()
    until(lambda: len(tries("mask")) > before)
    # The first try meets its limit of two minutes, however fast this machine is; the second one is
    # cancelled.
    log = place.file("results/small/logs/tiny/mask/ecodiff-20.log")
    slow_down(place, log)
    until(lambda: len(tries("mask")) == before + 2)
    slow_down(place, log)
    subprocess.run(["scancel", tries("mask")[-1]["JobId"]], check=True)
    said, _ = started.communicate(timeout=900)
    assert started.returncode == 0, said
    timeout, cancelled, completed = tries("mask")[before:]
    assert timeout["JobState"] == "TIMEOUT"
    assert cancelled["JobState"] == "CANCELLED"
    assert completed["JobState"] == "COMPLETED"
    logs = [log.with_suffix(f".try-{number}.log") for number in (1, 2)] + [log]
    assert "stopped after" in logs[0].read_text()
    began = [iterations(one)[0].split()[1] for one in logs]
    assert not any(one.startswith("1/") for one in began)  # each went on from a state
    found = contents(place.folder)
    assert found.keys() == undisturbed.keys()
    odd = [name for name in found if found[name] != undisturbed[name]]
    assert not odd
    counted["time limit: SIGTERM, state, resumed"] = f"tries began at iterations {began}"
    counted["scancel: resumed by the next try"] = "1 of them"
    counted["files equal to those of an undisturbed run"] = (
        f"{len(found)} of {len(found)}, to the byte"
    )


def test_no_two_jobs_held_the_gpu_at_once(place):
    held = [job for job in jobs() if "gpu" in job.get("TresPerJob", "")]
    held = [job for job in held if job["RunTime"] != "00:00:00"]  # refused at once
    spans = sorted((moment(job["StartTime"]), moment(job["EndTime"])) for job in held)
    overlaps = [(one, other) for one, other in pairwise(spans) if other[0] < one[1]]
    assert len(spans) > 6 and not overlaps
    counted["GPU jobs, overlaps"] = f"{len(spans)} jobs, {len(overlaps)} overlaps"


def test_nothing_is_left(place):
    assert not queue()
    assert not place.file(STATE).exists()
    status, said = place()
    assert status == 0 and "Nothing to be done" in said
    counted["jobs, states left at the end"] = "0, 0"


def moment(text):
    return datetime.fromisoformat(text)
