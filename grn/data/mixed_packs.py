"""Captioned images and clips of several data sets in one pack, by weight (DESIGN 1.5)."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple

from grn.data.endless import Place, ResumableLoader
from grn.data.mixed import MixedDataModule
from grn.data.packing import PackedBatches, PackPlace
from grn.data.text_images import PackedDataModule
from grn.errors import UserError

SHARED = ("batch_size", "max_tokens", "lookahead", "rank_streams", "worker_streams", "num_workers")


class MixedPlace(NamedTuple):
    """Just after some sample of a stream of several data sets: how many it has given, and where each set stands."""

    given: int
    parts: tuple[Place, ...]


class MixedPackedBatches(PackedBatches):
    """`PackedBatches` of which every sample comes from one of several data sets.

    Whose turn it is, is a draw of (seed, stream, number of the sample) alone, also where that sample cannot be used:
    each set goes on in its own order, and all that is said of one holds of the mixture.

    Args:
        parts: the data sets, alike in what `SHARED` names; their samples are used, not their packs.
        weights: how often each is drawn, in proportion.
        seed: of the draws.
        length: batches that `len` tells; None: no length.
    """

    def __init__(self, parts: Sequence[PackedBatches], weights: Sequence[float], *, seed: int, length: int | None):
        self.parts, self.weights, first = list(parts), list(weights), parts[0]
        super().__init__(
            [url for part in parts for url in part.urls],
            first.decode,  # never asked: each part decodes its own
            collate=first.collate,
            tokens=first.tokens,
            seed=seed,
            length=length,
            key=first.key,
            **{name: getattr(first, name) for name in SHARED},
        )

    def place(self, saved: Sequence[Any] = ()) -> PackPlace:
        start = MixedPlace(0, (Place(),) * len(self.parts))
        if not saved:
            return PackPlace(oldest=start)
        packs, (given, parts), read, waiting = saved
        oldest = MixedPlace(int(given), tuple(Place(*map(int, part)) for part in parts))
        return PackPlace(int(packs), oldest, int(read), tuple(map(int, waiting)))

    def draw(self, stream: int, number: int) -> int:
        """Whose sample a stream gives as its `number`-th."""
        draws = random.Random(f"pack/{self.seed}/{stream}/{number}")
        return draws.choices(range(len(self.parts)), self.weights)[0]

    def _samples(
        self, stream: int, place: MixedPlace, wanted: Callable[[int], bool] = lambda number: True
    ) -> Iterator[tuple[dict | None, MixedPlace]]:
        own, number = list(place.parts), 0
        samples = [
            part._samples(stream, where, lambda _: wanted(number)) for part, where in zip(self.parts, place.parts)
        ]
        for number in count():
            part = self.draw(stream, place.given + number)
            sample, own[part] = next(samples[part])
            yield sample, MixedPlace(place.given + number + 1, tuple(own))


class MixedPacksDataModule(MixedDataModule):
    """Captioned images and clips from several data sets; packs hold samples of all `parts` that have a weight.

    Validation runs over the parts one after the other.

    Args:
        parts: name -> `PackedDataModule`, alike in what `SHARED` names, all of pixels or all of tokens.
        weights: name -> how often a sample is of it, in proportion, those that cannot be used included.
        shared: of what `SHARED` names, what the config gives for all parts to refer to; their own values count.
        others: as `MixedDataModule` has them.

    Raises:
        UserError: parts and weights do not go together; from the methods: parts that differ.
    """

    def __init__(
        self,
        *,
        name: str,
        parts: Mapping[str, PackedDataModule],
        weights: Mapping[str, float],
        seed: int = 0,
        **shared: int,
    ):
        super().__init__(name=name, parts=parts, weights=weights, seed=seed)
        if odd := shared.keys() - set(SHARED):
            raise UserError(f"data.{min(odd)}: a mixture has no such key, its parts have: data.parts.*.{min(odd)}")

    def setup(self, stage: str | None = None) -> None:
        for name in SHARED:
            values = {part: getattr(data, name) for part, data in self.parts.items()}
            if len(set(values.values())) > 1:
                first, *_ = self.parts
                raise UserError(f"data.parts.*.{name} are {values}: packs of all parts need one, e.g. {values[first]}")
        contents = {part: data.contents for part, data in self.parts.items()}
        if len(set(contents.values())) > 1:
            raise UserError(
                f"data.parts are {contents}: packs hold one kind; encode the others (grn.encode), or give "
                "data.parts.*.features=false where some have text features"
            )
        super().setup(stage)

    def train_dataloader(self) -> ResumableLoader:
        loaders = [part.train_dataloader() for part in self.drawn.values()]
        batches = MixedPackedBatches(
            [loader.dataset for loader in loaders],
            [self.weights[name] for name in self.drawn],
            seed=self.seed,
            length=None if self.trainer is None else self.trainer.max_steps * self.trainer.accumulate_grad_batches,
        )
        first = loaders[0]
        return ResumableLoader(
            batches, worker_init_fn=first.worker_init_fn, pin_memory=first.pin_memory, generator=first.generator
        )
