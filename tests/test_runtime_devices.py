import subprocess
import sys

import pytest

from ecodiff.runtime import devices


@pytest.fixture
def gpus(monkeypatch):
    """A machine of two GPUs, with no leases yet."""
    monkeypatch.setattr(devices.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices.torch.cuda, "device_count", lambda: 2)
    uuid = type("Properties", (), {})
    monkeypatch.setattr(
        devices.torch.cuda, "get_device_properties", lambda i: _with(uuid(), uuid=f"gpu-{i}")
    )
    devices.choose_device.cache_clear()
    yield
    devices.choose_device.cache_clear()


def _with(thing, **fields):
    vars(thing).update(fields)
    return thing


def test_what_is_asked_for_is_taken():
    assert devices.choose_device("cuda:3") == "cuda:3"


def test_without_a_gpu_it_is_the_cpu(monkeypatch):
    monkeypatch.setattr(devices.torch.cuda, "is_available", lambda: False)
    devices.choose_device.cache_clear()
    assert devices.choose_device() == "cpu"


def test_a_gpu_that_is_held_is_passed_over(gpus, monkeypatch):
    monkeypatch.setattr(devices, "_lease", lambda name: name == "gpu-1")
    assert devices.choose_device() == "cuda:1"


def test_a_process_keeps_its_gpu(gpus, monkeypatch):
    free = iter([True])
    monkeypatch.setattr(devices, "_lease", lambda name: next(free))
    assert devices.choose_device() == devices.choose_device() == "cuda:0"


def test_a_lease_ends_with_its_process(tmp_path):
    hold = (
        "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX);"
        "print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(tmp_path / "ecodiff-x.lock")]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    assert not devices._lease("x", tmp_path)
    other.communicate()
    assert devices._lease("x", tmp_path)
