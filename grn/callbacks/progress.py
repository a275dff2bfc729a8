"""A progress bar in optimizer steps."""

from typing import Any

from lightning import LightningModule
from lightning.pytorch.callbacks import RichProgressBar

from grn.runtime.trainer import Trainer


class Progress(RichProgressBar):
    """Lightning's rich bar without epochs, which an endless stream does not have, and without the logger's version.

    It counts optimizer steps of `trainer.max_steps`, also of a run that goes on or accumulates gradients.
    """

    @property
    def total_train_batches(self) -> int | float:
        return self.trainer.max_steps if self.trainer.max_steps > 0 else super().total_train_batches

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.max_steps > 0:
            batch_idx = trainer.global_step - 1  # the bar shows one more
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _get_train_description(self, current_epoch: int) -> str:
        return "training"

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}
