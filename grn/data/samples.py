"""From the raw bytes of one sample to tensors: pure functions that trust nothing, and the collation of samples."""

import hashlib
import io
import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp")
VIDEO_SUFFIXES = ("mp4", "webm", "mkv", "mov")
LABEL_SUFFIXES = ("cls",)
CAPTION_SUFFIXES = ("txt",)
TOKEN_SUFFIXES = ("tokens.npy",)  # of grn.encode, see grn.data.tokens
FEATURE_SUFFIXES = ("features.safetensors",)  # of grn.encode, see grn.data.text_features
METADATA_SUFFIXES = ("json",)  # {"label": 3, "caption": "a cat"}, in place of key.cls and key.txt
MAX_PIXELS = 64 * 2**20


class Reason(Enum):
    """Why a sample, or the rest of a shard, was skipped; the value is what people read."""

    BROKEN_SHARD = "shard broken or truncated"
    OVERSIZE_ENTRY = "entry too large"
    DUPLICATE_ENTRY = "entry twice in a shard"
    UNREADABLE_FILE = "file cannot be read"
    NO_IMAGE = "no image"
    UNDECODABLE_IMAGE = "image cannot be decoded"
    TOO_MANY_PIXELS = "too many pixels"
    IMAGE_SIZE = "image of another size"
    TOO_SMALL = "image too small"
    TOO_NARROW = "image too long or too tall"
    TOO_MANY_TOKENS = "more tokens than a pack has"
    NO_VIDEO = "no video"
    NO_PATH = "no video_path"
    OUTSIDE_FOLDER = "video_path leads out of the folder"
    UNDECODABLE_VIDEO = "video cannot be decoded"
    CUT_SHORT = "video ends before its index does"
    UNCUTTABLE_VIDEO = "no part can be cut out of the video"
    BAD_SECTION = "begin_frame_id, end_frame_id and fps tell no part of the video"
    CLIP_TOO_SHORT = "video shorter than the clip"
    TOO_MANY_FRAMES = "too many frames to decode for a clip"
    BAD_METADATA = "metadata is not a JSON object"
    NO_LABEL = "no label"
    BAD_LABEL = "label is not an integer"
    LABEL_OUT_OF_RANGE = "label out of range"
    BAD_CAPTION = "caption is not UTF-8 text"
    NO_CAPTION = "no caption"
    NO_TOKENS = "no tokens"
    BAD_TOKENS = "tokens of another shape"
    NO_FEATURES = "no features of the caption"
    BAD_FEATURES = "features of another shape or type"


class Skip(Exception):
    """The sample at hand is unusable."""

    def __init__(self, reason: Reason):
        super().__init__(reason.value)
        self.reason = reason


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
        image = decode_image(entry(raw, IMAGE_SUFFIXES, missing=Reason.NO_IMAGE), max_pixels=self.max_pixels)
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


def entry(raw: Mapping[str, object], suffixes: tuple[str, ...], *, missing: Reason | None) -> bytes | None:
    """The bytes of the first of `suffixes` that the sample has.

    Raises:
        Skip: the entry could not be read (the reason stands in its place), or there is none and `missing` says so.
    """
    for suffix in suffixes:
        if (value := raw.get(suffix)) is not None:
            if isinstance(value, Reason):
                raise Skip(value)
            return value
    if missing is not None:
        raise Skip(missing)
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
    if (data := entry(raw, METADATA_SUFFIXES, missing=None)) is None:
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
    data = entry(raw, LABEL_SUFFIXES, missing=None)
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
    data = entry(raw, CAPTION_SUFFIXES, missing=None)
    if data is not None:
        try:
            return _plain(data.decode("utf-8"))
        except UnicodeDecodeError:
            raise Skip(Reason.BAD_CAPTION) from None
    caption = metadata.get("caption")
    if caption is not None and not isinstance(caption, str):
        raise Skip(Reason.BAD_CAPTION)
    return None if caption is None else _plain(caption)


def _plain(text: str) -> str:
    """Stripped, and without the mark of byte order that some editors begin a file with."""
    return text.removeprefix("\ufeff").strip()


def read_captions(raw: Mapping[str, object], names: Sequence[str]) -> dict[str, str]:
    """The captions that a sample has of these, stripped: `txt` is the text of `key.txt`, others are keys of `key.json`.

    Raises:
        Skip: there is none that can be used: none but empty ones, or not of text.
    """
    captions, reason = {}, Reason.NO_CAPTION
    for name in names:
        try:
            if name in CAPTION_SUFFIXES:
                caption = read_caption({name: raw.get(name)}, {})
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


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """PNG, JPEG or WebP -> RGB, upright.

    Turned as EXIF says; 16-bit grey is scaled to 8 bits; transparent parts show white; of an animation the first frame.

    Raises:
        Skip: not such an image, or broken, or more than `max_pixels` by its header.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
        if image.width * image.height > max_pixels:
            raise Skip(Reason.TOO_MANY_PIXELS)
        image.load()
        return to_rgb(ImageOps.exif_transpose(image))
    except (Skip, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise Skip(Reason.TOO_MANY_PIXELS) from None
    except Exception:  # what Pillow's plugins raise on broken files has no common base
        raise Skip(Reason.UNDECODABLE_IMAGE) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode that PNG, JPEG or WebP can hold -> RGB of 8 bits a channel."""
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
        grey = np.asarray(image).astype(np.float64)
        return Image.fromarray(np.clip(np.round(grey / 257.0), 0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def center_crop(image: Image.Image, size: int, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The centre square as in DESIGN 1.4 (ADM's); see `resize_and_crop`."""
    return resize_and_crop(image, size, size, max_pixels=max_pixels)


def resize_and_crop(image: Image.Image, height: int, width: int, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Halved by boxes while that is possible, resized bicubically until it just covers height x width, its centre cut.

    Args:
        image: any size; one of this size is returned as it is.
        height, width: of what comes out, in pixels.

    Raises:
        Skip: so narrow that its resized form would exceed `max_pixels`.
    """
    if image.size == (width, height):
        return image
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    covering = round(image.width * scale), round(image.height * scale)
    if covering[0] * covering[1] > max_pixels:
        raise Skip(Reason.TOO_MANY_PIXELS)
    image = image.resize(covering, Image.Resampling.BICUBIC)
    left, top = (covering[0] - width) // 2, (covering[1] - height) // 2
    return image.crop((left, top, left + width, top + height))


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image -> uint8 [3, 1, H, W] (an image is a clip of one frame)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).unsqueeze(1).contiguous()


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
    batch = {kind: torch.stack([s[kind] for s in samples]) for kind in ("pixels", "bits") if kind in samples[0]}
    batch["key"] = [sample["key"] for sample in samples]
    if "label" in samples[0]:
        batch["label"] = torch.tensor([sample["label"] for sample in samples], dtype=torch.int64)
    if any(sample["caption"] is not None for sample in samples):
        batch["caption"] = [sample["caption"] or "" for sample in samples]
    return batch
