"""Captioned handwritten digits and pairs of digits: a small data set for text to image."""

import io
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from grn.data.prepare.source import Source
from grn.runtime.errors import check_count
from grn.toys.digits import LABEL_NAMES, digit_caption, render, split_digits

# (left, right): no training image shows these pairs. Every digit is on either side of one of them.
HELDOUT_PAIRS = tuple((left, (left + 3) % 10) for left in range(10))
PAIRS = tuple((left, right) for left in range(10) for right in range(10))


def pair_caption(left: int, right: int) -> str:
    """E.g. "a three left of an eight"."""
    return f"{with_article(left)} left of {with_article(right)}"


@dataclass(frozen=True, kw_only=True)
class DigitPairsSource(Source):
    """scikit-learn's digits one by one, and two side by side: `size` squared and `size` x 2 `size` pixels.

    The training split has the training digits of `DigitsSource`, and pairs of them but for `HELDOUT_PAIRS`; the
    held-out split has the other digits, and all pairs of those.

    Args:
        size: height of the images, in pixels.
        copies: images of each training pair.
        val_copies: images of each pair in the held-out split.
        val: how many digits are held out.
        seed: of the split, and of the choice of digits.
        train_shards, val_shards: their numbers.
    """

    name: ClassVar[str] = "digits_t2i"

    size: int = 32
    copies: int = 40
    val_copies: int = 2
    val: int = 297
    seed: int = 0
    train_shards: int = 10
    val_shards: int = 4

    def content(self) -> dict[str, Any]:
        for name in ("copies", "val_copies", "train_shards", "val_shards"):
            check_count(f"source.{name}", getattr(self, name))
        check_count("source.size", self.size, least=8, most=1024)
        digits, labels = map(np.asarray, load_digits(return_X_y=True))
        train, val = split_digits(labels, self.val, self.seed)
        shown = [pair for pair in PAIRS if pair not in HELDOUT_PAIRS]
        shards = {
            "train": self._shards(labels, train, shown, self.copies, self.train_shards),
            "val": self._shards(labels, val, PAIRS, self.val_copies, self.val_shards),
        }

        def samples(images: list[list[int]]) -> Iterator[dict]:
            for image in images:
                own = [int(labels[index]) for index in image]
                yield {
                    "__key__": "-".join(f"{index:04d}" for index in image),
                    "png": _side_by_side([render(digits[index].reshape(8, 8), self.size) for index in image]),
                    "txt": digit_caption(*own) if len(own) == 1 else pair_caption(*own),
                }

        return {
            "shards": shards,
            "write": samples,
        }

    def _shards(
        self, labels: np.ndarray, indices: np.ndarray, pairs: Sequence[tuple[int, int]], copies: int, number: int
    ) -> list[list[list[int]]]:
        """Each shard's images, as the numbers of their digits from left to right: no image twice, well mixed."""
        draws = random.Random(f"pairs/{self.seed}/{len(indices)}")
        of_label = [[index for index in indices.tolist() if labels[index] == label] for label in range(10)]
        images = [[index] for index in indices.tolist()]
        for left, right in pairs:
            every = len(of_label[left]) * len(of_label[right])
            for choice in draws.sample(range(every), min(copies, every)):
                row, column = divmod(choice, len(of_label[right]))
                images.append([of_label[left][row], of_label[right][column]])
        draws.shuffle(images)
        return [images[start::number] for start in range(number)]


def with_article(label: int) -> str:
    """A digit's name, e.g. "an eight"."""
    name = LABEL_NAMES[label]
    return f"{'an' if name == 'eight' else 'a'} {name}"


def _side_by_side(images: list[bytes]) -> bytes:
    png = io.BytesIO()
    Image.fromarray(np.concatenate([np.asarray(Image.open(io.BytesIO(image))) for image in images], axis=1)).save(
        png, format="PNG"
    )
    return png.getvalue()
