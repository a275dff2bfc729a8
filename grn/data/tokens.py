"""Token shards: what `grn.encode` writes in place of pixels, and the datamodule that trains class refiners from them.

A sample is `key.tokens.npy`, uint8 [views, T, h, w, ceil(z*M/8)] of packed `bit` tokens (`pack_bits`), with
the label and captions of the pixel shards beside it. View 0 is the image as it is, view 1 mirrored. The manifest knows
the tokenizer: its hash, z and M. Text refiners train from those of captioned samples by `grn.data.text_tokens`.
"""

import io
import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from grn.data.datamodule import SPLITS, ShardsDataModule
from grn.data.images import ImageShardsDataModule
from grn.data.manifest import MANIFEST, token_manifest
from grn.data.samples import TOKEN_SUFFIXES, is_mirrored, needed, read_annotation
from grn.data.stream.streaming import check_foreign_urls
from grn.media.skips import Reason, Skip
from grn.method import hbq
from grn.runtime.errors import UserError


@dataclass(frozen=True)
class TokenDecoder:
    """Raw webdataset sample -> packed tokens with label, caption and key (a callable for `ShardDataset`).

    Args:
        shape: (T, h, w) that every sample must have.
        width: bytes of a position, ceil(z*M/8).
        num_labels: labels lie in [0, num_labels); None for data without labels.
        flip: take the mirrored view of every other sample, by the draw that `ImageDecoder` mirrors pixels by.
        seed: the run's seed.
    """

    shape: tuple[int, int, int]
    width: int
    num_labels: int | None = None
    flip: bool = False
    seed: int = 0

    def __call__(self, raw: Mapping[str, object], pass_number: int) -> dict:
        """-> {"bits": uint8 [T, h, w, width], "label": int (with num_labels), "caption": str or None, "key": str}.

        Raises:
            Skip: with the reason.
        """
        sample = read_annotation(raw, self.num_labels)
        mirrored = self.flip and is_mirrored(self.seed, pass_number, raw["__key__"])
        sample["bits"] = read_view(raw, mirrored=mirrored, width=self.width)
        if sample["bits"].shape[:3] != self.shape:
            raise Skip(Reason.BAD_TOKENS)
        return sample


def pack_bits(bits: Tensor) -> Tensor:
    """`bit` tokens [B, D, ...] -> uint8 [B, ..., ceil(D/8)]: a position's bits in eights, the first the highest.

    The last byte is filled with zeros.
    """
    bits = F.pad(bits.movedim(1, -1), (0, -bits.shape[1] % 8)).unflatten(-1, (-1, 8))
    return (bits << torch.arange(7, -1, -1, device=bits.device)).sum(dim=-1).to(torch.uint8)


def unpack_bits(packed: Tensor, latent_channels: int, rounds: int, labeling: hbq.Labeling) -> Tensor:
    """What `pack_bits` made of the tokens of d = `latent_channels` channels -> int64 tokens of either labeling."""
    shifts = torch.arange(7, -1, -1, device=packed.device, dtype=torch.uint8)
    bits = ((packed.unsqueeze(-1) >> shifts) & 1).flatten(-2)[..., : latent_channels * rounds].movedim(-1, 1).long()
    return hbq.bits_to_index(bits, rounds) if labeling == "ind" else bits


def read_view(raw: Mapping[str, object], *, mirrored: bool, width: int) -> Tensor:
    """uint8 [T, h, w, width]: the tokens of a raw sample as it is, or mirrored.

    Raises:
        Skip: there are none, or of another width, or not mirrored.
    """
    views = read_array(needed(raw, TOKEN_SUFFIXES, Reason.NO_TOKENS))
    if len(views) <= mirrored or views.shape[4] != width:
        raise Skip(Reason.BAD_TOKENS)
    return torch.from_numpy(views[int(mirrored)].copy())


def read_array(data: bytes) -> np.ndarray:
    """The five-dimensional uint8 array of an npy file, none of which is trusted.

    Raises:
        Skip: anything else.
    """
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    except Exception:  # what NumPy's parser of headers raises has no common base
        raise Skip(Reason.BAD_TOKENS) from None
    # Looked at before anything is made of it: a small file may claim a huge array.
    fits = (
        len(shape) == 5
        and all(type(size) is int for size in shape)
        and min(shape) >= 1
        and math.prod(shape) == len(data) - stream.tell()
    )
    if version != (1, 0) or fortran_order or dtype != np.uint8 or not fits:
        raise Skip(Reason.BAD_TOKENS)
    return np.frombuffer(data, np.uint8, offset=stream.tell()).reshape(shape)


def write_array(views: np.ndarray) -> bytes:
    """uint8 [views, T, h, w, bytes] -> an npy file."""
    data = io.BytesIO()
    np.save(data, np.ascontiguousarray(views), allow_pickle=False)
    return data.getvalue()


class Encoded(ShardsDataModule):
    """What all data modules of token shards share: their manifest, their tokenizer, their views, and the pixels that
    they were.

    Args:
        flip: mirror training samples at random; needs both views; None: where the shards have both.
        pixels: folder of the pixel shards, for scores that compare with real images; None: where they were encoded.
        shards: as `ShardsDataModule` has them; `root` must hold the manifest, also where `train` is elsewhere.

    Raises:
        UserError: `root` holds no token shards of this kind.
    """

    root: Path
    manifest: dict[str, Any]
    captioned: ClassVar[bool]  # whether these are samples of text refiners, each of a size of its own

    def __init__(self, *, flip: bool | None = None, pixels: str | None = None, **shards: Any):
        super().__init__(**shards)
        token_manifest(self.root, key=self.key)
        if ("text" in self.manifest) != self.captioned:
            kind, option = (
                ("images of one size", "tokens") if self.captioned else ("captioned samples", "captioned_tokens")
            )
            raise UserError(f"{self.key}.root={self.root} holds tokens of {kind}: choose data={option} for them")
        if not self._manifest_fits():
            raise UserError(f"{self.root / MANIFEST} is not a manifest of token shards: encode them again (grn.encode)")
        self.tokenizer: dict[str, Any] = self.manifest["tokenizer"]
        self.token_bytes = math.ceil(self.tokenizer["latent_channels"] * self.tokenizer["rounds"] / 8)  # of a position
        if flip and self.manifest["views"] < 2:
            raise UserError(f"{self.key}.flip=true, but {self.root} has no mirrored views: encode it with flip=true")
        self.flip = self.manifest["views"] == 2 if flip is None else flip
        self.pixels = pixels

    def check_tokenizer(self, sha256: str) -> None:
        """Raises:
        UserError: the shards are of another tokenizer than the one with this hash of weights.
        """
        if self.tokenizer["sha256"] != sha256:
            raise UserError(
                f"{self.key}.root={self.root} was encoded by another tokenizer ({self.tokenizer['source']}, sha256 "
                f"{self.tokenizer['sha256'][:12]}, not {sha256[:12]}): give that one as tokenizer.ckpt, or encode again"
            )

    def split_dataloader(self, split: str, *, share: bool = False) -> DataLoader:
        """The *pixels* of a split, for scores: those that were encoded; `share` as in `ShardsDataModule`.

        Raises:
            UserError: they are not there, or the manifest would have them read by a command.
        """
        source = self.manifest["source"]
        if source is None:
            raise UserError("scores compare with real images, which these token shards were not made of: scores=none")
        if self.pixels is None:
            check_foreign_urls(str(self.root / MANIFEST), {f"{self.key}.pixels": source.get(split)})
        root = self.pixels or source["root"]
        places = {"name": source["name"], "root": root}
        places |= {name: None if self.pixels else source[name] for name in SPLITS}
        places |= {name: getattr(self, name) for name in ("batch_size", "eval_batch_size", "num_workers")}
        try:
            return self._pixels(source, **places).split_dataloader(split, share=share)
        except UserError:
            raise UserError(
                f"{self.key}.pixels: scores need the images that were encoded, and {root} has not their {split} "
                "shards: give their folder, or scores=none"
            ) from None

    @abstractmethod
    def _pixels(self, source: Mapping[str, Any], **places: Any) -> ShardsDataModule:
        """The pixel shards by the manifest's `source`; `places`: arguments of `ShardsDataModule`."""

    @abstractmethod
    def _manifest_fits(self) -> bool:
        """Whether what `grn.encode` adds to a manifest is as it writes it."""
        tokenizer, source = self.manifest["tokenizer"], self.manifest.get("source")
        return (
            isinstance(tokenizer, dict)
            and all(isinstance(tokenizer.get(key), str) for key in ("sha256", "source"))
            and all(is_count(tokenizer.get(key)) for key in ("latent_channels", "rounds"))
            and self.manifest.get("views") in (1, 2)
            and (source is None or _is_source(source))
        )


class TokenShardsDataModule(Encoded):
    """Packed tokens from the shards of `grn.encode`.

    They are what the tokenizer makes of the pixel shards' images with the same labels and, sample by sample and pass by
    pass, the same flips; in the same order, too, where no sample was rejected and the keys of the loader are the same.

    Batches are {"bits": uint8 [B, T, h, w, bytes], "label": int64 [B] (where the manifest counts labels), "caption":
    list[str] (where there are any), "key": list[str]}; `unpack_bits` makes tokens of them.

    Args:
        encoded: as `Encoded` has them.
    """

    captioned = False

    def __init__(self, **encoded: Any):
        super().__init__(**encoded)
        if self.num_labels is None:
            self.num_labels = self.manifest["num_labels"]

    def decoder(self, *, training: bool) -> TokenDecoder:
        return TokenDecoder(
            shape=tuple(self.manifest["token_shape"]),
            width=self.token_bytes,
            num_labels=self.num_labels,
            flip=self.flip and training,
            seed=self.seed,
        )

    def _pixels(self, source: Mapping[str, Any], **places: Any) -> ImageShardsDataModule:
        sizes = {name: source[name] for name in ("image_size", "center_crop")}
        return ImageShardsDataModule(num_labels=self.num_labels, **sizes, **places)

    def _manifest_fits(self) -> bool:
        shape, source = self.manifest.get("token_shape"), self.manifest.get("source")
        return (
            super()._manifest_fits()
            and isinstance(shape, list)
            and len(shape) == 3
            and all(map(is_count, shape))
            and (source is None or is_count(source.get("image_size")))
            and (source is None or source.keys() == {"name", "root", *SPLITS, "image_size", "center_crop"})
        )


def _is_source(source: object) -> bool:
    """Whether it says where shards are."""
    return (
        isinstance(source, dict)
        and source.keys() >= {"name", "root", *SPLITS}
        and isinstance(source["name"], str)
        and isinstance(source["root"], (str, NoneType))
        and all(isinstance(source[split], (str, list, NoneType)) for split in SPLITS)
        and all(isinstance(url, str) for split in SPLITS for url in source[split] or ())
    )


def is_count(value: object) -> bool:
    """Whether a manifest's value is a number such as sizes are."""
    return type(value) is int and 1 <= value <= 2**16
