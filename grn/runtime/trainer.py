"""Lightning's Trainer, with the attributes that other parts of Lightning set on it, which type checkers do not find."""

from typing import TYPE_CHECKING, Any

import lightning

if TYPE_CHECKING:

    class Trainer(lightning.Trainer):
        datamodule: Any
        fast_dev_run: int | bool
        log_every_n_steps: int
        overfit_batches: int | float

else:
    Trainer = lightning.Trainer


def is_logged(trainer: Any, step: int) -> bool:
    """Whether what happens in optimizer step `step`, from 0, is logged."""
    return (step + 1) % trainer.log_every_n_steps == 0
