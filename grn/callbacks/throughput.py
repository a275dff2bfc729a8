"""How fast the run is, and what the data lost."""

import time
from typing import Any

from lightning import Callback, LightningModule, Trainer

from grn.data.streaming import report_skipped


class Throughput(Callback):
    """Logs `train/images_per_second` (or clips) over all ranks between two logged steps.

    Wall-clock time over many steps, so that no step has to wait for the device. Validation and pictures do not count.
    """

    def __init__(self) -> None:
        self._samples = 0
        self._since: float | None = None
        self._paused: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._samples, self._since = 0, time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        self._samples += len(batch["key"]) * trainer.world_size
        if trainer.global_step % trainer.log_every_n_steps == 0 and self._samples:
            now = time.perf_counter()
            speed = self._samples / (now - self._since)
            for logger in trainer.loggers:
                logger.log_metrics({"train/images_per_second": speed}, trainer.global_step - 1)
            self._samples, self._since = 0, now

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._since is not None and self._paused is not None:
            self._since += time.perf_counter() - self._paused


class SkippedSamples(Callback):
    """Reports samples that the data could not give, by reason: `data/skipped` with every validation, and at the end."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers:
            logger.log_metrics({"data/skipped": sum(trainer.datamodule.skipped().values())}, trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        report_skipped(trainer.datamodule.skipped())
