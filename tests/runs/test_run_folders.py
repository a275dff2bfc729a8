"""Commands and the folders they write to: two at once, disks that are full, folders that are none."""

import os
import re
import shutil
import time

import commands
import pytest

from grn.runtime.locks import only_writer

pytestmark = pytest.mark.slow

GRN = {"GRN_RUNS": "runs", "GRN_DATA": "data"}
TINY = (
    "+experiment=digits_tokenizer model.dim=8 model.decoder_dim=8 data.batch_size=20 trainer.max_steps=100000 "
    "callbacks.last.every_n_train_steps=5 training.warmup_steps=2 logger=none cluster=cpu"
)


def arguments(text):
    """The last of each key, as a command sets none twice."""
    return list({argument.partition("=")[0]: argument for argument in text.split()}.values())


def environment():
    return os.environ | GRN


def error_of(done):
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.stderr
    return line


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workspace")
    assert commands.run("grn.prepare", "data=digits", "num_workers=0", cwd=folder, env=environment()).returncode == 0
    return folder


def run(workspace, verb, text):
    return commands.run(f"grn.{verb}", *arguments(text), cwd=workspace, env=environment())


def running(workspace, verb, text, until):
    """The command, when `until` is there."""
    command = commands.Command(f"grn.{verb}", *arguments(text), cwd=workspace, env=environment())
    deadline = time.monotonic() + 240
    while not until.exists():
        assert command.poll() is None, command.output()
        assert time.monotonic() < deadline, command.output()
        time.sleep(0.1)
    return command


@pytest.fixture(scope="module")
def twice(workspace):
    """A run that was killed, and gone on with to step 10; the second starts meanwhile, and the pid of the first."""
    folder, command = workspace / "runs/twice", f"{TINY} name=twice"
    first = running(workspace, "train", command, folder / "checkpoints/last.ckpt")
    seconds = [run(workspace, "train", f"{command} overwrite=true ckpt_path={where}") for where in ("null", "auto")]
    assert first.poll() is None
    first.kill()
    first.wait(60)
    # What it was writing, had it been killed within; the next start removes it.
    (folder / "checkpoints/.last.ckpt.writing-abcdefgh").mkdir()
    done = run(workspace, "train", f"{command} ckpt_path=auto trainer.max_steps=1")
    assert done.returncode == 0, done.stderr
    return folder, seconds, first.pid


def test_a_second_run_of_a_name_is_refused_while_the_first_one_goes_on(twice):
    folder, seconds, pid = twice
    for second in seconds:
        assert second.returncode == 1
        assert f"runs/twice is being written by process {pid} on " in (line := error_of(second))
        assert line.endswith("wait until that is done, or give another name=...")
    assert not list(folder.rglob(".*"))


def test_a_second_prepare_says_who_is_at_it(workspace):
    with only_writer(workspace / "data/other", inside=False, remedy="-"):
        second = run(workspace, "prepare", "data=digits data.root=data/other")
    assert second.returncode == 1
    assert error_of(second).startswith(f"error: {workspace}/data/other is being written by process {os.getpid()} on ")
    assert not (workspace / "data/other").exists()


LONG = "n" * 300


@pytest.mark.parametrize(
    ("verb", "given", "line"),
    [
        ("train", f"{TINY} paths.runs=/dev/null", "error: /dev/null/digits_tokenizer cannot be written"),
        ("train", f"{TINY} name={LONG}", "error: .*nnn.* cannot be written .File name too long"),
        ("prepare", "data=digits data.root=/dev/null", "error: data.root=/dev/null is not a folder"),
        ("prepare", f"data=digits data.root=data/{LONG}", "error: .*nnn.* cannot be written .File name too long"),
        ("prepare", "data=digits data.root=/proc/digits", "error: /proc/.digits.lock cannot be written"),
        ("encode", "ckpt=runs/twice data=digits out=/dev/null/x", "error: /dev/null cannot be written"),
        ("evaluate", "ckpt=runs/twice out=/dev/null", "error: /dev/null cannot be written"),
        ("sample", "ckpt=runs/twice out=/dev/null", "error: /dev/null cannot be written"),
        ("export", "ckpt=runs/twice out=/dev/null/x", "error: /dev/null cannot be written"),
        ("export", f"ckpt=runs/twice out={LONG}", "error: .*nnn.* cannot be written .File name too long"),
    ],
)
def test_folders_that_are_none_take_one_line(workspace, twice, verb, given, line):
    done = run(workspace, verb, given)
    assert done.returncode == 1
    assert re.match(line, error_of(done))


def test_a_run_folder_that_is_removed_midway_ends_in_one_line_or_is_made_again(workspace):
    folder = workspace / "runs/removed"
    command = f"{TINY} name=removed logger=csv trainer.max_steps=40 trainer.log_every_n_steps=1"
    command = running(workspace, "train", command, folder / "checkpoints/last.ckpt")
    shutil.rmtree(folder, ignore_errors=True)
    status = command.wait(240)
    _, stderr = command.output()
    assert "Traceback" not in stderr
    assert status == 0 or [line for line in stderr.splitlines() if line.startswith("error: ")]
