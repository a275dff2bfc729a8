"""What SIGTERM does to a run, as SLURM and torchrun send it before they kill; and how a SLURM job is queued again."""

import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

# What SLURM sends before the end of a job's time, where submitit runs it, which then has a handler that queues the job
# again.
REQUEUE = signal.SIGUSR2
GRACE = 600  # seconds at most in which SLURM kills what it preempts


class SaveOnSigterm(Callback):
    """After a SIGTERM to any rank, all save at the end of the same optimiser step, and `SIGTERMException` ends the fit.

    So they do after submitit's SIGUSR2. The exception's argument is the signal's number.

    A validation that is running, with its pictures and scores, is finished first, and one more step is made.

    It takes the place of Lightning's handler, which broadcasts from within the signal handler, in between whatever the
    ranks are exchanging at that moment, and lets rank 0 stop a step before the others know of it.

    Args:
        path: of the checkpoint.
    """

    def __init__(self, path: str):
        self.path = Path(path)
        self._received, self._saved = 0, False  # the signal
        self._group: dist.ProcessGroup | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1:
            # On the CPU whatever trains: the ranks agree after every step without waiting for their devices.
            self._group = dist.new_group(backend="gloo")
        # By Lightning's handler, until now.
        self._received, self._saved = signal.SIGTERM if trainer.received_sigterm else 0, False
        if threading.current_thread() is threading.main_thread():  # others may not handle signals
            signal.signal(signal.SIGTERM, self._receive)  # until Lightning restores what was there before the fit
            if _is_requeued():
                signal.signal(REQUEUE, self._receive)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:  # gradients are no part of a checkpoint
            return
        received = self._received
        if self._group is not None:
            flag = torch.tensor(received, dtype=torch.int32)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
            received = self._received = int(flag)
        if received:
            trainer.save_checkpoint(self.path, weights_only=False)
            self._saved = True

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._end()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    def _end(self) -> None:
        """In the first hook after the step, when it has been logged."""
        if self._saved:
            raise SIGTERMException(self._received)

    def _receive(self, received: int, _: Any) -> None:
        self._received = max(received, self._received)  # SIGTERM is the greater one


def requeue(received: int) -> None:
    """After a run that `received` this signal has saved: queues its SLURM job again, and does not return.

    It returns where submitit does not run the job. Of a SIGTERM, SLURM alone knows what it means: it kills the job, and
    if it preempts it, queues it again; but not one that ended by itself meanwhile. So that is waited for.
    """
    if not _is_requeued():
        return
    if received == signal.SIGTERM:
        time.sleep(GRACE)  # a SIGUSR2 that follows ends it
    else:
        signal.raise_signal(REQUEUE)


def _is_requeued() -> bool:
    return callable(signal.getsignal(REQUEUE))
