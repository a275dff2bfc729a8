"""scikit-learn's handwritten digits as a data set: real images for machines without ImageNet."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from grn.data.prepare.source import Source
from grn.runtime.errors import UserError, check_count

LABEL_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True, kw_only=True)
class DigitsSource(Source):
    """The 1797 digits of 8x8 pixels, enlarged, with captions such as "a handwritten seven"; nothing is downloaded.

    Args:
        image_size: height and width of the images, in pixels.
        val: how many are held out, each digit in proportion; the rest is for training.
        seed: of the split.
        train_shards: number of training shards; bounds ranks times workers in training.
        val_shards: number of held-out shards.
    """

    name: ClassVar[str] = "digits"

    image_size: int = 32
    val: int = 297
    seed: int = 0
    train_shards: int = 10
    val_shards: int = 4

    def content(self) -> dict[str, Any]:
        digits, labels = map(np.asarray, load_digits(return_X_y=True))
        train, val = split_digits(labels, self.val, self.seed)
        check_count("source.image_size", self.image_size, least=8, most=1024)
        shards = {}
        for split, indices, number in ("train", train, self.train_shards), ("val", val, self.val_shards):
            check_count(f"source.{split}_shards", number, most=len(indices))
            shards[split] = [indices[i::number].tolist() for i in range(number)]

        def samples(indices: list[int]) -> Iterator[dict]:
            for index in indices:
                yield {
                    "__key__": f"{index:04d}",
                    "png": render(digits[index].reshape(8, 8), self.image_size),
                    "cls": str(labels[index]),
                    "txt": digit_caption(labels[index]),
                }

        return {
            "shards": shards,
            "write": samples,
            "facts": {
                "image_size": self.image_size,
                "num_labels": len(LABEL_NAMES),
                "label_names": LABEL_NAMES,
            },
        }


def digit_caption(label: int) -> str:
    """E.g. "a handwritten seven"."""
    return f"a handwritten {LABEL_NAMES[label]}"


def split_digits(labels: np.ndarray, val: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the training digits and of the held-out ones, each label in proportion.

    Raises:
        UserError: a split would lack a digit.
    """
    if not len(LABEL_NAMES) <= val <= len(labels) - len(LABEL_NAMES):
        raise UserError(f"source.val={val} must leave every digit in both splits: give 10 to 1787")
    split: Any = train_test_split(np.arange(len(labels)), test_size=val, random_state=seed, stratify=labels)
    return tuple(split)


def render(digit: np.ndarray, size: int) -> bytes:
    """A digit [8, 8] with values in [0, 16] -> PNG of `size` x `size` gray RGB pixels, enlarged bicubically."""
    enlarged = Image.fromarray(digit.astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC)
    pixels = np.clip(np.round(np.asarray(enlarged) * (255 / 16)), 0, 255).astype(np.uint8)
    png = io.BytesIO()
    Image.fromarray(pixels).convert("RGB").save(png, format="PNG")
    return png.getvalue()
