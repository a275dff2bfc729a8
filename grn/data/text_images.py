"""Packs of captioned images of many shapes: data of text refiners (docs/method.md#training-on-packed-sequences)."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image, ImageOps

from grn.data.captions import Captions, caption_draws
from grn.data.datamodule import ShardsDataModule
from grn.data.manifest import how_to_make
from grn.data.samples import is_mirrored, needed
from grn.data.stream.packing import PackedBatches
from grn.media.images import IMAGE_SUFFIXES, MAX_PIXELS, decode_image, resize_and_crop, to_tensor
from grn.media.skips import Reason, Skip
from grn.method.resolutions import resolutions_at
from grn.networks.text_encoder import Tokenization
from grn.runtime.errors import UserError, check_count, check_number

Sizes = tuple[tuple[float, tuple[int, int]], ...]  # (height/width that it stands for, (height, width) in pixels)


@dataclass(frozen=True)
class TextImageDecoder:
    """Raw webdataset sample -> one image in the size of its shape, and a caption (a callable for `ShardDataset`).

    All draws depend on (seed, pass, key) alone.

    Args:
        budgets: sizes to choose from by shape, and how often these are the choice, in proportion.
        captions: which are drawn, and how.
        source_share: of a size's pixels that a source must have at the least for the size to be drawn, the smallest
            excepted; None: any.
        flip: mirror every other image.
        min_size: images whose shorter side has fewer pixels are skipped.
        max_aspect: so are those longer or taller than this, by their sides' ratio; None: none.
        seed: the run's seed.
        max_pixels: larger images are skipped before they are decompressed.
    """

    budgets: tuple[tuple[float, Sizes], ...]
    captions: Captions
    flip: bool = False
    min_size: int = 1
    max_aspect: float | None = None
    source_share: float | None = None
    seed: int = 0
    max_pixels: int = MAX_PIXELS

    def __call__(self, raw: Mapping[str, object], pass_number: int) -> dict:
        """-> {"pixels": uint8 [3, 1, H, W], "caption": str, "key": str}.

        Raises:
            Skip: with the reason.
        """
        caption, draws = self.draw(raw, pass_number)
        image = decode_image(needed(raw, IMAGE_SUFFIXES, Reason.NO_IMAGE), max_pixels=self.max_pixels)
        height, width = self.size_of(image, draws)
        image = resize_and_crop(image, height, width, max_pixels=self.max_pixels)
        if self.flip and is_mirrored(self.seed, pass_number, raw["__key__"]):
            image = ImageOps.mirror(image)
        return {"pixels": to_tensor(image), "caption": caption, "key": raw["__key__"]}

    def draw(self, raw: Mapping[str, object], pass_number: int) -> tuple[str, random.Random]:
        """The caption of a sample in a pass over the data, and what its size is drawn by."""
        draws = caption_draws(self.seed, pass_number, raw["__key__"])
        return self.captions.draw(raw, draws)[1], draws

    def size_of(self, image: Image.Image, draws: random.Random) -> tuple[int, int]:
        """The (height, width) nearest to an image's shape, of one of the budgets.

        Raises:
            Skip: too small, or too narrow.
        """
        if min(image.size) < self.min_size:
            raise Skip(Reason.TOO_SMALL)
        if self.max_aspect is not None and max(image.size) > self.max_aspect * min(image.size):
            raise Skip(Reason.TOO_NARROW)
        shape = image.height / image.width
        fitting = [(min(sizes, key=lambda size: abs(size[0] - shape))[1], weight) for weight, sizes in self.budgets]
        if self.source_share is not None:
            least = min(fitting, key=lambda it: math.prod(it[0]))
            most = image.height * image.width / self.source_share
            fitting = [it for it in fitting if math.prod(it[0]) < most] or [least]
        return draws.choices([size for size, _ in fitting], [weight for _, weight in fitting])[0]


@dataclass(frozen=True)
class PackedTokens:
    """What a sample takes of a pack: its visual tokens, the time token, and its text (a callable for `PackedBatches`).

    Args:
        stride, temporal_stride: of the tokenizer.
        tokenize: captions -> tokens of each, the text encoder's `tokenization`.
    """

    stride: int
    temporal_stride: int
    tokenize: Tokenization | Callable[[Sequence[str]], Sequence[Sequence[int]]]

    def __call__(self, sample: Mapping[str, Any]) -> int:
        if (features := sample.get("features")) is not None:
            text = len(features)
        else:
            text = len(self.tokenize([sample["caption"]])[0])
        return math.prod(self.shape(sample)) + 1 + text

    def is_cut(self, sample: Mapping[str, Any]) -> bool:
        """Whether a caption has more tokens than the text encoder takes; of encoded ones, `grn.encode` has told it."""
        if sample.get("features") is not None or not isinstance(self.tokenize, Tokenization):
            return False
        return self.tokenize.is_cut(sample["caption"])

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
        max_tokens, lookahead, max_share: of a pack (`PackedBatches`); `batch_size` counts packs, over all ranks.
        captions: the `weights` of `Captions`; caption_dropout, sentence_dropout, caption_prefix, caption_suffix: as
            it has them; captions are dropped and shortened in training alone.
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
        sentence_dropout: float = 0.0,
        caption_prefix: str = "",
        caption_suffix: str = "",
        max_share: float = 1.0,
        **shards: Any,
    ):
        super().__init__(**shards)
        check_count(f"{self.key}.max_tokens", max_tokens)
        check_count(f"{self.key}.lookahead", lookahead)
        check_number(f"{self.key}.caption_dropout", caption_dropout, least=0, most=1)
        check_number(f"{self.key}.sentence_dropout", sentence_dropout, least=0, most=1)
        check_number(f"{self.key}.max_share", max_share, least=0, most=1)
        for name, text in (("caption_prefix", caption_prefix), ("caption_suffix", caption_suffix)):
            if not isinstance(text, str):
                raise UserError(f"{self.key}.{name}={text} must be a text; '' is none")
        weights = _weights(captions, f"{self.key}.captions")
        self.captions = Captions(weights, caption_dropout, sentence_dropout, caption_prefix, caption_suffix)
        self.max_tokens, self.lookahead, self.max_share = max_tokens, lookahead, max_share
        self._tokens: PackedTokens | None = None

    def packed_by(self, tokens: PackedTokens) -> None:
        """Says how many tokens samples have; to be called before training.

        Raises:
            UserError: as of `check_packing`.
        """
        self.check_packing(tokens)
        self._tokens = tokens

    def check_packing(self, tokens: PackedTokens) -> None:
        """Raises:
        UserError: samples that do not fit the tokenizer, or are too large for a pack.
        """

    collate = staticmethod(collate_lists)

    def drawn_captions(self, *, training: bool) -> Captions:
        return self.captions if training else replace(self.captions, dropout=0.0, sentence_dropout=0.0)

    def _global_batches(self) -> PackedBatches:
        return PackedBatches(
            self.urls("train"),
            self.decoder(training=True),
            collate=Packs(self.max_tokens),
            tokens=self._tokens or _unknown,
            max_tokens=self.max_tokens,
            max_share=self.max_share,
            lookahead=self.lookahead,
            **self._order_arguments(),
        )

    def _train_length(self) -> int | None:
        if self.trainer is not None and not (self.trainer.max_steps and self.trainer.max_steps > 0):
            raise UserError("trainer.max_steps must be given: the number of packs in an epoch is unknown")
        return super()._train_length()


class TextImageDataModule(PackedDataModule):
    """Captioned images from webdataset shards (`key.jpg` or another of `IMAGE_SUFFIXES`, `key.txt`, `key.json`), each
    in the size of `pixels` that is nearest to its shape, packed without padding.

    Args:
        pixels: a budget of `grn.method.resolutions`, or budget -> how often it is drawn: several in one run.
        resolutions: [[height, width], ...] in pixels, in place of the 15 templates at `pixels`.
        flip, min_size, max_aspect, source_share: as `TextImageDecoder` has them.
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
        source_share: float | None = None,
        **packs: Any,
    ):
        super().__init__(**packs)
        check_count(f"{self.key}.min_size", min_size)
        if max_aspect is not None:
            check_number(f"{self.key}.max_aspect", max_aspect, least=1)  # the square's
        if source_share is not None:
            check_number(f"{self.key}.source_share", source_share, least=0.01, most=100)
        self.budgets = self._budgets(pixels, resolutions)
        self.pixels = None if pixels is None else {pixels: 1.0} if isinstance(pixels, str) else dict(pixels)
        self.resolutions = None if resolutions is None else [list(size) for size in resolutions]
        self.flip, self.min_size, self.max_aspect, self.source_share = flip, min_size, max_aspect, source_share

    def check_packing(self, tokens: PackedTokens) -> None:
        """Raises:
        UserError: sizes that are not multiples of the tokenizer's stride, or too large for a pack.
        """
        for _, sizes in self.budgets:
            for _, (height, width) in sizes:
                if height % tokens.stride or width % tokens.stride:
                    raise UserError(
                        f"{self.key}.resolutions: {height}x{width} pixels are not multiples of the tokenizer's stride "
                        f"{tokens.stride}"
                    )
                if (count := height * width // tokens.stride**2 + 2) > self.max_tokens:
                    raise UserError(
                        f"{self.key}.max_tokens={self.max_tokens} holds no image of {height}x{width} pixels, "
                        f"{count} tokens at least: give more, or fewer pixels"
                    )

    def decoder(self, *, training: bool) -> TextImageDecoder:
        return TextImageDecoder(
            budgets=self.budgets,
            captions=self.drawn_captions(training=training),
            flip=self.flip and training,
            min_size=self.min_size,
            max_aspect=self.max_aspect,
            source_share=self.source_share,
            seed=self.seed,
        )

    def _budgets(
        self, pixels: str | Mapping[str, float] | None, resolutions: Sequence[Sequence[int]] | None
    ) -> tuple[tuple[float, Sizes], ...]:
        if pixels is not None and resolutions is None:
            key = f"{self.key}.pixels"
            drawn = _weights({pixels: 1.0} if isinstance(pixels, str) else pixels, key)
            return tuple((weight, tuple(resolutions_at(budget, key=key).items())) for budget, weight in drawn)
        if pixels is not None or resolutions is None:
            raise UserError(f"give one of {self.key}.pixels={pixels} and {self.key}.resolutions={resolutions}")
        pairs = isinstance(resolutions, Sequence) and all(isinstance(size, Sequence) for size in resolutions)
        if pairs and any(side is None for size in resolutions for side in size):
            raise UserError(
                f"{self.key}.root={self.root} has no manifest that tells the size of its images: "
                f"{how_to_make(self.name, f'{self.key}.root')}; or give {self.key}.resolutions=[[height,width]]"
            )
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
