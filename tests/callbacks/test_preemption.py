"""SIGTERM to this very process, in the middle of a step or of a validation."""

import os
import signal

import lightning
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from grn.callbacks import SaveOnSigterm
from grn.callbacks.preemption import GRACE, requeue


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
    monkeypatch.setattr("grn.callbacks.preemption.time.sleep", waited.append)
    try:
        with pytest.raises(SIGTERMException) as stopped:
            fit(tmp_path, ("train", 2), sent=sent)
        assert stopped.value.args == (told,)
        assert asked == []
        requeue(*stopped.value.args)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert (asked, waited) == (([True], []) if told == signal.SIGUSR2 else ([], [GRACE]))


def test_where_no_job_is_queued_again_nothing_is_waited_for(monkeypatch):
    monkeypatch.setattr("grn.callbacks.preemption.time.sleep", lambda _: pytest.fail("waited"))
    requeue(signal.SIGTERM)


def test_without_a_signal_nothing_is_saved(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    _, trainer = fit(tmp_path, None)
    assert trainer.global_step == 8
    assert not (tmp_path / "last.ckpt").exists()
    assert signal.getsignal(signal.SIGTERM) == before
