"""Captioned clips of critters that hop, turn, blink, move and grow: text to video in color, with the truth known.

Motions are DiceBear's options (translate, rotate, scale; the eyes' variant), frame by frame. They need
`pip install '.[critters]'`.
"""

import functools
import io
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from grn.data.prepare.folders import worker_count
from grn.data.prepare.source import Source
from grn.media.mp4 import write_mp4
from grn.runtime.errors import UserError, check_count
from grn.toys.critters import EYES, WORLD, Critter, dealt, draw
from grn.toys.dicebear import drawing

FRAMES, FPS = 17, 16
SCALE = 0.7  # of critters that do not grow or shrink: room to hop, and corners stay in the frame as they turn
MOTIONS = (
    "hopping", "turning left", "turning right", "blinking", "moving left", "moving right", "growing", "shrinking",
)  # fmt: skip
CLOSED = "closed eyes"  # critters that have them do not blink

# The first is what `motion_caption` writes; the data draw among all.
WORDINGS = (
    "{a_color} {shape} critter with {eyes}, {mouth} and {hat} on {background}, {motion}",
    "{motion}: {color} {shape}, {eyes}, {mouth}, {hat}, {background} background",
    "{a_color} {shape} critter {motion} on {background}, with {hat}, {eyes} and {mouth}",
)
SHORT_WORDINGS = ("{a_color} critter {motion}", "{a_color} {shape} critter with {hat}, {motion} on {background}")
SHORT = 0.3  # share of captions that tell some attributes only; all tell the motion

Track = list[dict[str, Any]]  # of each frame, DiceBear's options that make the motion


def motion_caption(critter: Critter, motion: str, wording: str = WORDINGS[0]) -> str:
    """E.g. "a blue bell critter with three eyes, a frown and a sprout on teal, hopping"."""
    return WORLD.caption(critter, wording.replace("{motion}", motion))


def track(motion: str, draws: random.Random) -> Track:
    """How a clip of a motion goes: how far, how often and from when on is drawn.

    Places and distances are in percent of the frame, angles in degrees, clockwise.
    """
    times = [number / (FRAMES - 1) for number in range(FRAMES)]
    if motion == "hopping":
        height, hops = draws.uniform(12, 18), draws.choice((2, 3))
        return [_still(translateY=8 - height * abs(math.sin(math.pi * hops * time))) for time in times]
    if motion.startswith("turning"):
        angle = draws.uniform(270, 360) * (1 if motion == "turning right" else -1)
        return [_still(rotate=angle * time) for time in times]
    if motion == "blinking":
        starts = draws.randint(2, 4), draws.randint(10, 12)
        shut = {start + more for start in starts for more in range(3)}
        return [_still(**({"eyesVariant": EYES[CLOSED]} if place in shut else {})) for place in range(FRAMES)]
    if motion.startswith("moving"):
        way = draws.uniform(36, 50) * (1 if motion == "moving right" else -1)
        return [_still(translateX=way * (time - 0.5)) for time in times]
    small, large = draws.uniform(0.35, 0.45), draws.uniform(0.85, 0.95)
    first, last = (small, large) if motion == "growing" else (large, small)
    return [{"scale": round(first + (last - first) * time, 4)} for time in times]


def _still(**options: Any) -> dict[str, Any]:
    return {"scale": SCALE} | {k: round(v, 2) if isinstance(v, float) else v for k, v in options.items()}


def frames(critter: Critter, steps: Track, size: int) -> Iterator[Tensor]:
    """The pictures of a clip: uint8 [3, size, size] each."""
    drawn: dict[str, Tensor] = {}
    for options in steps:
        key = json.dumps(options)
        if key not in drawn:  # a critter that blinks has two pictures
            picture = np.array(Image.open(io.BytesIO(draw(critter, size, **options))))
            drawn[key] = torch.from_numpy(picture).permute(2, 0, 1)
        yield drawn[key]


Clip = tuple[int, Critter, str]  # its number, the critter, the motion


@dataclass(frozen=True, kw_only=True)
class CrittersVideoSource(Source):
    """Critters in motion, no two alike, 17 frames, 16 a second, in the three splits of `CrittersSource`: `train`, `val`
    and `new`, whose pairs of color and hat training never shows.

    Samples have an mp4, a caption, and in the json the critter's attributes, its `motion` and its `track`.

    Args:
        size: height and width in pixels, even.
        samples, val, new: how many in each split.
        seed: of the choice, the motions and the captions' wording.
        shard_size: samples a shard, at most.
        num_workers: processes; None: one per CPU, 0: none but this.
    """

    name: ClassVar[str] = "critters_video"

    size: int = 48
    samples: int = 4000
    val: int = 200
    new: int = 200
    seed: int = 0
    shard_size: int = 250
    num_workers: int | None = None

    def content(self) -> dict[str, Any]:
        for name in ("samples", "val", "new", "shard_size"):
            check_count(f"source.{name}", getattr(self, name))
        if not 16 <= self.size <= 512 or self.size % 2:
            raise UserError(f"source.size={self.size} must be even, in 16 to 512")
        drawing()
        draws = random.Random(f"critters_video/{self.seed}")
        splits = {
            split: [_clip(number, Critter(*values), draws) for number, values in pictures]
            for split, pictures in WORLD.splits(draws, samples=self.samples, val=self.val, new=self.new)
        }
        return {
            "parameters": {k: v for k, v in asdict(self).items() if k != "num_workers"},
            "shards": {split: dealt(clips, self.shard_size) for split, clips in splits.items()},
            "write": functools.partial(_samples, self.size, self.seed),
            "num_workers": worker_count(self.num_workers),
        }


def _clip(number: int, critter: Critter, draws: random.Random) -> Clip:
    return number, critter, draws.choice([it for it in MOTIONS if it != "blinking" or critter.eyes != CLOSED])


def _samples(size: int, seed: int, clips: Sequence[Clip]) -> Iterator[Mapping[str, str | bytes]]:
    for number, critter, motion in clips:
        draws = random.Random(f"critters_video/{seed}/{number}")
        steps = track(motion, draws)
        file = io.BytesIO()
        write_mp4(frames(critter, steps, size), file, fps=FPS, quality=8)
        wording = draws.choice(SHORT_WORDINGS if draws.random() < SHORT else WORDINGS)
        yield {
            "__key__": f"{number:05d}",
            "mp4": file.getvalue(),
            "txt": motion_caption(critter, motion, wording),
            "json": json.dumps(critter._asdict() | {"motion": motion, "track": steps}),
        }
