"""Captioned images of many shapes, packed into a budget of tokens: what text refiners train on (DESIGN 1.5)."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageOps

from grn.data.datamodule import ShardsDataModule
from grn.data.packing import PackedBatches
from grn.data.samples import (
    IMAGE_SUFFIXES,
    MAX_PIXELS,
    Reason,
    Skip,
    decode_image,
    entry,
    is_mirrored,
    read_captions,
    resize_and_crop,
    to_tensor,
)
from grn.errors import UserError, check_count, check_number
from grn.resolutions import resolutions_at

Sizes = tuple[tuple[float, tuple[int, int]], ...]  # (height/width that it stands for, (height, width) in pixels)


@dataclass(frozen=True)
class TextImageDecoder:
    """Raw webdataset sample -> one image in the size of its shape, and a caption (a callable for `ShardDataset`).

    All draws depend on (seed, pass, key) alone.

    Args:
        budgets: sizes to choose from by shape, and how often these are the choice, in proportion.
        captions, dropout: as `draw_caption` has them.
        flip: mirror every other image.
        min_size: images whose shorter side has fewer pixels are skipped.
        max_aspect: so are those longer or taller than this, by their sides' ratio; None: none.
        seed: the run's seed.
        max_pixels: larger images are skipped before they are decompressed.
    """

    budgets: tuple[tuple[float, Sizes], ...]
    captions: tuple[tuple[str, float], ...]
    dropout: float = 0.0
    flip: bool = False
    min_size: int = 1
    max_aspect: float | None = None
    seed: int = 0
    max_pixels: int = MAX_PIXELS

    def __call__(self, raw: Mapping[str, object], pass_number: int) -> dict:
        """-> {"pixels": uint8 [3, 1, H, W], "caption": str, "key": str}.

        Raises:
            Skip: with the reason.
        """
        caption, sizes = self.draw(raw, pass_number)
        image = decode_image(entry(raw, IMAGE_SUFFIXES, missing=Reason.NO_IMAGE), max_pixels=self.max_pixels)
        height, width = self.size_of(image, sizes)
        image = resize_and_crop(image, height, width, max_pixels=self.max_pixels)
        if self.flip and is_mirrored(self.seed, pass_number, raw["__key__"]):
            image = ImageOps.mirror(image)
        return {"pixels": to_tensor(image), "caption": caption, "key": raw["__key__"]}

    def draw(self, raw: Mapping[str, object], pass_number: int) -> tuple[str, Sizes]:
        """The caption of a sample in a pass over the data, and the sizes to choose from by its shape."""
        draws = caption_draws(self.seed, pass_number, raw["__key__"])
        _, caption = draw_caption(raw, self.captions, self.dropout, draws)
        sizes = draws.choices([sizes for _, sizes in self.budgets], [weight for weight, _ in self.budgets])[0]
        return caption, sizes

    def size_of(self, image: Image.Image, sizes: Sizes) -> tuple[int, int]:
        """The (height, width) nearest to an image's shape.

        Raises:
            Skip: too small, or too narrow.
        """
        if min(image.size) < self.min_size:
            raise Skip(Reason.TOO_SMALL)
        if self.max_aspect is not None and max(image.size) > self.max_aspect * min(image.size):
            raise Skip(Reason.TOO_NARROW)
        shape = image.height / image.width
        return min(sizes, key=lambda size: abs(size[0] - shape))[1]


def caption_draws(seed: int, pass_number: int, key: object) -> random.Random:
    """What a sample's caption is drawn by in a pass over the data, and what else the text refiner's data draw."""
    return random.Random(f"caption/{seed}/{pass_number}/{key}")


def draw_caption(
    raw: Mapping[str, object], captions: Sequence[tuple[str, float]], dropout: float, draws: random.Random
) -> tuple[str, str]:
    """(name, caption) of one of a sample's captions; the caption is empty where it is dropped.

    Args:
        captions: names of captions (`read_captions`), and how often each is drawn, in proportion, of those there are.
        dropout: share of captions that are replaced by the empty one.

    Raises:
        Skip: the sample has none of them.
    """
    weights = dict(captions)
    found = read_captions(raw, list(weights))
    name = draws.choices(list(found), [weights[name] for name in found])[0]
    return name, "" if draws.random() < dropout else found[name]


@dataclass(frozen=True)
class PackedTokens:
    """What a sample takes of a pack: its visual tokens, the time token, and its text (a callable for `PackedBatches`).

    Args:
        stride, temporal_stride: of the tokenizer.
        tokenize: captions -> tokens of each, the text encoder's.
    """

    stride: int
    temporal_stride: int
    tokenize: Callable[[Sequence[str]], Sequence[Sequence[int]]]

    def __call__(self, sample: Mapping[str, Any]) -> int:
        if (features := sample.get("features")) is not None:
            text = len(features)
        else:
            text = len(self.tokenize([sample["caption"]])[0])
        return math.prod(self.shape(sample)) + 1 + text

    def shape(self, sample: Mapping[str, Any]) -> tuple[int, int, int]:
        """(T', h, w) of the tokens of a sample's `bits` [T', h, w, bytes] or `pixels` [3, T, H, W]."""
        if "bits" in sample:
            return tuple(sample["bits"].shape[:3])
        _, frames, height, width = sample["pixels"].shape
        return 1 + (frames - 1) // self.temporal_stride, height // self.stride, width // self.stride


def collate_lists(samples: list[dict]) -> dict:
    """Samples of any sizes -> {"pixels": list of uint8 [3, T, H, W], "caption": list[str], "key": list[str]}.

    Of token shards {"bits": list of uint8 [T', h, w, bytes]} in place of pixels and, where they have some, {"features":
    list of [tokens, text width], None for the empty caption}.
    """
    kinds = ("pixels", "bits", "features", "caption", "key")
    return {kind: [sample[kind] for sample in samples] for kind in kinds if kind in samples[0]}


class PackedDataModule(ShardsDataModule):
    """Captioned samples of many sizes, packed without padding; a subclass says what they are.

    Training batches are what `Packs` makes, those of evaluation what `collate_lists` does. Training needs `packed_by`.
    Captions that are empty, not there, or not of text are counted; of endless ones the text encoder takes what it can.

    Args:
        max_tokens, lookahead: of a pack (`PackedBatches`); `batch_size` counts packs, over all ranks.
        captions, caption_dropout: as `draw_caption` has them.
        shards: as `ShardsDataModule` has them.
    """

    contents = "pixels"  # what samples have; packs hold one kind

    def __init__(
        self,
        *,
        max_tokens: int,
        lookahead: int = 64,
        captions: Mapping[str, float] = {"txt": 1.0},
        caption_dropout: float = 0.1,
        **shards: Any,
    ):
        super().__init__(**shards)
        check_count(f"{self.key}.max_tokens", max_tokens)
        check_count(f"{self.key}.lookahead", lookahead)
        check_number(f"{self.key}.caption_dropout", caption_dropout, least=0, most=1)
        self.captions = _weights(captions, f"{self.key}.captions")
        self.max_tokens, self.lookahead, self.caption_dropout = max_tokens, lookahead, caption_dropout
        self._tokens: PackedTokens | None = None

    def packed_by(self, tokens: PackedTokens) -> None:
        """Says how many tokens samples have; to be called before training."""
        self._tokens = tokens

    collate = staticmethod(collate_lists)

    def _global_batches(self) -> PackedBatches:
        return PackedBatches(
            self.urls("train"),
            self.decoder(training=True),
            collate=Packs(self.max_tokens),
            tokens=self._tokens or _unknown,
            max_tokens=self.max_tokens,
            lookahead=self.lookahead,
            **self._order_arguments(),
        )

    def _train_length(self) -> int | None:
        if self.trainer is not None and not (self.trainer.max_steps and self.trainer.max_steps > 0):
            raise UserError("trainer.max_steps must be given: how many packs make an epoch is not known")
        return super()._train_length()


class TextImageDataModule(PackedDataModule):
    """Captioned images from webdataset shards (`key.{jpg,png,webp}`, `key.txt`, `key.json`), each in the size of
    `pixels` that is nearest to its shape, packed without padding.

    Args:
        pixels: a budget of `grn.resolutions`, or budget -> how often it is drawn: several resolutions in one run.
        resolutions: [[height, width], ...] in pixels, in place of the 15 templates at `pixels`.
        flip, min_size, max_aspect: as `TextImageDecoder` has them.
        packs: as `PackedDataModule` has them.
    """

    def __init__(
        self,
        *,
        pixels: str | Mapping[str, float] | None = None,
        resolutions: Sequence[Sequence[int]] | None = None,
        flip: bool = False,
        min_size: int = 1,
        max_aspect: float | None = None,
        **packs: Any,
    ):
        super().__init__(**packs)
        check_count(f"{self.key}.min_size", min_size)
        if max_aspect is not None:
            check_number(f"{self.key}.max_aspect", max_aspect, least=1)  # the square's
        self.budgets = self._budgets(pixels, resolutions)
        self.pixels = None if pixels is None else {pixels: 1.0} if isinstance(pixels, str) else dict(pixels)
        self.resolutions = None if resolutions is None else [list(size) for size in resolutions]
        self.flip, self.min_size, self.max_aspect = flip, min_size, max_aspect

    def packed_by(self, tokens: PackedTokens) -> None:
        """Says how many tokens samples have; to be called before training.

        Raises:
            UserError: sizes that are no multiples of the tokenizer's stride, or too large for a pack.
        """
        for _, sizes in self.budgets:
            for _, (height, width) in sizes:
                if height % tokens.stride or width % tokens.stride:
                    raise UserError(
                        f"{self.key}.resolutions: {height}x{width} pixels are no multiples of the tokenizer's stride "
                        f"{tokens.stride}"
                    )
                if (count := height * width // tokens.stride**2 + 2) > self.max_tokens:
                    raise UserError(
                        f"{self.key}.max_tokens={self.max_tokens} holds no image of {height}x{width} pixels, "
                        f"{count} tokens at least: give more, or fewer pixels"
                    )
        super().packed_by(tokens)

    def decoder(self, *, training: bool) -> TextImageDecoder:
        return TextImageDecoder(
            budgets=self.budgets,
            captions=self.captions,
            dropout=self.caption_dropout if training else 0.0,
            flip=self.flip and training,
            min_size=self.min_size,
            max_aspect=self.max_aspect,
            seed=self.seed,
        )

    def _budgets(
        self, pixels: str | Mapping[str, float] | None, resolutions: Sequence[Sequence[int]] | None
    ) -> tuple[tuple[float, Sizes], ...]:
        if (pixels is None) == (resolutions is None):
            raise UserError(f"give one of {self.key}.pixels={pixels} and {self.key}.resolutions={resolutions}")
        if resolutions is None:
            drawn = _weights({pixels: 1.0} if isinstance(pixels, str) else pixels, f"{self.key}.pixels")
            key = f"{self.key}.pixels"
            return tuple((weight, tuple(resolutions_at(budget, key=key).items())) for budget, weight in drawn)
        pairs = isinstance(resolutions, Sequence) and all(isinstance(size, Sequence) for size in resolutions)
        sizes = [tuple(size) for size in resolutions] if pairs else []
        if not sizes or any([type(side) for side in size] != [int, int] or min(size) < 1 for size in sizes):
            raise UserError(f"{self.key}.resolutions={resolutions} must be pairs [height, width] in pixels")
        return ((1.0, tuple((height / width, (height, width)) for height, width in sizes)),)


@dataclass(frozen=True)
class Packs:
    """The collation of packs (a callable): all their samples, pack after pack.

    Returns:
        As `collate_lists`, and {"packs": list[int], samples of each pack; "tokens": int, in all; "max_tokens": int,
        how many all these packs could hold}.
    """

    max_tokens: int

    def __call__(self, packs: list[list[dict]]) -> dict:
        batch = collate_lists([sample for pack in packs for sample in pack])
        tokens = sum(sample["tokens"] for pack in packs for sample in pack)
        sizes = [len(pack) for pack in packs]
        return batch | {"packs": sizes, "tokens": tokens, "max_tokens": len(packs) * self.max_tokens}


def _unknown(sample: dict) -> int:
    raise UserError("packs are for text refiners: choose model=text_refiner_tiny training=text_refiner, or other data")


def _weights(weights: Mapping[str, float], key: str) -> tuple[tuple[str, float], ...]:
    if not isinstance(weights, Mapping) or not all(isinstance(name, str) for name in weights):
        raise UserError(f"{key}={weights} must say of each name how often it is drawn, {key}={{NAME:1,OTHER:2}}")
    weights = dict(weights)
    for name, weight in weights.items():
        if type(weight) not in (int, float) or not math.isfinite(weight):
            raise UserError(f"{key}.{name}={weight} must be a number: how often it is drawn, in proportion")
    if min(weights.values(), default=0) < 0 or not any(weights.values()):
        raise UserError(f"{key}={weights} must not be negative, and one of them positive")
    return tuple((name, float(weight)) for name, weight in weights.items() if weight)
