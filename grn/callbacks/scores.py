"""FID, inception score and the like of a refiner's samples, while it trains."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from grn.callbacks.validations import is_last_validation
from grn.evaluation import build_scores, score_samples


class EvaluateSamples(Callback):
    """Samples and scores with every `every`-th validation and with the last one; logs `eval/<metric>`.

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
        self.configured, self.num, self.batch_size = scores, num, batch_size
        self.every, self.seed, self.cache_dir = every, seed, Path(cache_dir)
        self.scores: dict[str, Any] | None = None
        self._validations = 0

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.configured:
            return
        self._validations += 1
        if not is_last_validation(trainer) and (self.every == 0 or self._validations % self.every):
            return
        if self.scores is None:
            self.scores = build_scores(
                self.configured, trainer.datamodule, device=pl_module.device, cache_dir=self.cache_dir
            )
        metrics = score_samples(
            pl_module,
            self.scores,
            num=self.num,
            batch_size=self.batch_size,
            seed=self.seed,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )
        for name, value in metrics.items():
            pl_module.log(f"eval/{name}", float(value))

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validations = state_dict["validations"]
