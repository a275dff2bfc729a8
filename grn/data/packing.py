"""Packs of samples that fill a budget of tokens, in an order that goes on exactly (DESIGN 1.5)."""

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any, NamedTuple

from grn.data.endless import GlobalBatches, Place
from grn.data.samples import Reason


class PackPlace(NamedTuple):
    """Just after some pack of a stream. Places are ordered as the stream is.

    Which samples wait at that time is told by numbers: of the stream's samples, usable or not, from `oldest` on.
    """

    packs: int = 0  # that the stream has given
    oldest: Place = Place()  # just before the first of the samples that wait
    read: int = 0  # samples from there on that were read
    waiting: tuple[int, ...] = ()  # which of them wait, ascending; the others were given, or are not usable


class Waiting(NamedTuple):
    """A sample that no pack has taken yet."""

    number: int  # in its stream, since the stream was opened
    before: Place
    tokens: int
    sample: dict


class PackedBatches(GlobalBatches):
    """Global batches of packs in place of samples; a pack is a list of samples with at most `max_tokens` in all.

    Every stream has packs of its own, so that all `GlobalBatches` says of samples holds of packs: which pack stands at
    a position of a global batch is the same on any number of ranks and workers, and so is what follows after resuming.

    A stream looks ahead at `lookahead` samples that wait. A pack takes the one that has waited longest, and then again
    and again the largest that still fits, until none does; the place of each that it takes is filled at once. So what
    is left of a budget is less than the smallest waiting sample, and no sample waits for more than `lookahead` packs.
    Of 40 960 tokens, 99.7 % are filled at 0.06M pixels, 99.0 % at 0.25M and 99.7 % with both and 1M alike (captions of
    40 tokens); 1M alone leaves room that no sample fits: 91 %, or 98 % where `max_tokens` is 9 times a sample's 4230.

    Args:
        tokens: of a sample, as many as it takes in a pack; it gets them as "tokens".
        max_tokens: of a pack. Samples of more are skipped and counted.
        lookahead: decoded samples that each stream holds.
        batch_size: packs in a global batch.
        others: as `GlobalBatches` has them; `collate` gets a list of packs.
    """

    def __init__(
        self, *arguments: Any, tokens: Callable[[dict], int], max_tokens: int, lookahead: int = 64, **others: Any
    ):
        super().__init__(*arguments, **others)
        self.tokens, self.max_tokens, self.lookahead = tokens, max_tokens, lookahead

    @staticmethod
    def place(saved: Sequence[Any] = ()) -> PackPlace:
        if not saved:
            return PackPlace()
        packs, oldest, read, waiting = saved
        return PackPlace(int(packs), Place(*map(int, oldest)), int(read), tuple(map(int, waiting)))

    def decoded(self, raw: dict, pass_number: int) -> dict | None:
        if (sample := super().decoded(raw, pass_number)) is None:
            return None
        sample["tokens"] = self.tokens(sample)
        if sample["tokens"] > self.max_tokens:
            self._count(Reason.TOO_MANY_TOKENS, raw["__url__"], raw["__key__"])
            return None
        return sample

    def _stream(self, stream: int) -> Iterator[tuple[list[dict], PackPlace]]:
        start: PackPlace = self.places[stream]
        waited = set(start.waiting)
        samples = self._waiting(stream, start.oldest, lambda number: number >= start.read or number in waited)
        waiting = [next(samples) for _ in range(self.lookahead)]
        for packs in count(start.packs + 1):
            pack, left, chosen = [], self.max_tokens, waiting[0]
            while chosen is not None:
                pack.append(chosen.sample)
                left -= chosen.tokens
                waiting.remove(chosen)
                waiting.append(next(samples))
                fitting = (it for it in waiting if it.tokens <= left)
                chosen = max(fitting, key=lambda it: (it.tokens, -it.number), default=None)
            first, before, *_ = waiting[0]
            numbers = tuple(it.number - first for it in waiting)
            yield pack, PackPlace(packs, before, numbers[-1] + 1, numbers)

    def _waiting(self, stream: int, place: Place, wanted: Callable[[int], bool]) -> Iterator[Waiting]:
        before = place
        for number, (sample, after) in enumerate(self._samples(stream, place, wanted)):
            if sample is not None:
                yield Waiting(number, before, sample["tokens"], sample)
            before = after
