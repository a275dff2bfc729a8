"""Scores of a refiner's samples during training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Callback
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from grn.callbacks.validations import is_last_validation, logged_step
from grn.evaluation.scoring import build_scores, check_num, check_scores, real_splits, score_samples, steps_by_class
from grn.runtime.errors import check_count
from grn.runtime.files import write_text
from grn.runtime.ranks import together
from grn.runtime.trainer import Trainer
from grn.training import RefinerModule


class EvaluateSamples(Callback):
    """Samples and scores with every `every`-th validation and with the last one; logs `eval/<metric>`.

    Not in Lightning's sanity check nor with `fast_dev_run`.

    How many steps samples took goes to W&B as the histogram `eval/steps` and the table `eval/steps_by_class`, and to a
    file beside the CSV logger's curves: `steps-step<step>.csv`, how many samples of each class took so many.

    Args:
        scores: name -> partial of a score (config group `scores`); empty does nothing.
        num: how many samples, an equal number a class.
        batch_size: of sampling.
        every: validations from one scoring to the next; 0 scores at the end alone.
        seed: of the sampling.
        cache_dir: where statistics of the data are kept.
    """

    def __init__(
        self, scores: Mapping[str, Any], *, num: int, batch_size: int, cache_dir: str, every: int = 1, seed: int = 0
    ):
        check_count("callbacks.scores.batch_size", batch_size)
        check_count("callbacks.scores.every", every, least=0)
        self.configured, self.num, self.batch_size = scores, num, batch_size
        self.every, self.seed, self.cache_dir = every, seed, Path(cache_dir)
        self.scores: dict[str, Any] | None = None
        self._validations = 0

    def on_fit_start(self, trainer: Trainer, pl_module: RefinerModule) -> None:
        """What would end the run with its last validation ends it here."""
        if self.configured:
            with together():
                check_num(self.num, pl_module.bundle.num_conditions, key="callbacks.scores.num")
                check_scores(self.configured, self.num)
                real_splits(trainer.datamodule, clips=None)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: RefinerModule) -> None:
        if not self.configured or trainer.sanity_checking or trainer.fast_dev_run:
            return
        self._validations += 1
        if not is_last_validation(trainer) and (self.every == 0 or self._validations % self.every):
            return
        if self.scores is None:
            splits = real_splits(trainer.datamodule, clips=pl_module.bundle.token_shape[1] > 1)
            self.scores = build_scores(self.configured, splits, device=pl_module.device, cache_dir=self.cache_dir)
        metrics, steps = score_samples(
            pl_module.bundle,
            self.scores,
            num=self.num,
            batch_size=self.batch_size,
            seed=self.seed,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )
        for name, value in metrics.items():
            pl_module.log(f"eval/{name}", float(value))
        _log_steps(trainer, steps)

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validations = state_dict["validations"]


@rank_zero_only
def _log_steps(trainer: Trainer, steps: Tensor) -> None:
    """`steps` as `score_samples` counts them."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            import wandb  # takes its time, and has it taken already where there is such a logger

            edges = torch.arange(steps.shape[1] + 1) - 0.5
            histogram = wandb.Histogram(np_histogram=(steps.sum(dim=0).numpy(), edges.numpy()))
            drawn: dict[str, Any] = {"eval/steps": histogram}
            logger.log_metrics(drawn, step=logged_step(trainer))
            rows = [[label, mean] for label, mean in enumerate(steps_by_class(steps))]
            logger.log_table("eval/steps_by_class", ["class", "steps"], rows, step=logged_step(trainer))
        elif isinstance(logger, CSVLogger):
            rows = [f"{label},{number},{steps[label, number]}" for label, number in torch.nonzero(steps).tolist()]
            path = Path(logger.log_dir) / f"steps-step{trainer.global_step:07d}.csv"
            write_text(path, "\n".join(["class,steps,samples", *rows]) + "\n")
