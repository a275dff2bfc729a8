"""Captioned clips of moving handwritten digits: a small data set for text to video."""

import io
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from grn.data.prepare.source import Source
from grn.media.mp4 import write_mp4
from grn.runtime.errors import check_count
from grn.toys.digit_pairs import HELDOUT_PAIRS, PAIRS, with_article
from grn.toys.digits import render, split_digits

DIRECTIONS = {"moving left": (0, -1), "moving right": (0, 1), "rising": (-1, 0), "falling": (1, 0)}  # (rows, columns)
SIZE, DIGIT, TRAVEL = 32, 16, (12, 16)  # pixels: of frames, of a digit, that it travels at least and at most
FRAMES, FPS = 17, 16


def motion_caption(label: int, direction: str) -> str:
    """E.g. "a five falling"."""
    return f"{with_article(label)} {direction}"


def crossing_caption(upper: int, lower: int) -> str:
    """Of two digits that pass each other, e.g. "a three crossing over an eight"."""
    return f"{with_article(upper)} crossing over {with_article(lower)}"


@dataclass(frozen=True)
class Motion:
    """Of a digit across the frame, from one corner of its square to another.

    Args:
        digit: its number among scikit-learn's.
        start, end: (row, column) of its upper left corner in the first and in the last frame, in pixels.
    """

    digit: int
    start: tuple[int, int]
    end: tuple[int, int]


Clip = tuple[str, tuple[Motion, ...]]  # the caption; the digits


@dataclass(frozen=True, kw_only=True)
class MovingDigitsSource(Source):
    """scikit-learn's digits, each in all four directions, and two that cross: 17 frames of 32x32 pixels, 16 a second.

    The training split has the training digits of `DigitsSource` and crossings of all pairs but for `HELDOUT_PAIRS`; the
    held-out split has the other digits, and crossings of all pairs of those.

    Args:
        digits: how many of scikit-learn's there are, the first ones; fewer is faster.
        copies: crossings of each training pair.
        val_copies: crossings of each pair in the held-out split.
        val: how many digits are held out.
        seed: of the split, the places and the choice of digits.
        train_shards, val_shards: their numbers.
    """

    name: ClassVar[str] = "digits_video"

    digits: int = 1797
    copies: int = 50
    val_copies: int = 1
    val: int = 297
    seed: int = 0
    train_shards: int = 10
    val_shards: int = 4

    def content(self) -> dict[str, Any]:
        for name in ("train_shards", "val_shards"):
            check_count(f"source.{name}", getattr(self, name))
        for name in ("copies", "val_copies"):
            check_count(f"source.{name}", getattr(self, name), least=0)
        check_count("source.digits", self.digits, least=100, most=1797)
        digits, labels = (np.asarray(part)[: self.digits] for part in load_digits(return_X_y=True))
        train, val = split_digits(labels, self.val, self.seed)
        shown = [pair for pair in PAIRS if pair not in HELDOUT_PAIRS]
        shards = {
            "train": self._shards(labels, train, shown, self.copies, self.train_shards),
            "val": self._shards(labels, val, PAIRS, self.val_copies, self.val_shards),
        }

        def samples(clips: list[Clip]) -> Iterator[dict]:
            for caption, motions in clips:
                drawings = [drawing(digits[motion.digit].reshape(8, 8)) for motion in motions]
                file = io.BytesIO()
                write_mp4(frames(drawings, motions), file, fps=FPS, quality=8)
                places = [f"{m.digit:04d}+{m.start[0]}+{m.start[1]}+{m.end[0]}+{m.end[1]}" for m in motions]
                yield {"__key__": "-".join(places), "mp4": file.getvalue(), "txt": caption}

        return {
            "shards": shards,
            "write": samples,
        }

    def _shards(
        self, labels: np.ndarray, indices: np.ndarray, pairs: Sequence[tuple[int, int]], copies: int, number: int
    ) -> list[list[Clip]]:
        """Each shard's clips, well mixed."""
        draws = random.Random(f"moving/{self.seed}/{len(indices)}")
        clips: list[Clip] = [
            (motion_caption(int(labels[index]), direction), (moving(index, direction, draws),))
            for index in indices.tolist()
            for direction in DIRECTIONS
        ]
        of_label = [[index for index in indices.tolist() if labels[index] == label] for label in range(10)]
        for upper, lower in pairs:
            for _ in range(copies):
                chosen = draws.choice(of_label[upper]), draws.choice(of_label[lower])
                clips.append((crossing_caption(upper, lower), crossing(*chosen, draws)))
        draws.shuffle(clips)
        return [clips[start::number] for start in range(number)]


def moving(digit: int, direction: str, draws: random.Random) -> Motion:
    """Through the middle of the frame, at 12 to 16 pixels a second."""
    room, travel = SIZE - DIGIT, draws.randint(*TRAVEL)
    along, across = (room - travel) // 2, room // 2
    rows, columns = DIRECTIONS[direction]
    first, last = (along, along + travel) if rows + columns > 0 else (along + travel, along)
    return Motion(digit, (first, across), (last, across)) if rows else Motion(digit, (across, first), (across, last))


def crossing(upper: int, lower: int, draws: random.Random) -> tuple[Motion, Motion]:
    """One in the upper half of the frame, one in the lower half, the one to the left and the other to the right."""
    directions = draws.sample(["moving left", "moving right"], 2)
    motions = []
    for digit, direction, row in zip((upper, lower), directions, (0, SIZE - DIGIT)):
        motion = moving(digit, direction, draws)
        motions.append(Motion(digit, (row, motion.start[1]), (row, motion.end[1])))
    return motions[0], motions[1]


def drawing(digit: np.ndarray) -> Tensor:
    """A digit [8, 8] with values in [0, 16] -> uint8 [3, 16, 16]."""
    image = np.array(Image.open(io.BytesIO(render(digit, DIGIT))))
    return torch.from_numpy(image).permute(2, 0, 1)


def frames(drawings: Sequence[Tensor], motions: Sequence[Motion]) -> Iterator[Tensor]:
    """The pictures of a clip, white on black: uint8 [3, 32, 32] each."""
    for number in range(FRAMES):
        frame = torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)
        for digit, motion in zip(drawings, motions):
            row, column = (
                round(start + (end - start) * number / (FRAMES - 1)) for start, end in zip(motion.start, motion.end)
            )
            place = frame[:, row : row + DIGIT, column : column + DIGIT]
            place.copy_(torch.maximum(place, digit))
        yield frame
