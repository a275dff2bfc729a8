"""Ctrl-C, SIGTERM and closed terminals, sent to real commands: one line, the shell's status, what was done is kept."""

import os
import signal
import time

import commands
import pytest
import torch
from PIL import Image

from grn.runtime.interruption import Interrupted, stops_on_signals

TOKENIZER = "+experiment=digits_tokenizer model.dim=8 model.decoder_dim=8 trainer.max_steps=100000 logger=csv name=run"
TOKENIZER += " trainer.val_check_interval=100000 callbacks.last.every_n_train_steps=100000 data.batch_size=20"
TOKENIZER += " trainer.log_every_n_steps=1 +logger.csv.flush_logs_every_n_steps=1"


def environment(folder):
    return os.environ | {"GRN_DATA": str(folder / "data"), "GRN_RUNS": str(folder / "runs")}


def wait_for(command, seen):
    deadline = time.monotonic() + 200
    while not seen():
        assert command.poll() is None, command.output()
        assert time.monotonic() < deadline, command.output()
        time.sleep(0.002)


@pytest.mark.parametrize("received", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_command_ends_with_a_line_and_the_shells_status(capsys, received):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    closed = []

    def work():
        try:
            os.kill(os.getpid(), received)
            time.sleep(10)
        except Interrupted as stopped:
            os.kill(os.getpid(), signal.SIGTERM)  # nothing breaks off what closes
            closed.append("files")
            stopped.kept = "all of it"
            raise

    with pytest.raises(SystemExit) as exit, stops_on_signals():
        work()
    assert exit.value.code == 128 + received
    assert capsys.readouterr().err == f"stopped by {received.name}: all of it\n"
    assert closed == ["files"]
    assert {number: signal.getsignal(number) for number in before} == before


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stops_on_signals():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def _twice():
    with stops_on_signals():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)


def test_twice_ends_at_once():
    command = commands.Command.calling(_twice)
    assert command.wait(60) == 130
    assert command.output()[1].strip() == "ended at once"


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.full)])
def test_finished_shards_stay(tmp_path, workers):
    (tmp_path / "pictures").mkdir()
    for number in range(120):
        Image.effect_noise((320, 320), 90).save(tmp_path / "pictures" / f"{number:03d}.png")
        (tmp_path / "pictures" / f"{number:03d}.txt").write_text(f"noise {number}")
    arguments = ("data=captioned_image", "root=pictures", "source.shard_size=5", "source.val=10")
    arguments += (f"source.num_workers={workers}", "data.root=data/pictures")
    command = commands.Command("grn.prepare", *arguments, env=environment(tmp_path), cwd=tmp_path)
    shards = tmp_path / "data" / ".pictures.partial" / "shards"
    wait_for(command, lambda: len(list(shards.glob("*.tar"))) > 3)  # each is recorded after it is there
    os.killpg(command.pid, signal.SIGINT)
    assert command.wait(120) == 130
    (line,) = command.output()[1].strip().splitlines()
    assert line.startswith("stopped by SIGINT: finished shards stay in ")
    kept = {path.name: path.stat().st_mtime_ns for path in shards.glob("*.tar")}
    assert kept
    done = commands.run("grn.prepare", *arguments, env=environment(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "going on: " in done.stdout
    root = tmp_path / "data" / "pictures"
    again = {name: (root / name).stat().st_mtime_ns for name in kept}
    assert sum(again[name] == kept[name] for name in kept) > len(kept) - 3  # but for those that were not yet recorded


@pytest.mark.slow
def test_a_run_is_saved(tmp_path):
    done = commands.run("grn.prepare", "data=digits", env=environment(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    command = commands.Command("grn.train", *TOKENIZER.split(), env=environment(tmp_path), cwd=tmp_path)
    wait_for(command, lambda: "run folder" in "".join(command.output()))
    curves = tmp_path / "runs/run/csv/version_0/metrics.csv"
    wait_for(command, lambda: curves.exists() and len(curves.read_text().splitlines()) > 2)  # it is in its steps
    os.killpg(command.pid, signal.SIGINT)  # as a terminal does, to its workers, too
    assert command.wait(120) == 130
    said = "".join(command.output())
    assert "Traceback" not in said
    assert "saving after the running step; Ctrl-C again ends at once" in said
    step = torch.load(tmp_path / "runs/run/checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert f"stopped by SIGINT after step {step}: ckpt_path=last resumes from there" in said
