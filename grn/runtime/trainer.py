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
