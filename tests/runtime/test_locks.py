"""One writer to a folder, by processes that are forked, killed and started again."""

import os
import signal
import socket
import sys
import time
from pathlib import Path

import commands
import pytest

from grn.runtime.errors import UserError
from grn.runtime.files import UNWRITABLE, remove_leftovers, write_atomically
from grn.runtime.locks import only_writer, writer_of
from grn.runtime.ranks import is_first


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr("grn.runtime.locks.PATIENCE", 0.3)


def hold(path, inside, worker):
    with only_writer(Path(path), inside=inside, remedy="-"):
        if worker and os.fork() == 0:  # outlives the writer for a while, as loaders' workers do
            time.sleep(30)
            os._exit(0)
        write_atomically(Path(path) / "last.ckpt" if inside else Path(path), lambda temporary: stall(temporary))


def stall(temporary):
    temporary.write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(1000)


def writer(path, inside, worker=False):
    """A process that has the lock and is in the midst of writing."""
    process = commands.Command.calling(hold, str(path), inside, worker)
    deadline = time.monotonic() + 60
    while "writing" not in process.output()[0]:
        assert process.poll() is None, process.output()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("inside", [True, False])
def test_another_process_is_told_who_writes(tmp_path, inside):
    path = tmp_path / "run"
    process = writer(path, inside)
    told = rf"run is being written by process {process.pid} on {socket.gethostname()} .*: wait .*, or give another name"
    with pytest.raises(UserError, match=told), only_writer(path, inside=inside, remedy="give another name=..."):
        pass
    assert len(list(tmp_path.rglob("*.writing-*"))) == 1  # nothing of the other is touched
    process.kill()
    process.wait(30)


@pytest.mark.parametrize("inside", [True, False])
def test_the_lock_and_leftovers_of_a_killed_writer_are_gone(tmp_path, inside):
    path = tmp_path / "run"
    process = writer(path, inside, worker=True)
    os.kill(process.pid, signal.SIGKILL)  # it alone: its worker lives on
    process.wait(30)
    (leftover,) = tmp_path.rglob("*.writing-*")
    assert leftover.is_dir()
    (tmp_path / ".other.writing-12345678").mkdir()
    with only_writer(path, inside=inside, remedy="-"):
        assert not leftover.exists()
        write_atomically(path / "last.ckpt" if inside else path, lambda temporary: temporary.write_text("whole"))
    left = {str(found.relative_to(tmp_path)) for found in tmp_path.rglob("*")}
    assert left - {"run", "run/last.ckpt"} == {".other.writing-12345678"}


def test_what_others_write_in_subfolders_stays(tmp_path):
    """Of a run folder: samples are drawn and an export is written while training goes on."""
    for name in (
        "samples/.samples.png.writing-abcdefgh",
        ".export.writing-abcdefgh",
        "checkpoints/.x.writing-abcdefgh",
    ):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "samples/.lock").touch()
    (tmp_path / ".export.lock").touch()
    (tmp_path / ".mine.writing-home").touch()
    with only_writer(tmp_path, inside=True, remedy="-"):
        pass
    left = {str(found.relative_to(tmp_path)) for found in tmp_path.rglob("*.writing-*")}
    assert left == {"samples/.samples.png.writing-abcdefgh", ".export.writing-abcdefgh", ".mine.writing-home"}


def test_leftovers_that_are_links_are_not_followed(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/x").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.a.writing-abcdefgh").symlink_to(tmp_path / "precious")
    remove_leftovers(tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())
    assert (tmp_path / "precious/x").exists()


def test_who_waits_gets_the_lock_that_is_given_back(tmp_path, monkeypatch):
    """And not that of a file that is removed."""
    monkeypatch.setattr("grn.runtime.locks.PATIENCE", 60)
    process = writer(tmp_path, True)
    waiting = commands.Command.calling(take, str(tmp_path))
    time.sleep(0.5)
    process.kill()
    process.wait(30)
    assert waiting.wait(60) == 0, waiting.output()
    assert not list(tmp_path.iterdir())


def take(path):
    sys.modules["grn.runtime.locks"].PATIENCE = 60
    with only_writer(Path(path), inside=True, remedy="-"):
        assert Path(path, ".lock").exists()


def test_file_systems_without_locks_are_told_of(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("grn.runtime.locks.fcntl.lockf", refuse)
    with only_writer(tmp_path, inside=True, remedy="-"):
        pass
    assert "has no locks" in caplog.text


@pytest.mark.parametrize(
    ("variables", "first"),
    [
        ({}, True),
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, False),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, True),
        ({"LOCAL_RANK": "1"}, False),  # as Lightning starts ranks
        ({"NODE_RANK": "1"}, False),
        ({"SLURM_PROCID": "3", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "4"}, False),
    ],
)
def test_the_first_process_locks_for_all(variables, first, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_first() == first


@pytest.mark.parametrize("inside", [True, False])
def test_a_link_in_the_place_of_a_lock_empties_no_file(tmp_path, inside):
    """As a run folder from somebody else may have it."""
    victim, path = tmp_path / "victim", tmp_path / "run"
    victim.write_text("mine\n")
    path.mkdir()
    (path / ".lock" if inside else tmp_path / ".run.lock").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links") as told, only_writer(path, inside=inside, remedy="-"):
        pass
    assert told.value.errno in UNWRITABLE
    assert told.value.filename.endswith(".lock")
    assert victim.read_text() == "mine\n"


def test_who_writes_is_told_without_taking_anything(tmp_path):
    path = tmp_path / "run"
    assert writer_of(path) is None  # there is no folder
    process = writer(path, True)
    assert writer_of(path).startswith(f"process {process.pid} on {socket.gethostname()} (")
    process.kill()
    process.wait(30)
    assert (path / ".lock").exists()
    assert writer_of(path) is None  # a lock ends with its process
    assert (path / ".lock").exists()


def test_a_lock_that_is_no_file_tells_nothing(tmp_path):
    os.mkfifo(tmp_path / ".lock")
    assert writer_of(tmp_path) is None
    with pytest.raises(UserError, match=r"\.lock is no plain file"), only_writer(tmp_path, inside=True, remedy=""):
        pass
    (tmp_path / ".lock").unlink()
    (tmp_path / "other").write_text("kept")
    (tmp_path / ".lock").symlink_to(tmp_path / "other")
    assert writer_of(tmp_path) is None
    assert (tmp_path / "other").read_text() == "kept"
