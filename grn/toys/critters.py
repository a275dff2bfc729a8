"""Critters: cartoon creatures in colour whose every attribute is known, with captions; unlimited, made on the spot.

They are drawn by DiceBear's style "critters" (CC0 1.0): `pip install '.[critters]'`.
"""

import functools
import io
import itertools
import json
import os
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from grn.data.prepare.folders import worker_count
from grn.data.prepare.shards import write_shards
from grn.runtime.errors import UserError
from grn.runtime.files import write_text

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
LABEL_NAMES = tuple(f"{color} {shape}" for color, shape in itertools.product(COLORS, SHAPES))

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
        return ATTRIBUTES["color"].index(self.color) * len(SHAPES) + ATTRIBUTES["shape"].index(self.shape)

    @property
    def is_new(self) -> bool:
        """Whether training shows no critter of this color with this hat."""
        return (self.color, self.hat) in HELDOUT_PAIRS


def caption(critter: Critter, wording: str = WORDINGS[0]) -> str:
    """E.g. "a blue bell critter with three eyes, a frown and a sprout on teal"."""
    a_color = f"{'an' if critter.color[0] in 'aeiou' else 'a'} {critter.color}"
    return wording.format(a_color=a_color, **critter._asdict())


def read_caption(text: str) -> list[int]:
    """The attributes that a caption of any wording tells, by their places in `ATTRIBUTES`; -1 of others."""
    text = f" {' '.join(re.sub(r'[^a-z ]', ' ', text.lower()).split())} "
    return [
        next((place for place, value in enumerate(values) if f" {value} " in text), -1)
        for values in ATTRIBUTES.values()
    ]


def draw(critter: Critter, size: int) -> bytes:
    """A PNG of size x size RGB pixels.

    Raises:
        UserError: DiceBear is not installed.
    """
    avatar, style, svg_to_bytes = _drawing()
    options = {
        "seed": "critter",
        "bodyColor": COLORS[critter.color],
        "bodyVariant": SHAPES[critter.shape],
        "eyesVariant": EYES[critter.eyes],
        "mouthVariant": MOUTHS[critter.mouth],
        "backgroundColor": BACKGROUNDS[critter.background],
        "accentColor": ACCENTS[critter.accent],
        "topProbability": 0 if HATS[critter.hat] is None else 100,
        "patternProbability": 0,
        "cheeksProbability": 0,
        "animationProbability": 0,
    }
    if HATS[critter.hat] is not None:
        options["topVariant"] = HATS[critter.hat]
    png = svg_to_bytes(svg_string=str(avatar(style, options)), width=size, height=size, skip_system_fonts=True)
    file = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").save(file, format="PNG")
    return file.getvalue()


@dataclass(frozen=True, kw_only=True)
class CrittersSource:
    """Critters, no two alike, in three splits: of colors and hats that go together in training, `train` and `val`
    (whose critters training does not show either); and `new`, of `HELDOUT_PAIRS`.

    Samples have a PNG, a class (`LABEL_NAMES`), a caption, and their attributes in the json. Beside the shards stands
    `suite.jsonl`, the prompts of suite=critters: whole captions of held-out critters, of both kinds of pairs.

    Args:
        size: height and width in pixels.
        samples, val, new: how many in each split.
        seed: of the choice, and of the captions' wording.
        shard_size: samples a shard, at most.
        num_workers: processes; None: one per CPU, 0: none but this.
    """

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
        _drawing()
        shown, new = _all()
        if self.samples + self.val > len(shown) or self.new > len(new):
            raise UserError(
                f"source.samples={self.samples} and source.val={self.val} are of the {len(shown)} different "
                f"critters of the pairs in training, source.new={self.new} of {len(new)} others: ask for fewer"
            )
        draws = random.Random(f"critters/{self.seed}")
        chosen = draws.sample(range(len(shown)), self.samples + self.val)
        splits = {
            "train": [(index, shown[index]) for index in chosen[: self.samples]],
            "val": [(index, shown[index]) for index in chosen[self.samples :]],
            "new": [(len(shown) + index, new[index]) for index in draws.sample(range(len(new)), self.new)],
        }
        parameters = {k: v for k, v in asdict(self).items() if k != "num_workers"}
        written = write_shards(
            root,
            name="critters",
            parameters=parameters,
            shards={split: _dealt(critters, self.shard_size) for split, critters in splits.items()},
            write=functools.partial(_samples, self.size, self.seed),
            facts={"image_size": self.size, "num_labels": len(LABEL_NAMES), "label_names": LABEL_NAMES},
            num_workers=worker_count(self.num_workers),
            overwrite=overwrite,
            rank=rank,
            world_size=world_size,
        )
        if rank == 0:
            asked = [(split, critter) for split in ("val", "new") for _, critter in splits[split][:SUITE]]
            lines = ({"prompt": caption(critter), "tag": TAGS[split], **critter._asdict()} for split, critter in asked)
            write_text(Path(root) / "suite.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines))
        return written


def _samples(size: int, seed: int, critters: Sequence[tuple[int, Critter]]) -> Iterator[dict[str, str | bytes]]:
    for index, critter in critters:
        draws = random.Random(f"critters/{seed}/{index}")
        wording = draws.choice(SHORT_WORDINGS if draws.random() < SHORT else WORDINGS)
        yield {
            "__key__": f"{index:05d}",
            "png": draw(critter, size),
            "cls": str(critter.label),
            "txt": caption(critter, wording),
            "json": json.dumps(critter._asdict()),
        }


def _dealt(critters: Sequence[tuple[int, Critter]], most: int) -> list[list[tuple[int, Critter]]]:
    """To as few shards as there must be, all as large as the others, or by one smaller."""
    shards = -(-len(critters) // most)
    return [list(critters[start::shards]) for start in range(shards)]


@functools.cache
def _all() -> tuple[list[Critter], list[Critter]]:
    """(all whose color and hat go together in training, the others)."""
    critters = [Critter(*values) for values in itertools.product(*ATTRIBUTES.values(), ACCENTS)]
    # Without a hat its color is not to be seen: one of these is enough.
    critters = [it for it in critters if HATS[it.hat] is not None or it.accent == "amber"]
    return [it for it in critters if not it.is_new], [it for it in critters if it.is_new]


@functools.cache
def _drawing():
    """(DiceBear's class of pictures, the style, the renderer)."""
    try:
        from dicebear import Avatar, Style
        from resvg_py import svg_to_bytes

        definition = files("dicebear_styles").joinpath("critters.json").read_text(encoding="utf-8")
    except ModuleNotFoundError as error:
        raise UserError(f"critters are drawn by {error.name}: pip install 'grn[critters]'") from None
    return Avatar, Style(json.loads(definition)), svg_to_bytes
