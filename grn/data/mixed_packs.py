"""Packs of captioned images and clips from several data sets, by weight."""

from collections.abc import Mapping

from grn.data.datamodule import repeated_batches
from grn.data.mixed import MixedDataModule
from grn.data.stream.endless import ResumableLoader
from grn.data.stream.packing import Mixture, PackedBatches
from grn.data.text_images import PackedDataModule
from grn.runtime.errors import UserError

SHARED = ("batch_size", "max_tokens", "lookahead", "rank_streams", "worker_streams", "num_workers")


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

    parts: dict[str, PackedDataModule]

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
        parts = [loader.dataset for loader in loaders]
        batches = PackedBatches(
            [url for part in parts for url in part.urls],
            parts[0].decode,  # never asked, nor are `tokens`: each part has its own
            collate=parts[0].collate,
            tokens=len,
            mixture=Mixture(parts, [self.weights[name] for name in self.drawn], self.seed),
            seed=self.seed,
            length=self._train_length(),
            repeated=repeated_batches(self.trainer),
            key=parts[0].key,
            **{name: getattr(parts[0], name) for name in SHARED},
        )
        first = loaders[0]
        return ResumableLoader(
            batches, worker_init_fn=first.worker_init_fn, pin_memory=first.pin_memory, generator=first.generator
        )
