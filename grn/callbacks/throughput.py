"""Logs throughput and skipped samples."""

import time
from typing import Any

import torch
from lightning import Callback, LightningDataModule
from lightning.fabric.utilities.throughput import get_available_flops

from grn.callbacks.validations import logged_step
from grn.data.contract import count_samples
from grn.data.stream.streaming import report_skipped
from grn.runtime.ranks import gather, gather_counts
from grn.runtime.trainer import Trainer
from grn.training import AnyModule

DTYPES = {"bf16": torch.bfloat16, "16": torch.float16}  # of the trainer's matrix products; else float32


class Throughput(Callback):
    """Logs `train/images_per_second` (or clips) over all ranks between two logged steps, and what they cost.

    `train/tflops_per_second` takes the FLOP of a sample from `pl_module.flop_per_sample(batch)`; `train/mfu` is its
    share of what all devices could do, by their makers' figures for dense matrix products (Lightning's table). Where
    the table does not know the device, as on a CPU, there is no `train/mfu`.

    Wall-clock time over many steps, so that no step has to wait for the device. Validation and pictures do not count.
    """

    def __init__(self) -> None:
        self._samples, self._flop = 0, 0
        self._since, self._paused = 0.0, 0.0
        self._peak: float | None = None
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: AnyModule) -> None:
        self._samples, self._flop, self._since = 0, 0, time.perf_counter()
        self._step = trainer.global_step
        dtype = DTYPES.get(str(trainer.precision).partition("-")[0], torch.float32)
        self._peak = get_available_flops(pl_module.device, dtype)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: AnyModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        samples = count_samples(batch)  # packs have more on one rank than on another
        self._samples += samples
        self._flop += samples * pl_module.flop_per_sample(batch)
        if trainer.global_step == self._step:  # gradients are still being accumulated
            return
        self._step = trainer.global_step
        if trainer.global_step % trainer.log_every_n_steps == 0:
            now = time.perf_counter()
            seconds = now - self._since
            own = torch.tensor([self._samples, self._flop], dtype=torch.float64)
            samples, flop = sum(gather(own), torch.zeros_like(own)).tolist()
            curves = {
                "train/images_per_second": samples / seconds,
                "train/tflops_per_second": flop / seconds / 1e12,
            }
            if self._peak:
                curves["train/mfu"] = flop / seconds / (self._peak * trainer.world_size)
            for logger in trainer.loggers:
                logger.log_metrics(curves, trainer.global_step - 1)
            self._samples, self._flop, self._since = 0, 0, now

    def on_validation_start(self, trainer: Trainer, pl_module: AnyModule) -> None:
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: AnyModule) -> None:
        self._since += time.perf_counter() - self._paused


class SkippedSamples(Callback):
    """Reports samples that the data could not give any rank, by reason: `data/skipped` with every validation, and at
    the end."""

    def on_validation_end(self, trainer: Trainer, pl_module: AnyModule) -> None:
        skipped = gather_counts(_counts(trainer.datamodule, "skipped"))
        for logger in trainer.loggers:
            logger.log_metrics({"data/skipped": sum(skipped.values())}, logged_step(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: AnyModule) -> None:
        report_skipped(*(gather_counts(_counts(trainer.datamodule, kind)) for kind in ("skipped", "noted")))


def _counts(datamodule: LightningDataModule, kind: str) -> dict[str, int]:
    """Of a data module that counts them (grn.data.contract)."""
    return getattr(datamodule, kind, dict)()
