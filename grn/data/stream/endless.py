"""The order of training: endless global batches, the same for any number of ranks and workers, exactly resumable.

The training shards are dealt to a fixed number of *streams*, each with a shuffle of its own. Which stream gives the
sample at a position of a global batch depends on these numbers alone; ranks and workers only share the streams out.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count, islice
from typing import Any, NamedTuple

import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader

from grn.data.stream.streaming import LoadingStopped, ShardDataset, worker_and_workers
from grn.data.stream.survey import why_none
from grn.runtime.errors import UserError
from grn.runtime.ranks import rank_and_world_size

FRUITLESS_SHARDS = 16  # and no less than a pass: what a stream reads without a usable sample before it gives up


class Place(NamedTuple):
    """Just after some sample of a stream. Places are ordered as the stream is."""

    pass_number: int = 0
    shard: int = 0  # of the stream's shards in this pass: where the block that is being given begins,
    sample: int = 0  # and with which of the shard's raw samples
    given: int = 0  # of the block: raw samples that are done


class GlobalBatches(ShardDataset):
    """This rank's and this worker's part of the global batches of training, decoded and collated.

    There are `rank_streams` times `worker_streams` streams in as many columns and rows. The row takes turns from one
    global batch to the next, and within a row's samples the column does. So a rank reads whole columns, where the ranks
    divide `rank_streams`: it has the positions rank, rank + ranks, rank + 2*ranks ... of every global batch; and a
    worker reads whole rows, where the workers divide `worker_streams`.

    A pass visits every sample of all shards once over all streams. Shards are permuted anew for each pass and dealt to
    the streams in turn, where the last pass left off, so that no stream falls behind. A stream shuffles its samples
    in blocks, and reads the next block, sample for sample, while it gives one. Its `Place` tells where the block
    begins, so that resuming reads at most one shard and two blocks, undecoded, and samples which cannot be decoded
    shift nothing.

    Args:
        urls, decode: as `ShardDataset` has them.
        collate: samples -> batch.
        batch_size: samples in a global batch, a multiple of the number of ranks.
        rank_streams, worker_streams: columns and rows of streams; multiples of the numbers of ranks and of workers.
        shuffle_buffer: undecoded samples that each stream holds: the size of a block.
        seed: of the order.
        length: batches that `len` tells; None: no length.
        repeated: give the first so many batches again and again (`ResumableLoader`); None: all.
        key: where the config has all this, for messages.
        others: as `ShardDataset` has them.

    Raises:
        UserError: numbers that do not divide, fewer shards than streams; from iterating: a stream without any usable
            sample.
    """

    def __init__(
        self,
        urls: Sequence[str],
        decode: Callable[[dict, int], dict],
        *,
        collate: Callable[[list[dict]], Any],
        batch_size: int,
        rank_streams: int = 1,
        worker_streams: int = 1,
        shuffle_buffer: int = 1000,
        seed: int = 0,
        length: int | None = None,
        repeated: int | None = None,
        key: str = "data",
        **others: Any,
    ):
        super().__init__(urls, decode, **others)
        self.collate = collate
        self.batch_size = batch_size
        self.rank_streams, self.worker_streams = rank_streams, worker_streams
        self.shuffle_buffer = max(1, shuffle_buffer)
        self.seed = seed
        self.length, self.repeated = length, repeated
        self.key = key
        self.rank, self.world_size = rank_and_world_size()
        self.given = 0  # global batches
        self.places = [self.place()] * (rank_streams * worker_streams)
        self._check()

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("batches without `length` have no len()")
        return self.length

    @staticmethod
    def place(saved: Sequence[int] = ()) -> Place:
        """A place as a state has it: a list of numbers; () is the beginning."""
        return Place(*map(int, saved))

    def __iter__(self) -> Iterator[tuple[Any, dict[int, Any]]]:
        """Batches from the `given`-th on, each with the new places of the streams that it came from."""
        worker_id, workers = worker_and_workers()
        streams: dict[int, Iterator[tuple[dict, Place]]] = {}
        for batch in count(self.given + worker_id, workers):
            turn, row = divmod(batch, self.worker_streams)
            samples, places = [], {}
            for position in range(self.rank, self.batch_size, self.world_size):
                column = (turn * self.batch_size + position) % self.rank_streams
                stream = row * self.rank_streams + column
                if stream not in streams:
                    streams[stream] = self._stream(stream)
                sample, places[stream] = next(streams[stream])
                samples.append(sample)
            yield self.collate(samples), places

    def _stream(self, stream: int) -> Iterator[tuple[Any, Any]]:
        """What a global batch takes one of from this stream, again and again, each with the place after it."""
        for sample, after in self.samples(stream, self.places[stream]):
            if sample is not None:
                yield sample, after

    def samples(
        self, stream: int, place: Place, wanted: Callable[[int], bool] = lambda number: True
    ) -> Iterator[tuple[dict | None, Place]]:
        """The samples of pass after pass of a stream from a place on, each with the place after it; None: not usable.

        Args:
            wanted: of the number of a sample, from 0 on: whether to decode it at all; None stands for those not wanted.
        """
        fruitless, numbers = 0, count()
        while True:
            usable = place > Place(place.pass_number)
            for raw, after in self._pass(stream, place):
                decode = wanted(next(numbers))
                sample = self.decoded(raw, place.pass_number) if decode else None
                usable = usable or not decode or sample is not None
                yield sample, after
            fruitless = 0 if usable else fruitless + len(self._shards(stream, place.pass_number))
            if fruitless >= FRUITLESS_SHARDS:
                raise UserError(
                    f"the last {fruitless} shards that a stream read have no usable sample {why_none(self, self.key)}"
                )
            place = Place(place.pass_number + 1)

    def _pass(self, stream: int, place: Place) -> Iterator[tuple[dict, Place]]:
        """The raw samples of one pass from a place on, in the order of training, each with the place after it."""
        samples = self._raw(self._shards(stream, place.pass_number), place.shard, place.sample)
        block, done = list(islice(samples, self.shuffle_buffer)), place.given
        while block:
            shard, sample, _ = block[0]
            random.Random(f"samples/{self.seed}/{place.pass_number}/{stream}/{shard}/{sample}").shuffle(block)
            following = []
            for given in range(1, len(block) + 1):
                _, _, raw = block.pop()
                following += islice(samples, 1)
                if given > done:
                    yield raw, Place(place.pass_number, shard, sample, given)
            block, done = following, 0

    def _shards(self, stream: int, pass_number: int) -> list[str]:
        urls = list(self.urls)
        random.Random(f"shards/{self.seed}/{pass_number}").shuffle(urls)
        return urls[(stream - pass_number * len(urls)) % len(self.places) :: len(self.places)]

    def _raw(self, urls: list[str], shard: int, sample: int) -> Iterator[tuple[int, int, dict]]:
        """(number of the shard, number of the sample in it, raw sample) from these numbers on."""
        for number in range(shard, len(urls)):
            first = sample if number == shard else 0
            for index, raw in enumerate(islice(self.shard(urls[number]), first, None), first):
                yield number, index, raw

    def _check(self) -> None:
        for name, own, streams in (
            (f"{self.world_size} ranks", self.world_size, "rank_streams"),
            (f"{self.key}.num_workers={self.num_workers}", max(1, self.num_workers), "worker_streams"),
        ):
            if getattr(self, streams) % own:
                raise UserError(
                    f"{name} cannot share {self.key}.{streams}={getattr(self, streams)}: take a number that divides "
                    f"it, or, for a new run, {self.key}.{streams}={own}"
                )
        if len(self.urls) < len(self.places):
            raise UserError(
                f"{self.key}.rank_streams={self.rank_streams} times {self.key}.worker_streams={self.worker_streams} "
                f"needs {len(self.places)} training shards, there are only {len(self.urls)}: lower these keys (to the "
                f"numbers of ranks and of workers, at least) or write more shards"
            )


class ResumableLoader(DataLoader):
    """Loads `GlobalBatches` and knows its place in the data: `state_dict()` is that just after the last batch it gave.

    The state is that of the global batches, of all ranks, and goes on with any numbers of ranks and workers. (Lightning
    saves the state of rank 0 alone.) `state_dict` is therefore collective: every rank must call it, as Lightning does.

    Where the data set says `repeated`, it reads that many batches from the beginning of the data, keeps them, and gives
    them in turn: what Lightning's `overfit_batches` means.
    """

    dataset: GlobalBatches

    def __init__(self, dataset: GlobalBatches, **arguments: Any):
        super().__init__(dataset, batch_size=None, num_workers=dataset.num_workers, **arguments)
        self._kept: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        """From the loader's place on, also where it was iterated before; `SIGTERMException` after the data's `stop`."""
        if self.dataset.repeated is not None:
            return self._again_and_again(self.dataset.repeated)
        return self._counted(self._loaded())

    def _loaded(self) -> Iterator[tuple[Any, dict[int, Any]]]:
        try:
            yield from super().__iter__()
        except LoadingStopped:
            raise SIGTERMException(self.dataset.stopped_by) from None

    def _again_and_again(self, number: int) -> Iterator[Any]:
        if not self._kept:
            given, self.dataset.given = self.dataset.given, 0
            self._kept = [batch for batch, _ in islice(self._loaded(), number)]
            self.dataset.given = given
        while True:
            batch = self._kept[self.dataset.given % number]
            self.dataset.given += 1
            yield batch

    def _counted(self, batches: Iterator[tuple[Any, dict[int, Any]]]) -> Iterator[Any]:
        for batch, places in batches:
            # Before the yield: whoever asks for the state does so while this generator rests there.
            self.dataset.given += 1
            for stream, place in places.items():
                self.dataset.places[stream] = place
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """{"batches": global batches given, "shards": number, "streams": [columns, rows], "places": one a stream}."""
        places: list[Any] = [self.dataset.places]
        if dist.is_available() and dist.is_initialized():
            places = [None] * dist.get_world_size()
            dist.all_gather_object(places, self.dataset.places)
        # Of each stream, the rank that reads it is ahead of the others.
        furthest = [_plain(max(of_ranks)) for of_ranks in zip(*places)]
        data = self.dataset
        streams = [data.rank_streams, data.worker_streams]
        return {"batches": data.given, "shards": len(data.urls), "streams": streams, "places": furthest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict()`.

        Raises:
            UserError: the state is of another number of streams or shards, whose order is another.
        """
        data = self.dataset
        saved = (state["shards"], *state["streams"])
        own = (len(data.urls), data.rank_streams, data.worker_streams)
        if saved != own:
            names = ("training shards", f"{data.key}.rank_streams", f"{data.key}.worker_streams")
            saved, own = (", ".join(f"{n} {name}" for n, name in zip(numbers, names)) for numbers in (saved, own))
            raise UserError(
                f"the checkpoint's place in the data is of {saved}; this run has {own}: resume with the same"
            )
        data.given = int(state["batches"])
        data.places = [data.place(place) for place in state["places"]]


def _plain(place: Sequence[Any]) -> list[Any]:
    """In lists and numbers alone, as checkpoints may hold them."""
    return [_plain(part) if isinstance(part, tuple) else part for part in place]
