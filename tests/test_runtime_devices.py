import os
import subprocess
import sys

import pytest

from ecodiff.config.reading import read_settings
from ecodiff.config.sections import LoadSettings
from ecodiff.runtime import devices
from ecodiff.runtime.errors import UserError


@pytest.fixture
def gpus(monkeypatch):
    """A machine of two GPUs, with no leases yet."""
    monkeypatch.setattr(devices.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices.torch.cuda, "device_count", lambda: 2)
    uuid = type("Properties", (), {})
    monkeypatch.setattr(
        devices.torch.cuda, "get_device_properties", lambda i: _with(uuid(), uuid=f"gpu-{i}")
    )
    devices._free_gpu.cache_clear()
    yield
    devices._free_gpu.cache_clear()


def _with(thing, **fields):
    vars(thing).update(fields)
    return thing


@pytest.mark.parametrize("wanted", ["cpu", "cuda:1"])
def test_what_is_asked_for_is_taken(gpus, wanted):
    assert devices.choose_device(wanted) == wanted


@pytest.mark.parametrize("wanted", ["cuda:2", "cuda:x", "cuda:-1", "gpu", "meta", "banana", ""])
def test_a_device_that_is_not_there_is_refused(gpus, wanted):
    with pytest.raises(UserError, match=r"device: .* not one of auto, cpu, cuda, cuda:0, cuda:1"):
        devices.choose_device(wanted)


def test_cuda_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(devices.torch.cuda, "is_available", lambda: False)
    devices._free_gpu.cache_clear()
    with pytest.raises(UserError, match="cuda is not one of auto, cpu, and torch sees no GPU"):
        devices.choose_device("cuda")


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:x", "cuda:", "CPU", "mps"])
def test_a_config_names_a_device_of_a_known_form(device):
    with pytest.raises(UserError, match=r"device: must be auto, cpu, cuda or cuda:<n>, not"):
        read_settings(LoadSettings, {"device": device})


def test_without_a_gpu_it_is_the_cpu(monkeypatch):
    monkeypatch.setattr(devices.torch.cuda, "is_available", lambda: False)
    devices._free_gpu.cache_clear()
    assert devices.choose_device() == "cpu"


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_a_gpu_that_is_held_is_passed_over(gpus, monkeypatch, wanted):
    monkeypatch.setattr(devices, "_lease", lambda name: name == "gpu-1")
    assert devices.choose_device(wanted) == "cuda:1"


def test_a_process_keeps_its_gpu(gpus, monkeypatch):
    free = iter([True])
    monkeypatch.setattr(devices, "_lease", lambda name: next(free))
    assert devices.choose_device() == devices.choose_device("cuda") == "cuda:0"


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


def test_a_lease_is_free_to_all_users(tmp_path, monkeypatch):
    before = os.umask(0o077)
    try:
        assert devices._lease("x", tmp_path)
    finally:
        os.umask(before)
    assert (tmp_path / "ecodiff-x.lock").stat().st_mode & 0o444 == 0o444
    os.close(devices._leases.pop())
    opened = os.open

    def as_another(path, flags, *mode):
        """What Linux says to who writes, or creates, another user's file in a shared folder."""
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise PermissionError(13, "Permission denied")
        return opened(path, flags, *mode)

    monkeypatch.setattr(os, "open", as_another)
    assert devices._lease("x", tmp_path)
