"""Decodes untrusted samples to tensors, and collates them."""

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import ImageOps
from torch import Tensor

from grn.media.images import IMAGE_SUFFIXES, MAX_PIXELS, center_crop, decode_image, to_tensor
from grn.media.skips import Reason, Skip
from grn.runtime.errors import UserError

LABEL_SUFFIXES = ("cls",)
CAPTION_SUFFIXES = ("txt",)
TOKEN_SUFFIXES = ("tokens.npy",)  # of grn.encode, see grn.data.tokens
FEATURE_SUFFIXES = ("features.safetensors",)  # of grn.encode, see grn.data.text_features
METADATA_SUFFIXES = ("json",)  # {"label": 3, "caption": "a cat"}, in place of key.cls and key.txt


def decode_or_skip(decode: Callable[[dict, int], dict], raw: dict, number: int) -> dict:
    """`decode(raw, number)`.

    Raises:
        Skip: by the decoder, or for whatever else it raises on bytes that nobody has thought of.
    """
    try:
        return decode(raw, number)
    except (Skip, UserError, MemoryError):
        raise
    except Exception as error:
        raise Skip(Reason.UNDECODABLE_SAMPLE, f"{type(error).__name__}: {error}") from None


@dataclass(frozen=True)
class ImageDecoder:
    """Raw webdataset sample -> one image with its label, caption and key (a callable for `ShardDataset`).

    Args:
        image_size: height and width of what comes out, in pixels.
        num_labels: labels lie in [0, num_labels); None for data without labels.
        center_crop: bring images of other sizes to `image_size` by `center_crop`; else they are skipped.
        flip: mirror every other image, by a draw that depends on (seed, pass, key) alone.
        seed: the run's seed.
        max_pixels: larger images are skipped before they are decompressed.
    """

    image_size: int
    num_labels: int | None = None
    center_crop: bool = False
    flip: bool = False
    seed: int = 0
    max_pixels: int = MAX_PIXELS

    def __call__(self, raw: Mapping[str, object], pass_number: int) -> dict:
        """-> {"pixels": uint8 [3, 1, size, size], "label": int (with num_labels), "caption": str or None, "key": str}.

        Raises:
            Skip: with the reason.
        """
        sample = read_annotation(raw, self.num_labels)
        image = decode_image(needed(raw, IMAGE_SUFFIXES, Reason.NO_IMAGE), max_pixels=self.max_pixels)
        if self.center_crop:
            image = center_crop(image, self.image_size, max_pixels=self.max_pixels)
        elif image.size != (self.image_size, self.image_size):
            raise Skip(Reason.IMAGE_SIZE)
        if self.flip and is_mirrored(self.seed, pass_number, raw["__key__"]):
            image = ImageOps.mirror(image)
        sample["pixels"] = to_tensor(image)
        return sample


def key_id(key: str) -> int:
    """An int64 that a sample has on whatever rank, in whatever batch, for its draws and for an order of samples."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big", signed=True)


def is_mirrored(seed: int, pass_number: int, key: object) -> bool:
    """Whether a sample is mirrored in a pass over the data: every other one, whatever stands around it."""
    return random.Random(f"flip/{seed}/{pass_number}/{key}").random() < 0.5


def needed(raw: Mapping[str, Any], suffixes: tuple[str, ...], missing: Reason) -> bytes:
    """As `entry`; a `Skip` for the reason `missing` where the sample has none."""
    if (data := entry(raw, suffixes)) is None:
        raise Skip(missing)
    return data


def entry(raw: Mapping[str, Any], suffixes: tuple[str, ...]) -> bytes | None:
    """The bytes of the first of `suffixes` that the sample has; None: it has none.

    Raises:
        Skip: the entry could not be read; the reason stands in its place.
    """
    for suffix in suffixes:
        if (value := raw.get(suffix)) is not None:
            if isinstance(value, Reason):
                raise Skip(value)
            return value
    return None


def read_annotation(raw: Mapping[str, object], num_labels: int | None) -> dict:
    """What a sample has beside its pixels: {"key": str, "caption": str or None, "label": int (with `num_labels`)}."""
    metadata = read_metadata(raw)
    annotation = {"key": raw["__key__"], "caption": read_caption(raw, metadata)}
    if num_labels is not None:
        annotation["label"] = read_label(raw, metadata, num_labels)
    return annotation


def read_metadata(raw: Mapping[str, object]) -> dict:
    """The object in `key.json`; {} where there is none."""
    if (data := entry(raw, METADATA_SUFFIXES)) is None:
        return {}
    try:
        metadata = json.loads(data)
    except (ValueError, RecursionError):
        raise Skip(Reason.BAD_METADATA) from None
    if not isinstance(metadata, dict):
        raise Skip(Reason.BAD_METADATA)
    return metadata


def read_label(raw: Mapping[str, object], metadata: Mapping[str, object], num_labels: int) -> int:
    """The label of `key.cls` (decimal digits) or of "label" in `key.json`, in [0, num_labels)."""
    data = entry(raw, LABEL_SUFFIXES)
    if data is not None:
        if not re.fullmatch(rb"\s*[+-]?[0-9]{1,18}\s*", data):
            raise Skip(Reason.BAD_LABEL)
        label = int(data)
    elif "label" in metadata:
        label = metadata["label"]
        if type(label) is not int:
            raise Skip(Reason.BAD_LABEL)
    else:
        raise Skip(Reason.NO_LABEL)
    if not 0 <= label < num_labels:
        raise Skip(Reason.LABEL_OUT_OF_RANGE)
    return label


def read_caption(raw: Mapping[str, object], metadata: Mapping[str, object]) -> str | None:
    """The text of `key.txt` or of "caption" in `key.json`, stripped; None where there is neither."""
    data = entry(raw, CAPTION_SUFFIXES)
    if data is not None:
        try:
            return _plain(data.decode("utf-8"))
        except UnicodeDecodeError:
            raise Skip(Reason.BAD_CAPTION) from None
    if (caption := metadata.get("caption")) is None:
        return None
    if not isinstance(caption, str):
        raise Skip(Reason.BAD_CAPTION)
    try:
        return _plain(caption.encode("utf-8").decode("utf-8"))  # JSON's "\\ud800" is no text
    except UnicodeEncodeError:
        raise Skip(Reason.BAD_CAPTION) from None


def _plain(text: str) -> str:
    """Stripped, and without the mark of byte order that some editors begin a file with."""
    return text.removeprefix("\ufeff").strip()


def read_captions(raw: Mapping[str, object], names: Sequence[str]) -> dict[str, str]:
    """The captions that a sample has of these, stripped.

    `txt` is the text of `key.txt` or, without that file, "caption" of `key.json`; others are keys of `key.json`.

    Raises:
        Skip: there is none that can be used: none but empty ones, or not of text.
    """
    captions, reason = {}, Reason.NO_CAPTION
    for name in names:
        try:
            if name in CAPTION_SUFFIXES:
                caption = read_caption(raw, read_metadata(raw) if raw.get(name) is None else {})
            else:
                caption = read_caption({}, {"caption": read_metadata(raw).get(name)})
        except Skip as skip:
            reason = skip.reason
            continue
        if caption:
            captions[name] = caption
    if not captions:
        raise Skip(reason)
    return captions


def by_shape(tensors: Sequence[Tensor]) -> Iterable[list[int]]:
    """The places of the tensors of each shape."""
    groups: dict[torch.Size, list[int]] = {}
    for place, tensor in enumerate(tensors):
        groups.setdefault(tensor.shape, []).append(place)
    return groups.values()


def collate(samples: list[dict]) -> dict:
    """Samples -> batch.

    Returns:
        {"pixels": uint8 [B, 3, T, H, W] or "bits": uint8 [B, T, h, w, bytes], "key": list[str], "label": int64 [B]
        where samples have labels, "caption": list[str] where any sample has one ("" for those without)}.
    """
    batch: dict[str, Any] = {}
    batch |= {kind: torch.stack([s[kind] for s in samples]) for kind in ("pixels", "bits") if kind in samples[0]}
    batch["key"] = [sample["key"] for sample in samples]
    if "label" in samples[0]:
        batch["label"] = torch.tensor([sample["label"] for sample in samples], dtype=torch.int64)
    if any(sample["caption"] is not None for sample in samples):
        batch["caption"] = [sample["caption"] or "" for sample in samples]
    return batch
