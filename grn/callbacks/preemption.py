"""What SIGTERM does to a run, as SLURM and torchrun send it before they kill, and Ctrl-C; and how a SLURM job is queued
again."""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning import Callback, LightningModule
from lightning.pytorch.utilities.exceptions import SIGTERMException

from grn.runtime.interruption import AGAIN, STOPPING, end_at_once
from grn.runtime.trainer import Trainer
from grn.training.requeue import REQUEUE, _is_requeued

log = logging.getLogger(__name__)

TORCHRUN = "TORCHELASTIC_RUN_ID"  # in the environment of ranks to which a launcher passes Ctrl-C on
SILENCE = 20  # seconds without a batch, after a signal, for which a step that cannot be saved is waited for


class SaveOnSigterm(Callback):
    """After a SIGTERM to any rank, all save at the end of the same optimizer step, and `SIGTERMException` ends the fit.

    So they do after Ctrl-C, SIGHUP (a terminal that was closed) and submitit's SIGUSR2. The exception's argument is the
    signal's number. Another Ctrl-C ends the process at once.

    A validation that is running, with its pictures and scores, is finished first, and one more step is made.

    No step is waited for whose data do not come. A single rank between two steps saves at once; several, of which the
    others may be within the step, and one that accumulates gradients, end after `SILENCE` seconds without a batch, and
    go on from the checkpoint before.

    It takes the place of Lightning's handler, which broadcasts from within the signal handler, in between whatever the
    ranks are exchanging at that moment, and lets rank 0 stop a step before the others know of it.

    Args:
        path: of the checkpoint.
    """

    def __init__(self, path: str):
        self.path = Path(path)
        self._received, self._saved = 0, False  # the signal
        self._group: dist.ProcessGroup | None = None
        self._loading_since: float | None = None  # None: a batch is there
        self._between_steps = True
        self._stop_loading: Callable[[int], None] = lambda received: None
        self._step = 0
        self._is_first, self._told_at = True, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        if trainer.world_size > 1:
            # On the CPU whatever trains: the ranks agree after every step without waiting for their devices.
            self._group = dist.new_group(backend="gloo")  # pyright: ignore[reportAttributeAccessIssue] of all ranks
        self._loading_since, self._between_steps = time.monotonic(), True
        self._stop_loading = getattr(trainer.datamodule, "stop_loading", self._stop_loading)
        # By Lightning's handler, until now.
        self._received, self._saved = signal.SIGTERM if trainer.received_sigterm else 0, False
        if threading.current_thread() is threading.main_thread():  # others may not handle signals
            for number in STOPPING:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                    signal.signal(number, self._receive)  # until Lightning restores what was there before the fit
            self._is_first = trainer.is_global_zero
            if _is_requeued():
                signal.signal(REQUEUE, self._receive)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        self._between_steps = trainer.global_step != self._step
        self._loading_since = time.monotonic()
        if not self._between_steps:  # accumulated gradients are no part of a checkpoint
            return
        self._step = trainer.global_step
        received = self._received
        if self._group is not None:
            flag = torch.tensor(received, dtype=torch.int32)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
            received = self._received = int(flag)
        if received:
            trainer.save_checkpoint(self.path, weights_only=False)
            self._saved = True

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._loading_since = None
        self._end()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._loading_since = time.monotonic()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._loading_since = None
        self._end()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, SIGTERMException) or self._saved or self._loading_since is None:
            return
        if self._between_steps and self._group is None:
            trainer.save_checkpoint(self.path, weights_only=False)
        else:
            log.warning("no data came for %d seconds: steps since the last checkpoint are lost", SILENCE)

    def _end(self) -> None:
        """In the first hook after the step, when it has been logged."""
        if self._saved:
            raise SIGTERMException(self._received)

    def _receive(self, received: int, _: Any) -> None:
        if received == signal.SIGINT:
            if self._received and time.monotonic() - self._told_at >= (AGAIN if TORCHRUN in os.environ else 0):
                end_at_once()
            if not self._received and self._is_first and sys.__stderr__ is not None:  # printing is not safe here
                os.write(sys.__stderr__.fileno(), b"\nsaving after the running step; Ctrl-C again ends at once\n")
        if not self._received:
            self._told_at = time.monotonic()
        first, self._received = not self._received, max(received, self._received)  # SIGTERM is the greater one
        if self._loading_since is not None and self._between_steps and self._group is None:
            self._stop_loading(self._received)
        elif first:
            threading.Thread(target=self._stop_waiting, daemon=True).start()

    def _stop_waiting(self) -> None:
        """For data that do not come."""
        received, pause = time.monotonic(), threading.Event()
        while not self._saved:
            since = self._loading_since
            if since is not None and time.monotonic() - max(since, received) >= SILENCE:
                self._stop_loading(self._received)
                return
            pause.wait(0.5)


class SaveLastStep(Callback):
    """Saves after a run's last step: the validation, pictures and scores that follow may fail.

    Args:
        path: of the checkpoint.
    """

    def __init__(self, path: str):
        self.path = Path(path)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        if trainer.global_step >= trainer.estimated_stepping_batches and not trainer.fast_dev_run:
            trainer.save_checkpoint(self.path, weights_only=False)
