"""Several data sets in one run, batch by batch: images and clips for one tokenizer."""

import random
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from lightning import LightningDataModule
from torch.utils.data import DataLoader

from grn.data.datamodule import ShardsDataModule, repeated_batches
from grn.data.stream.endless import ResumableLoader
from grn.runtime.errors import UserError
from grn.runtime.trainer import Trainer


class MixedDataModule(LightningDataModule):
    """Every training batch comes whole from one of `parts`, by a draw of (seed, number of the batch) alone.

    Validation runs over the parts one after the other.

    Args:
        name: of the data, as in `data=NAME`; for messages.
        parts: name -> data set, in the order of validation.
        weights: name -> how often it is drawn, in proportion.
        seed: of the draws.

    Raises:
        UserError: parts and weights do not go together.
    """

    trainer: Trainer | None

    def __init__(
        self, *, name: str, parts: Mapping[str, ShardsDataModule], weights: Mapping[str, float], seed: int = 0
    ):
        super().__init__()
        if parts.keys() != weights.keys() or not parts:
            raise UserError(f"data.weights={dict(weights)} must name each of data.parts: {', '.join(parts)}")
        if min(weights.values()) < 0 or sum(weights.values()) <= 0:
            raise UserError(f"data.weights={dict(weights)} must not be negative, and one of them positive")
        self.name, self.parts, self.weights, self.seed = name, dict(parts), dict(weights), seed

    @property
    def drawn(self) -> dict[str, ShardsDataModule]:
        """The parts that training draws from at all."""
        return {name: part for name, part in self.parts.items() if self.weights[name] > 0}

    def setup(self, stage: str | None = None) -> None:
        for name, part in self.parts.items():
            part.setup(stage if name in self.drawn else "validate")

    def train_dataloader(self) -> "MixedLoader":
        loaders = {name: part.train_dataloader() for name, part in self.drawn.items()}
        return MixedLoader(
            loaders,
            {name: self.weights[name] for name in loaders},
            seed=self.seed,
            length=self._train_length(),
            repeated=repeated_batches(self.trainer),
        )

    def _train_length(self) -> int | None:
        """Batches in the trainer's run."""
        if self.trainer is None:
            return None
        if self.trainer.max_steps <= 0:
            raise UserError("trainer.max_steps must be given: a mixture of data has no epochs, and so no other end")
        return self.trainer.max_steps * self.trainer.accumulate_grad_batches

    def val_dataloader(self) -> list[DataLoader]:
        return [part.val_dataloader() for part in self.parts.values()]

    def split_dataloader(self, split: str, *, share: bool = False) -> Iterator[dict[str, Any]]:
        """As of `ShardsDataModule`, of the parts that training draws from: one after the other, all of each."""
        loaders = [part.split_dataloader(split, share=share) for part in self.drawn.values()]
        return chain.from_iterable(loaders)

    def stop_loading(self, number: int) -> None:
        """As `ShardsDataModule.stop_loading`, of all parts."""
        for part in self.parts.values():
            part.stop_loading(number)

    def skipped(self) -> dict[str, int]:
        """As `ShardsDataModule.skipped`, of all parts."""
        return dict(sum((Counter(part.skipped()) for part in self.parts.values()), Counter()))

    def noted(self) -> dict[str, int]:
        """As `ShardsDataModule.noted`, of all parts."""
        return dict(sum((Counter(part.noted()) for part in self.parts.values()), Counter()))


class MixedLoader:
    """Endless batches out of endless loaders; goes on from its `state_dict`, which is collective as theirs is.

    Args:
        length: batches that `len` tells; None: no length.
        repeated: as `GlobalBatches` has it.
    """

    def __init__(
        self,
        loaders: Mapping[str, ResumableLoader],
        weights: Mapping[str, float],
        *,
        seed: int,
        length: int | None,
        repeated: int | None = None,
    ):
        self.loaders, self.weights, self.seed, self.length = dict(loaders), dict(weights), seed, length
        self.repeated = repeated
        self._batches = 0
        self._kept: list[dict[str, Any]] = []

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("a mixture without `length` has no len()")
        return self.length

    def __iter__(self) -> Iterator[dict[str, Any]]:
        iterators = {name: iter(loader) for name, loader in self.loaders.items()}
        if self.repeated is not None and not self._kept:
            self._kept = [next(iterators[self.draw(number)]) for number in range(self.repeated)]
        while True:
            if self._kept:
                batch = self._kept[self._batches % len(self._kept)]
            else:
                batch = next(iterators[self.draw(self._batches)])
            self._batches += 1  # before the yield: whoever asks for the state does so while this generator rests there
            yield batch

    def draw(self, number: int) -> str:
        """Whose turn it is; the same on every rank, so that all of them run the same layers."""
        return random.Random(f"mix/{self.seed}/{number}").choices([*self.weights], [*self.weights.values()])[0]

    def state_dict(self) -> dict[str, Any]:
        return {
            "batches": self._batches,
            "loaders": {name: loader.state_dict() for name, loader in self.loaders.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict()`.

        Raises:
            UserError: the state is of other parts.
        """
        if state["loaders"].keys() != self.loaders.keys():
            raise UserError(
                f"the checkpoint's place in the data is of {', '.join(state['loaders'])}, this run has "
                f"{', '.join(self.loaders)}: resume with the same data.parts"
            )
        self._batches = state["batches"]
        if self.repeated is not None:  # what is repeated is at the beginning
            return
        for name, loader in self.loaders.items():
            loader.load_state_dict(state["loaders"][name])
