"""Fault drills: whatever happens to a run, `snakemake` again ends with the files of one to which
nothing happened, to the bit, and does only what has to be done again."""

import random
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import yaml
from disks import mounted
from workflow_runs import bytes_of, run, start, tiny_models, tiny_run

pytestmark = pytest.mark.slow
COMMAND = str(Path(sys.executable).with_name("ecodiff"))
SHARD = "results/small/tiny/ecodiff-20-light/images/evaluation/0"
STAGES = {
    *("prompts", "calibrate", "mask", "prune", "trajectory", "retrain", "generate"),
    *("evaluate", "report"),
}


def config(**changes):
    """All stages, each as small as can be."""
    found = tiny_run(
        variants=[{"method": "ecodiff", "sparsities": [0.2], "retrain": "light"}],
        mask={"batch": 2, "iterations": 10, "save_every": 2},
        retrain={"light": {"steps": 6, "batch": 2, "save_every": 2}},
        generate={"batch_size": 2},
    )
    found["evaluate"] |= changes
    return found


def contents(folder):
    """The bytes of all that a run is for; manifests and logs hold times."""
    results = folder / "results/small"
    files = [*results.rglob("*.safetensors"), *results.rglob("*.png"), *results.glob("tables/*")]
    files += [*results.rglob("*.parquet"), *results.rglob("quality*.json")]
    found = {str(file.relative_to(results)): file for file in files}
    return {name: bytes_of(file) for name, file in found.items() if "manifest" not in name}


def jobs(done):
    """The rules that a run went through."""
    assert done.returncode == 0, done.stdout + done.stderr
    return sorted(re.findall(r"^\[\d+/\d+\] (\w+)", done.stderr, re.M))


def hidden(folder):
    """What unfinished work leaves: scratch, states, claims."""
    found = {path.name for path in (folder / "results").rglob(".*")}
    return found - {".snakemake_timestamp"}


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    """A place where nothing was done yet."""
    folder = tmp_path_factory.mktemp("untouched")
    tiny_models(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(untouched, tmp_path_factory):
    """A finished run, and its files as they were."""
    folder = tmp_path_factory.mktemp("faults") / "undisturbed"
    shutil.copytree(untouched, folder)
    jobs(run(folder, config()))
    return folder, contents(folder)


def processes(snakemake):
    """The commands of a run: process -> its stage."""
    found = {}
    for one in psutil.Process(snakemake.pid).children(recursive=True):
        try:
            words = one.cmdline()
        except psutil.NoSuchProcess:
            continue
        if words[1:2] == [COMMAND]:
            found[one] = words[2]
    return found


def kill_each_stage_once(snakemake, killed, seed):
    """Kill the first job of each stage, at a moment of its own."""
    chance, seen = random.Random(seed), set()
    while snakemake.poll() is None:
        for process, stage in processes(snakemake).items():
            if stage not in killed and process.pid not in seen:
                seen.add(process.pid)
                time.sleep(chance.uniform(0, 0.5))
                if process.is_running():
                    process.kill()
                    killed.append(stage)
        time.sleep(0.02)


def test_a_killed_snakemake_and_a_kill_of_each_stages_job(untouched, undisturbed, tmp_path):
    folder, seed = tmp_path / "killed", time.time_ns()
    print("seed:", seed)
    shutil.copytree(untouched, folder)
    (folder / "run.yaml").write_text(yaml.safe_dump(config()))
    words = ("--configfile", "run.yaml", "--cores", 2)
    first = start(folder, *words)
    while "mask" not in processes(first).values():  # its job goes on without it
        time.sleep(0.02)
    first.kill()
    first.communicate()
    assert "--unlock" in run(folder, config()).stderr
    run(folder, config(), "--unlock")
    second, killed = start(folder, *words, "--retries", 1), []
    killer = threading.Thread(target=kill_each_stage_once, args=(second, killed, seed))
    killer.start()
    stdout, stderr = second.communicate()
    killer.join()
    assert second.returncode == 0, stdout + stderr
    print("killed:", *killed)
    assert len(killed) >= 4 and len(set(killed)) == len(killed)
    assert stderr.count("failed: ") == len(killed)  # and nothing else was done twice
    _, expected = undisturbed
    assert contents(folder) == expected
    assert not hidden(folder)


def test_a_truncated_shard_is_never_taken_for_a_whole_one(undisturbed):
    folder, expected = undisturbed
    file = folder / SHARD / "latents.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    seen = folder / f"{SHARD.replace('images', 'seen')}.safetensors"
    judged = (folder / SHARD).parents[2] / "quality/evaluation.json"
    for path in (seen, judged, folder / "results/small/tables/main.csv"):
        path.unlink()  # as when it was not looked at yet
    done = run(folder, config())
    assert done.returncode == 1
    assert "latents.safetensors" in done.stderr.splitlines()[-1]
    shutil.rmtree(folder / SHARD)
    assert jobs(run(folder, config())).count("generate") == 1
    assert contents(folder) == expected


def test_a_changed_value_reruns_what_reads_it_and_back(undisturbed):
    folder, expected = undisturbed
    there = jobs(run(folder, config(batch_size=3)))
    assert not {"mask", "prune", "retrain", "generate"} & set(there) and "tables" in there
    assert jobs(run(folder, config())) == there
    assert contents(folder) == expected


def test_a_full_disk_is_a_line_and_no_file_is_half_a_one(undisturbed, tmp_path):
    folder, expected = undisturbed
    place = tmp_path / "place"
    shutil.copytree(folder, place, ignore=shutil.ignore_patterns("results"))
    need = sum(file.stat().st_size for file in (folder / "results").rglob("*") if file.is_file())
    with mounted(place / "results", f"size={need + 4_000_000}") as disk:
        shutil.copytree(folder / "results", disk, dirs_exist_ok=True)
        shutil.rmtree(place / SHARD)
        free = shutil.disk_usage(disk).free
        (disk / "filler").write_bytes(bytes(max(0, free - 40_000)))
        done = run(place, config())
        assert done.returncode == 1
        assert "No space left" in done.stdout + done.stderr
        assert not (place / SHARD).exists()
        (disk / "filler").unlink()
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        assert jobs(run(place, config())).count("generate") == 1
        assert contents(place) == expected
        assert not hidden(place)
