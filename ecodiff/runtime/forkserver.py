"""Jobs that start at once: a process that has imported the libraries forks for each of them.

Importing torch and diffusers takes longer than many a job of a small model. While a workflow runs
its jobs on this machine, one process holds the libraries, and the command `ecodiff` hands it its
arguments, working directory, environment and standard streams. The job then runs in a fork of its
own and ends as it would have ended otherwise; what it had to import, the next ones find imported.
Where no such process answers, the command runs by itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from importlib import import_module
from pathlib import Path
from typing import NoReturn

SOCKET = "ECODIFF_FORKSERVER"  # the variable that tells jobs where to ask
FIRST = ("ecodiff.cli", "ecodiff.models.loading")  # what nearly all jobs import
KILLED = 137  # the shell's status of a process that got SIGKILL


def start() -> str:
    """Start the process for the jobs of this one; it ends by itself when this one has ended.

    Returns the value that `SOCKET` must have in a job's environment.
    """
    folder = Path(tempfile.mkdtemp(prefix="ecodiff-"))  # only this user can enter it
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    command = [sys.executable, "-m", __name__, str(folder / "socket"), str(os.getpid())]
    subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return str(folder / "socket")


def ask(arguments: list[str]) -> int | None:
    """Have a job run by the process that `start` started.

    Args:
        arguments: the words after `ecodiff`.

    Returns:
        The job's exit status; None where no process answers.
    """
    place = os.environ.get(SOCKET)
    if not place:
        return None
    with socket.socket(socket.AF_UNIX) as line:
        try:
            line.connect(place)
            job = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
            socket.send_fds(line, [json.dumps(job).encode() + b"\n"], [0, 1, 2])
            pid = int(line.makefile("r").readline())
        except (OSError, ValueError):
            return None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda sent, _: os.kill(pid, sent))
        status = line.makefile("r").readline()
    if not status:
        print("ecodiff: the job was killed; out of memory?", file=sys.stderr)
    return int(status or KILLED)


def serve(place: str, parent: int) -> None:
    """Fork a process for each job that asks at `place`, for as long as `parent` lives."""
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(place)
        door.listen(64)  # who asks while the first imports are made waits for them
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all; jobs answer
        for module in FIRST:
            import_module(module)
        lines: dict[socket.socket, int] = {}
        while os.getppid() == parent:
            ready, _, _ = select.select([door, *lines], [], [], 1.0)
            for one in ready:
                if one is door:
                    line, _ = door.accept()
                    ended, child = socket.socketpair()
                    pid = os.fork()
                    if pid == 0:
                        for other in (door, ended, *lines):
                            other.close()
                        _run(line, child)
                    line.close()
                    child.close()
                    lines[ended] = pid
                else:
                    learned = one.makefile("r").read()
                    one.close()
                    os.waitpid(lines.pop(one), 0)
                    for module in learned.split():
                        with contextlib.suppress(Exception):
                            import_module(module)
    shutil.rmtree(Path(place).parent, ignore_errors=True)


def _run(line: socket.socket, server: socket.socket) -> NoReturn:
    """Be the job that asks at `line`; never returns."""
    status = 1
    try:
        message, streams, *_ = socket.recv_fds(line, 1 << 20, 3)
        while not message.endswith(b"\n"):
            message += line.recv(1 << 20)
        job = json.loads(message)
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.chdir(job["folder"])
        os.environ.clear()
        os.environ.update(job["environment"])
        line.sendall(f"{os.getpid()}\n".encode())
        threading.Thread(target=_die_with, args=[line], daemon=True).start()
        known = set(sys.modules)
        status = _command(job["arguments"])
        learned = sorted(name for name in set(sys.modules) - known if not name.startswith("_"))
        server.sendall("\n".join(learned).encode())
        line.sendall(f"{status}\n".encode())
    finally:
        os._exit(status)


def _command(arguments: list[str]) -> int:
    """Run the command with this process' threads as the environment asks; its exit status."""
    import torch

    threads = os.environ.get("OMP_NUM_THREADS", "")
    torch.set_num_threads(int(threads) if threads.isdigit() else len(os.sched_getaffinity(0)))
    sys.argv = ["ecodiff", *arguments]
    try:
        import_module("ecodiff.cli").main()
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    return status


def _die_with(line: socket.socket) -> None:
    """End this process at once when the command that asked for it is gone."""
    if line.recv(1) == b"":
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
