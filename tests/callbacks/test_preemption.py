"""SIGTERM to this very process, in the middle of a step or of a validation."""

import os
import shlex
import signal
import threading
import time
from pathlib import Path

import commands
import lightning
import pytest
import torch
from data.tars import write_tar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from grn.callbacks import SaveLastStep, SaveOnSigterm
from grn.data.datamodule import ShardsDataModule
from grn.training.requeue import GRACE, requeue


class Module(lightning.LightningModule):
    """Trains one number, and sends SIGTERM, or `sent`, when it comes to a place: ("train" or "validate", batch)."""

    def __init__(self, place, sent=(signal.SIGTERM,)):
        super().__init__()
        self.sent = sent
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.place, self.validated = place, 0

    def training_step(self, batch, batch_idx):
        if self.place == ("train", batch_idx):
            for number in self.sent:
                os.kill(os.getpid(), number)
        self.log("loss", loss := self.weight * batch.mean())
        return loss

    def validation_step(self, batch, batch_idx):
        if self.place == ("validate", batch_idx):
            os.kill(os.getpid(), signal.SIGTERM)
        self.validated += 1

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder, place, path=None, **sent):
    module = Module(place, **sent)
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=8, max_epochs=-1, accumulate_grad_batches=2, val_check_interval=6,
        check_val_every_n_epoch=None, num_sanity_val_steps=0, logger=CSVLogger(folder), log_every_n_steps=1,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        callbacks=[SaveOnSigterm(str(folder / "last.ckpt"))],
    )  # fmt: skip
    data = torch.arange(16.0).split(1)
    loaders = (torch.utils.data.DataLoader(part, batch_size=None) for part in (data, data[:3]))
    trainer.fit(module, *loaders, ckpt_path=path)
    return module, trainer


@pytest.mark.parametrize(
    ("place", "step"),
    [  # two batches make a step, a validation follows the third, three batches long
        (("train", 2), 2),
        (("train", 3), 2),
        (("train", 5), 3),
        (("validate", 0), 4),
        (("train", 15), 8),
    ],
)
def test_the_running_step_is_finished_and_saved(tmp_path, place, step):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SIGTERMException):
        fit(tmp_path, place)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == step
    assert signal.getsignal(signal.SIGTERM) == before
    _, trainer = fit(tmp_path, None, tmp_path / "last.ckpt")
    assert trainer.global_step == 8
    logged = [row.split(",")[-1] for path in sorted(tmp_path.rglob("metrics.csv")) for row in path.open()]
    assert [step for step in logged if step.strip().isdigit()] == [f"{i}\n" for i in range(8)]


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        ([signal.SIGUSR2], signal.SIGUSR2),
        ([signal.SIGUSR2, signal.SIGTERM], signal.SIGTERM),
        ([signal.SIGTERM, signal.SIGUSR2], signal.SIGTERM),
    ],
)
def test_who_queues_jobs_again_is_asked_when_all_is_saved(tmp_path, monkeypatch, sent, told):
    """As submitit has it: a handler of SIGUSR2. Of a SIGTERM, SLURM is waited for, and may send SIGUSR2 yet."""
    asked, waited = [], []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: asked.append((tmp_path / "last.ckpt").exists()))
    monkeypatch.setattr("grn.training.requeue.time.sleep", waited.append)
    try:
        with pytest.raises(SIGTERMException) as stopped:
            fit(tmp_path, ("train", 2), sent=sent)
        assert stopped.value.args == (told,)
        assert asked == []
        requeue(*stopped.value.args)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert (asked, waited) == (([True], []) if told == signal.SIGUSR2 else ([], [GRACE]))


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGHUP])
def test_who_ends_a_run_by_hand_has_it_saved_and_no_job_queued_again(tmp_path, monkeypatch, sent):
    asked = []
    before = signal.signal(signal.SIGUSR2, lambda *_: asked.append("queued"))
    monkeypatch.setattr("grn.training.requeue.time.sleep", lambda _: pytest.fail("waited"))
    own = signal.getsignal(sent)
    try:
        with pytest.raises(SIGTERMException) as stopped:
            fit(tmp_path, ("train", 2), sent=[sent])
        requeue(*stopped.value.args)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert (stopped.value.args, asked) == ((sent,), [])
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2
    assert signal.getsignal(sent) == own


def _ctrl_c_twice(folder):
    fit(Path(folder), ("train", 2), sent=[signal.SIGINT, signal.SIGINT])


def test_ctrl_c_twice_ends_at_once(tmp_path):
    command = commands.Command.calling(_ctrl_c_twice, str(tmp_path))
    assert command.wait(120) == 130
    assert not (tmp_path / "last.ckpt").exists()
    assert "Traceback" not in command.output()[1]


def test_where_no_job_is_queued_again_nothing_is_waited_for(monkeypatch):
    waited, before = [], signal.getsignal(signal.SIGUSR2)
    assert before == signal.SIG_DFL
    monkeypatch.setattr("grn.training.requeue.time.sleep", waited.append)
    requeue(signal.SIGTERM)
    assert waited == []
    assert signal.getsignal(signal.SIGUSR2) == before


def test_without_a_signal_nothing_is_saved(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    _, trainer = fit(tmp_path, None)
    assert trainer.global_step == 8
    assert not (tmp_path / "last.ckpt").exists()
    assert signal.getsignal(signal.SIGTERM) == before


class Labels(ShardsDataModule):
    """Of shards that hold `key.cls`."""

    def decoder(self, *, training):
        return lambda raw, number: float(raw["cls"])

    collate = staticmethod(torch.tensor)


class Stalling(Module):
    """SIGTERM comes half a second after its second batch, when it waits for the third, which never comes."""

    def training_step(self, batch, batch_idx):
        if batch_idx == 1:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("accumulated", [1, 3])
def test_no_step_is_waited_for_whose_data_do_not_come(tmp_path, monkeypatch, caplog, workers, accumulated):
    """Between two steps all is saved at once; within one, gradients are lost, and the checkpoint before stands."""
    monkeypatch.setattr("grn.callbacks.preemption.SILENCE", 2)
    shard = write_tar(tmp_path / "x.tar", [(f"{i}.cls", b"%d" % i) for i in range(4)])
    url = f"pipe:cat {shlex.quote(shard)}; exec sleep 1000"
    data = Labels(name="x", batch_size=1, train=url, val=shard, num_workers=workers, shuffle_buffer=0)
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=8, max_epochs=-1, accumulate_grad_batches=accumulated, limit_val_batches=0,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[SaveOnSigterm(str(tmp_path / "last.ckpt"))],
    )  # fmt: skip
    start = time.monotonic()
    with pytest.raises(SIGTERMException) as stopped:
        trainer.fit(Stalling(None), datamodule=data)
    assert stopped.value.args == (signal.SIGTERM,)
    assert time.monotonic() - start < 60
    if accumulated == 1:
        saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
        assert saved["global_step"] == 2
        assert saved["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]["batches"] == 2
    else:
        assert not (tmp_path / "last.ckpt").exists()
        assert "steps since the last checkpoint are lost" in caplog.text


class Broken(lightning.Callback):
    """Cannot score what it was built to score."""

    def on_validation_epoch_end(self, trainer, pl_module):
        if trainer.global_step == 4:
            raise RuntimeError("late")


def test_the_last_step_is_saved_before_what_follows_it(tmp_path):
    saving = SaveLastStep(str(tmp_path / "end.ckpt"))
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=4, val_check_interval=2, check_val_every_n_epoch=None, accumulate_grad_batches=2,
        num_sanity_val_steps=0, logger=False, enable_checkpointing=False, enable_progress_bar=False, max_epochs=-1,
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=[Broken(), saving],
    )  # fmt: skip
    data = torch.arange(16.0).split(1)
    loaders = (torch.utils.data.DataLoader(part, batch_size=None) for part in (data, data[:1]))
    with pytest.raises(RuntimeError, match="late"):
        trainer.fit(Module(None), *loaders)
    assert torch.load(tmp_path / "end.ckpt", weights_only=True)["global_step"] == 4
