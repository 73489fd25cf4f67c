"""Jobs handed to a process that forks for each: they must end as they would have by themselves."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Stands in for ecodiff.cli: what its words say.
JOB = """
import os, sys, time
from ecodiff.runtime.errors import Stopped
import signal

def main():
    word = sys.argv[1]
    if word == "say":
        print(os.getcwd(), os.environ.get("WORD"), os.getpid(), sys.argv[2:])
        print("to stderr", file=sys.stderr)
    elif word == "exit":
        raise SystemExit(int(sys.argv[2]))
    elif word == "fail":
        raise ValueError("a fault")
    elif word == "modules":
        print("statistics" in sys.modules)
        import statistics
    elif word == "threads":
        import torch
        print(torch.get_num_threads())
    elif word == "wait":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
        print(os.getpid(), flush=True)
        time.sleep(60)
"""

SERVER = """
import importlib, sys, types
from ecodiff.runtime import forkserver
cli = types.ModuleType("ecodiff.cli")
exec(open({job!r}).read(), cli.__dict__)
sys.modules["ecodiff.cli"] = cli
forkserver.FIRST = ()
forkserver.serve({place!r}, {parent})
"""


def ecodiff(*words, **kwargs):
    return subprocess.Popen(
        [sys.executable, "-m", "ecodiff", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def done(*words, **kwargs):
    job = ecodiff(*words, **kwargs)
    out, err = job.communicate(timeout=60)
    return job.returncode, out, err


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def eventually(check, seconds=10):
    end = time.monotonic() + seconds
    while not check() and time.monotonic() < end:
        time.sleep(0.05)
    return check()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    (folder / "in").mkdir()
    (folder / "job.py").write_text(JOB)
    place = str(folder / "in/socket")
    code = SERVER.format(job=str(folder / "job.py"), place=place, parent=os.getpid())
    process = subprocess.Popen([sys.executable, "-c", code])
    assert eventually(lambda: Path(place).exists(), 60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ECODIFF_FORKSERVER", place)
        yield process
    process.kill()


def test_a_job_has_the_folder_environment_words_and_streams_of_its_command(server, tmp_path):
    job = ecodiff("say", "a b", "c", cwd=tmp_path, env={**os.environ, "WORD": "here"})
    out, err = job.communicate(timeout=60)
    folder, word, pid, *words = out.split(maxsplit=3)
    assert (folder, word, words) == (str(tmp_path), "here", ["['a b', 'c']\n"])
    assert int(pid) not in (job.pid, server.pid)
    assert err == "to stderr\n"


@pytest.mark.parametrize("status", [0, 2, 75])
def test_its_status_is_that_of_the_command(server, status):
    assert done("exit", str(status))[0] == status


def test_a_fault_shows_its_traceback_and_fails(server):
    status, _, err = done("fail")
    assert status == 1
    assert "ValueError: a fault" in err


def test_what_one_job_imports_the_next_finds_imported(server):
    assert done("modules")[1] == "False\n"
    assert eventually(lambda: done("modules")[1] == "True\n")


@pytest.mark.parametrize("threads", ["1", "2"])
def test_a_job_has_the_threads_that_its_environment_asks_for(server, threads):
    environment = {**os.environ, "OMP_NUM_THREADS": threads}
    assert done("threads", env=environment)[1] == f"{threads}\n"


def test_sigterm_reaches_the_job(server):
    job = ecodiff("wait")
    pid = int(job.stdout.readline())
    job.terminate()
    assert job.wait(60) == 75
    assert eventually(lambda: not alive(pid))


def test_a_job_whose_command_is_killed_ends_too(server):
    job = ecodiff("wait")
    pid = int(job.stdout.readline())
    job.kill()
    job.wait(60)
    assert eventually(lambda: not alive(pid))


def test_a_command_whose_job_is_killed_says_so(server):
    job = ecodiff("wait")
    os.kill(int(job.stdout.readline()), signal.SIGKILL)
    _, err = job.communicate(timeout=60)
    assert job.returncode == 137
    assert "killed" in err


def test_where_no_process_answers_the_command_runs_by_itself(tmp_path):
    status, out, _ = done(
        "--help", env={**os.environ, "ECODIFF_FORKSERVER": str(tmp_path / "nobody")}
    )
    assert status == 0
    assert "calibrate" in out


def test_it_ends_with_the_process_that_started_it(tmp_path):
    code = (
        "import os, tempfile; tempfile.tempdir = os.getcwd();"
        "from ecodiff.runtime import forkserver; print(forkserver.start())"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert Path(done.stdout.strip()).parents[1] == tmp_path
    assert eventually(lambda: not list(tmp_path.iterdir()), 60)
