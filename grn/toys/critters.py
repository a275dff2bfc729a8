"""Critters: cartoon creatures in color whose every attribute is known, with captions; unlimited, made on the spot.

They are drawn by DiceBear's style "critters" (CC0 1.0): `pip install '.[critters]'`. Its other CC0 styles are read by
`grn.toys.dicebear`.
"""

import functools
import json
import os
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from grn.data.prepare.folders import worker_count
from grn.data.prepare.shards import write_shards
from grn.runtime.errors import UserError
from grn.runtime.files import write_text
from grn.toys.dicebear import Attribute, Values, World, derived, drawing

# How the values of each attribute are called in captions -> what DiceBear calls them.
COLORS = {
    "blue": "#7dd3fc", "pink": "#fda4af", "yellow": "#fcd34d", "green": "#6ee7b9", "purple": "#c4b5fd",
    "orange": "#fdba74",
}  # fmt: skip
SHAPES = {"dome": "dome", "block": "block", "tower": "tower", "bell": "bell", "wedge": "wedge", "stairs": "steps"}
EYES = {
    "one eye": "mono", "two eyes": "round", "three eyes": "trio", "closed eyes": "closedLine", "angry eyes": "angry",
    "squinting eyes": "squint",
}  # fmt: skip
MOUTHS = {
    "a smile": "smile", "a toothy grin": "teeth", "an open mouth": "open", "a frown": "frown",
    "a zigzag mouth": "zigzag",
}  # fmt: skip
HATS = {
    "no hat": None, "horns": "horns", "an antenna": "antenna", "a sprout": "sprout", "round ears": "earsRound",
    "a fin": "fin",
}  # fmt: skip
BACKGROUNDS = {"white": "#ffffff", "black": "#1e293b", "red": "#be123c", "navy": "#1d4ed8", "teal": "#0f766e"}
ACCENTS = {"amber": "#f59e0b", "lime": "#84cc16", "magenta": "#ec4899"}  # of hats; no caption tells it

ATTRIBUTES = {
    "color": tuple(COLORS), "shape": tuple(SHAPES), "eyes": tuple(EYES), "mouth": tuple(MOUTHS), "hat": tuple(HATS),
    "background": tuple(BACKGROUNDS),
}  # fmt: skip
# (color, hat): no training picture shows these pairs. Every color is in one of them, and every hat but "no hat".
HELDOUT_PAIRS = (
    ("blue", "horns"), ("pink", "an antenna"), ("yellow", "a sprout"), ("green", "round ears"), ("purple", "a fin"),
    ("orange", "horns"),
)  # fmt: skip

# The first is what `caption` writes; the data draw among all.
WORDINGS = (
    "{a_color} {shape} critter with {eyes}, {mouth} and {hat} on {background}",
    "{color} {shape}, {eyes}, {mouth}, {hat}, {background} background",
    "on {background}, {a_color} {shape} critter with {hat}, {eyes} and {mouth}",
    "a {shape} critter in {color} with {mouth}, {eyes} and {hat}, {background} background",
)
SHORT_WORDINGS = (
    "{a_color} critter with {hat}",
    "{a_color} {shape} critter on {background}",
    "{a_color} critter with {eyes} and {mouth}",
    "a critter with {eyes}, {mouth} and {hat}",
)
SUITE, TAGS = 100, {"val": "seen", "new": "new"}  # prompts of each kind in suite.jsonl
T = TypeVar("T")
SHORT = 0.2  # share of captions that tell some attributes only


class Critter(NamedTuple):
    """One by its attributes: names among `ATTRIBUTES`, and the hat's color among `ACCENTS`."""

    color: str
    shape: str
    eyes: str
    mouth: str
    hat: str
    background: str
    accent: str = "amber"

    @property
    def label(self) -> int:
        """Its class, color by shape: the place in `LABEL_NAMES`."""
        return WORLD.label(self)

    @property
    def is_new(self) -> bool:
        """Whether training shows no critter of this color with this hat."""
        return WORLD.is_new(self)


def caption(critter: Critter, wording: str = WORDINGS[0]) -> str:
    """E.g. "a blue bell critter with three eyes, a frown and a sprout on teal"."""
    return WORLD.caption(critter, wording)


def read_caption(text: str) -> list[int]:
    """The attributes that a caption of any wording tells, by their places in `ATTRIBUTES`; -1 of others."""
    text = f" {' '.join(re.sub(r'[^a-z ]', ' ', text.lower()).split())} "
    return [
        next((place for place, value in enumerate(values) if f" {value} " in text), -1)
        for values in ATTRIBUTES.values()
    ]


def draw(critter: Critter, size: int, **options: Any) -> bytes:
    """A PNG of size x size RGB pixels; `options` are further ones of DiceBear.

    Raises:
        UserError: DiceBear is not installed.
    """
    return WORLD.draw(critter, size, **options)


WORLD = World(
    "critters",
    attributes=(
        Attribute("color", COLORS, "bodyColor"),
        Attribute("shape", SHAPES, "bodyVariant"),
        Attribute("eyes", EYES, "eyesVariant"),
        Attribute("mouth", MOUTHS, "mouthVariant"),
        Attribute("hat", HATS, "topVariant", probability="topProbability"),
        Attribute("background", BACKGROUNDS, "backgroundColor"),
        Attribute("accent", ACCENTS, "accentColor", of="hat", told=False),
    ),
    fixed={"seed": "critter", "patternProbability": 0, "cheeksProbability": 0, "animationProbability": 0},
    wordings=WORDINGS,
    short_wordings=SHORT_WORDINGS,
    classes=("color", "shape"),
    heldout=("color", "hat"),
    heldout_pairs=HELDOUT_PAIRS,
)
LABEL_NAMES = WORLD.label_names


def world(style: str) -> World:
    """Of `source.style`.

    Raises:
        UserError: DiceBear is not installed, or has no such style under CC0.
    """
    return WORLD if style == WORLD.style else derived(style)


@dataclass(frozen=True, kw_only=True)
class CrittersSource:
    """Pictures of one of DiceBear's styles, no two alike, in three splits: of pairs of attributes that go together in
    training, `train` and `val` (whose pictures training does not show either); and `new`, of the other pairs, of
    critters `HELDOUT_PAIRS`.

    Samples have a PNG, a class (of critters `LABEL_NAMES`), a caption, and their attributes in the json. Beside the
    shards stands `suite.jsonl`, prompts (of critters those of suite=critters): whole captions of held-out pictures, of
    both kinds of pairs.

    Args:
        style: critters, or another of DiceBear's under CC0, whose attributes are its own options
            (`grn.toys.dicebear.derived`).
        size: height and width in pixels.
        samples, val, new: how many in each split.
        seed: of the choice, and of the captions' wording.
        shard_size: samples a shard, at most.
        num_workers: processes; None: one per CPU, 0: none but this.
    """

    style: str = "critters"
    size: int = 64
    samples: int = 8000
    val: int = 1000
    new: int = 1000
    seed: int = 0
    shard_size: int = 500
    num_workers: int | None = None

    def write(self, root: str | os.PathLike, *, overwrite: bool = False, rank: int = 0, world_size: int = 1) -> bool:
        """Writes the shards and the manifest to `root`, see `grn.data.prepare.shards.write_shards`.

        Returns:
            Whether this process had a part in it.

        Raises:
            UserError: a key is out of range, DiceBear is not installed, or `root` holds something else.
        """
        for name in ("samples", "val", "new", "shard_size"):
            if getattr(self, name) < 1:
                raise UserError(f"source.{name}={getattr(self, name)} must be at least 1")
        if not 16 <= self.size <= 1024:
            raise UserError(f"source.size={self.size} must lie in 16 to 1024")
        own = world(self.style)
        drawing()
        draws = random.Random(f"critters/{self.seed}")
        splits = dict(own.splits(draws, samples=self.samples, val=self.val, new=self.new))
        parameters = {k: v for k, v in asdict(self).items() if k != "num_workers"}
        if self.style == WORLD.style:
            del parameters["style"]  # so that data sets from before there were others are up to date
        written = write_shards(
            root,
            name="critters",
            parameters=parameters,
            shards={split: dealt(pictures, self.shard_size) for split, pictures in splits.items()},
            write=functools.partial(_samples, self.style, self.size, self.seed),
            facts={"image_size": self.size, "num_labels": len(own.label_names), "label_names": own.label_names},
            num_workers=worker_count(self.num_workers),
            overwrite=overwrite,
            rank=rank,
            world_size=world_size,
        )
        if rank == 0:
            asked = [(split, values) for split in ("val", "new") for _, values in splits[split][:SUITE]]
            lines = (
                {"prompt": own.caption(values, own.wordings[0]), "tag": TAGS[split]} | dict(zip(own.names, values))
                for split, values in asked
            )
            write_text(Path(root) / "suite.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines))
        return written


def _samples(
    style: str, size: int, seed: int, pictures: Sequence[tuple[int, Values]]
) -> Iterator[dict[str, str | bytes]]:
    own = world(style)
    for index, values in pictures:
        draws = random.Random(f"critters/{seed}/{index}")
        wording = draws.choice(own.short_wordings if draws.random() < SHORT else own.wordings)
        yield {
            "__key__": f"{index:05d}",
            "png": own.draw(values, size),
            "cls": str(own.label(values)),
            "txt": own.caption(values, wording),
            "json": json.dumps(dict(zip(own.names, values))),
        }


def dealt(pictures: Sequence[T], most: int) -> list[list[T]]:
    """To as few shards as there must be, all as large as the others, or by one smaller."""
    shards = -(-len(pictures) // most)
    return [list(pictures[start::shards]) for start in range(shards)]
