"""Forked commands are what an interpreter of their own would be."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import commands
import pytest


def told(*arguments):
    """A rank of these tests says what it sees, and does as it is told."""
    print(os.getpid() == os.getpgid(0), os.getcwd(), os.environ.get("TOLD"), flush=True)
    rank, what = arguments
    if what == "sleep" and rank > 0:
        time.sleep(600)
    if what == "sleep":
        sys.exit("mistaken")


def test_a_command_has_its_own_arguments_folder_environment_and_status(tmp_path):
    environment = os.environ | {"GRN_RUNS": str(tmp_path / "here")}
    done = commands.run("grn.sample", "--cfg", "hydra", "--package", "hydra.run", cwd=tmp_path, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    done = commands.run("grn.sample", cwd=tmp_path, env=environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ckpt must be given")
    assert [path.name for path in tmp_path.iterdir()] in ([], ["here"])


def test_signals_and_time_end_a_command(tmp_path):
    process = commands.Command.calling(told, 1, "sleep")
    while not process.output()[0].endswith("\n"):
        time.sleep(0.01)
    assert process.output()[0] == f"True {os.getcwd()} None\n"
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == -signal.SIGTERM


def test_a_rank_that_fails_ends_the_others(monkeypatch):
    monkeypatch.setenv("TOLD", "yes")
    with pytest.raises(AssertionError, match=r"yes\nmistaken\n"):
        commands.spawn(told, ("sleep",), nprocs=3, timeout=100)
    commands.spawn(told, ("end",), nprocs=2)


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("import os, sys; os.execv(sys.executable, [sys.executable, '-c', 'print(1); exit(3)'])", 3),
        ("import os, sys; os.execv(sys.executable, [sys.executable, '-m', 'grn.sample', '--cfg', 'job'])", 0),
    ],
)
def test_what_a_command_starts_is_started_as_it_was(code, status, tmp_path):
    process = commands.Command.calling(exec, code)
    assert process.wait(60) == status, process.output()
    assert process.output()[0].startswith("1\n" if status else "sampler:"), process.output()


def leave(file):
    """Asks for a process that writes its id into `file`, and is killed before that one ends."""
    other = commands.Command.calling(write_and_sleep, file)
    other.wait()


def write_and_sleep(file):
    file.write_text(str(os.getpid()))
    time.sleep(600)


def test_nothing_is_left_of_a_client_that_goes(tmp_path):
    file = tmp_path / "pid"
    process = commands.Command.calling(leave, file)
    while not file.exists() or not file.read_text():
        assert process.poll() is None, process.output()
        time.sleep(0.01)
    process.kill()
    assert process.wait(30) == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while Path(f"/proc/{file.read_text()}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
