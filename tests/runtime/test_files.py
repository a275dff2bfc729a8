import errno
import os
import subprocess
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError

from grn.runtime.errors import UserError
from grn.runtime.files import write_atomically, write_text


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.getuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk]).returncode:
        pytest.skip("only root can mount a small disk")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)  # torch.save left the file open


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda path: torch.save(torch.zeros(2**20), path), id="a checkpoint"),
        pytest.param(lambda path: path.write_bytes(bytes(2**22)), id="bytes"),
    ],
)
def test_a_full_disk_is_told_and_leaves_the_earlier_file(small_disk, write):
    path = write_text(small_disk / "last.ckpt", "earlier")
    with pytest.raises(UserError, match=r"last\.ckpt: no space is left on its disk") as told:
        write_atomically(path, write)
    assert "\n" not in str(told.value)
    assert path.read_text() == "earlier"
    assert list(small_disk.iterdir()) == [path]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES])
def test_other_errors_stay_what_they_are(tmp_path, number):
    def write(_):
        raise OSError(number, os.strerror(number))

    with pytest.raises(OSError if number == errno.EACCES else UserError):
        write_atomically(tmp_path / "file", write)
    assert list(tmp_path.iterdir()) == []


def test_a_bug_on_a_disk_with_room_keeps_its_traceback(tmp_path):
    def write(_):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        write_atomically(tmp_path / "file", write)


def test_a_writer_that_does_not_say_why_is_asked_whether_the_disk_is_full(tmp_path, monkeypatch):
    """safetensors' own error is no OSError."""

    def write(temporary):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("grn.runtime.files.shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(UserError, match=r"model\.safetensors: no space is left on its disk"):
        write_atomically(tmp_path / "model.safetensors", write)
    monkeypatch.setattr("grn.runtime.files.shutil.disk_usage", lambda _: SimpleNamespace(free=2**30))
    with pytest.raises(SafetensorError):
        write_atomically(tmp_path / "model.safetensors", write)
