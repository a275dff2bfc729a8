"""Ends a point of a search that is worse than others were."""

import logging
from typing import Any

from lightning import Callback, LightningModule

from grn.runs.studies import own_trial
from grn.runtime.errors import UserError
from grn.runtime.trainer import Trainer

log = logging.getLogger(__name__)


class Pruning(Callback):
    """Tells Optuna `monitor` at each validation, and ends the training where the study's pruner says so.

    The run then ends as others do, with its checkpoint and `metrics.json`; outside of a search it does nothing.

    Args:
        monitor: the metric, as it is logged.
    """

    def __init__(self, monitor: str):
        self.monitor = monitor
        self.trial: Any = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.trial = own_trial()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        stop = False
        if self.trial is not None and trainer.global_step < trainer.estimated_stepping_batches:
            if self.monitor not in trainer.callback_metrics:
                known = ", ".join(sorted(trainer.callback_metrics))
                raise UserError(f"callbacks.pruning.monitor={self.monitor} was not measured; there is {known}")
            self.trial.report(float(trainer.callback_metrics[self.monitor]), trainer.global_step)
            if stop := self.trial.should_prune():
                self.trial.set_user_attr("pruned", trainer.global_step)
                log.info("ended early at step %d: others had a better %s", trainer.global_step, self.monitor)
        trainer.should_stop = trainer.strategy.reduce_boolean_decision(trainer.should_stop or stop, all=False)
