"""The judge of moving digits: the right digit in every frame, the right motion."""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from grn.metrics.ranks import Totals
from grn.metrics.splits import Split, as_images
from grn.runtime.errors import UserError
from grn.toys.digit_pairs import PAIRS
from grn.toys.judge import DigitsJudge
from grn.toys.moving_digits import DIGIT, DIRECTIONS, crossing_caption, motion_caption

MIN_TRAVEL = 4.0  # pixels that the centroid must go: real digits go twelve at least


class MovingDigitsJudge:
    """`DigitsJudge`, trained on frames of the training split, reads every frame of samples; centroids tell the motion.

    A frame is judged by the square of 16 pixels around its centroid of light. Of clips of two digits that cross, the
    upper and the lower half are judged apart: both must be right, and they must go opposite ways, left and right.

    `compute` gives, of the samples that a motion was asked for: `frame_accuracy`, the share of frames with the right
    digit (of a crossing, both); `motion_accuracy`, the share of clips that move as asked for; `clip_accuracy`, of those
    that do and have the right digit in at least nine frames of ten; the same of crossings alone as `crossing_...`; and
    `judge_val_accuracy`: how well the judge reads frames of real held-out clips.

    Args:
        prompts: what samples are asked for, by the numbers that `update` gets; those that ask for no motion are not
            judged.
        train, val: the splits of data=digits_video.
        device: where the counts are kept for the reduction over ranks; the SVC runs on the CPU.
        cache_dir: not used.

    Raises:
        UserError: no motion among the prompts, or a split without any.
    """

    reads_clips: ClassVar = True

    def __init__(
        self,
        *,
        prompts: Sequence[str],
        train: Split,
        val: Split,
        device: torch.device | str = "cpu",
        cache_dir: str | Path | None = None,
    ):
        self.asked = self._asked_for(prompts)
        self.judge = DigitsJudge(train=lambda: single_frames(train()), val=lambda: single_frames(val()))
        # Clips, their frames, right frames, right motions, right clips; of one digit and of two.
        self.counts = Totals(2, 5, dtype=torch.int64).to(device)

    @classmethod
    def check(cls, num: int | None, *, prompts: Sequence[str]) -> None:
        """As `GenerationScores.check`."""
        cls._asked_for(prompts)

    @staticmethod
    def _asked_for(prompts: Sequence[str]) -> list[Any]:
        found = [ASKED.get(re.sub(r"\s+", " ", prompt.strip().lower())) for prompt in prompts]
        if not any(found):
            raise UserError('scores.judge.prompts asks for no digit that moves, such as "a five falling"')
        return found

    def update(self, clips: Tensor, labels: Tensor, ids: Tensor | None = None) -> None:
        """Adds generated clips uint8 [B, 3, T, H, W] and the numbers of their prompts, int64 [B]; ids are not read."""
        counts = torch.zeros(2, 5, dtype=torch.int64)
        for clip, label in zip(clips.cpu(), labels.tolist()):
            if (asked := self.asked[label]) is None:
                continue
            digits, direction = asked
            parts = clip.chunk(len(digits), dim=2)
            read = torch.stack([self.judge.read(around_centroid(as_images(part[None]))) for part in parts])
            right = (read == torch.tensor(digits)[:, None]).all(dim=0)
            found = [motion(part) for part in parts]
            moves = found == [direction] if direction else sorted(map(str, found)) == ["moving left", "moving right"]
            good = moves and right.double().mean().item() >= 0.9
            counts[len(digits) - 1] += torch.tensor([1, len(right), int(right.sum()), moves, good])
        self.counts.update(counts)

    def compute(self) -> dict[str, float]:
        """The scores of all clips given since the last `reset`, over all ranks; every rank must call it.

        Raises:
            UserError: no clip of a motion was given.
        """
        counts = self.counts.compute()
        scores = {}
        for prefix, own in {"": counts.sum(dim=0), "crossing_": counts[1]}.items():
            clips, frames, right, moves, good = own.tolist()
            if clips:
                scores[f"{prefix}frame_accuracy"] = right / frames
                scores[f"{prefix}motion_accuracy"] = moves / clips
                scores[f"{prefix}clip_accuracy"] = good / clips
            elif not prefix:
                raise UserError("scores.judge: no clips to judge: generate at least one")
        return scores | {"judge_val_accuracy": self.judge.val_accuracy}

    def reset(self) -> None:
        """Forgets the generated clips."""
        self.counts.reset()


# Caption -> (the digits from top to bottom, the direction; None: two that cross).
ASKED: dict[str, tuple[tuple[int, ...], str | None]] = {
    motion_caption(label, direction): ((label,), direction) for label in range(10) for direction in DIRECTIONS
}
ASKED |= {crossing_caption(*pair): (pair, None) for pair in PAIRS}


def single_frames(batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Tensor]]:
    """Of batches of data=digits_video the frames of single digits, as `grn.metrics.splits` has labeled images.

    One clip of each direction shows the same digit, and frames of a clip differ in its place alone: the first frame of
    clips that fall is enough.
    """
    labels = {motion_caption(label, "falling"): label for label in range(10)}
    for batch in batches:
        found = [(clip, labels[c]) for clip, c in zip(batch["pixels"], batch.get("caption", [])) if c in labels]
        if found:
            clips, own = zip(*found)
            yield {"pixels": around_centroid(torch.stack(clips)[:, :, 0]), "label": torch.tensor(own)}


def centroids(images: Tensor) -> Tensor:
    """Of the light of uint8 [B, 3, H, W]: float64 [B, 2], row and column; the middle of images without any."""
    light = images.double().mean(dim=1).clamp(min=0) + 1e-9
    total = light.sum(dim=(1, 2))
    places = [torch.arange(side, dtype=torch.float64) for side in light.shape[1:]]
    return torch.stack([light.sum(dim=2) @ places[0] / total, light.sum(dim=1) @ places[1] / total], dim=1)


def around_centroid(images: Tensor) -> Tensor:
    """The square of 16 pixels around each centroid: uint8 [B, 3, H, W] -> [B, 3, 16, 16]; black beyond the image."""
    padded = F.pad(images, [DIGIT // 2] * 4)
    corners = (centroids(images) + 0.5).round().long().tolist()
    return torch.stack([image[:, r : r + DIGIT, c : c + DIGIT] for image, (r, c) in zip(padded, corners)])


def motion(clip: Tensor) -> str | None:
    """The direction of uint8 [3, T, H, W] by its centroids; None for neither of `DIRECTIONS`, aslant or hardly at all.

    The mean of the first and of the last quarter of the frames are compared.
    """
    path = centroids(as_images(clip[None]))
    quarter = max(1, len(path) // 4)
    rows, columns = (path[-quarter:].mean(dim=0) - path[:quarter].mean(dim=0)).tolist()
    along, across = max(abs(rows), abs(columns)), min(abs(rows), abs(columns))
    if along < MIN_TRAVEL or across > along / 2:
        return None
    sign = (round(rows / along), 0) if abs(rows) > abs(columns) else (0, round(columns / along))
    return next(name for name, direction in DIRECTIONS.items() if direction == sign)
