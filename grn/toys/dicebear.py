"""Worlds of pictures whose every attribute is known, drawn by DiceBear's CC0 styles: `pip install '.[critters]'`.

A `World` is a table of attributes, each with its values' words in captions and what DiceBear calls them.
`grn.toys.critters` has one written by hand; `derived` makes one of any other style's own options.
"""

import colorsys
import functools
import io
import itertools
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from PIL import Image

from grn.runtime.errors import UserError

Values = tuple[str, ...]  # a picture: of each attribute, in the world's order, a value's word
LAYOUTS = 4  # seeds that draw what a derived world's options leave open, such as where stars are


@dataclass(frozen=True)
class Attribute:
    """One of a picture.

    Args:
        name: as the json has it.
        values: words in captions -> what DiceBear calls them; None: the part is missing.
        option: DiceBear's, which takes the value.
        probability: DiceBear's option whether there is such a part; None: there always is.
        of: the attribute whose part it colors; where that is missing, this one has its first value. None: of no such.
        told: whether captions tell it.
    """

    name: str
    values: Mapping[str, str | None]
    option: str
    probability: str | None = None
    of: str | None = None
    told: bool = True


class World:
    """All pictures of a style.

    Args:
        style: its name in DiceBear.
        attributes: one of a part before those that depend on it.
        fixed: further options of DiceBear.
        wordings, short_wordings: of captions, with attributes' names in braces and `a_<name>` with an article; short
            ones tell some attributes only.
        classes: two attributes, whose pairs are the classes.
        heldout: two attributes, and
        heldout_pairs: pairs of their values that training never shows.
    """

    def __init__(
        self,
        style: str,
        *,
        attributes: Sequence[Attribute],
        fixed: Mapping[str, Any],
        wordings: Sequence[str],
        short_wordings: Sequence[str],
        classes: tuple[str, str],
        heldout: tuple[str, str],
        heldout_pairs: Sequence[tuple[str, str]],
    ):
        self.style, self.attributes, self.fixed = style, tuple(attributes), dict(fixed)
        self.wordings, self.short_wordings = tuple(wordings), tuple(short_wordings)
        self.names = tuple(it.name for it in attributes)
        self.classes, self.heldout_pairs = classes, tuple(heldout_pairs)
        self.heldout = tuple(self.names.index(name) for name in heldout)
        pairs = itertools.product(*(attributes[self.names.index(name)].values for name in classes))
        self.label_names = tuple(f"{one} {other}" for one, other in pairs)
        self._count = functools.cache(self._count_uncached)

    def label(self, values: Values) -> int:
        """The picture's class: its place in `label_names`."""
        one, other = (self.names.index(name) for name in self.classes)
        places = [list(self.attributes[place].values).index(values[place]) for place in (one, other)]
        return places[0] * len(self.attributes[other].values) + places[1]

    def is_new(self, values: Sequence[str | None]) -> bool:
        """Whether training shows no picture of this pair."""
        return tuple(values[place] for place in self.heldout) in self.heldout_pairs

    def caption(self, values: Values, wording: str) -> str:
        words = dict(zip(self.names, values))
        articles = {f"a_{name}": f"{'an' if word[0] in 'aeiou' else 'a'} {word}" for name, word in words.items()}
        return wording.format(**words, **articles)

    def draw(self, values: Values, size: int, **options: Any) -> bytes:
        """A PNG of size x size RGB pixels.

        Args:
            options: further ones of DiceBear, which come last.

        Raises:
            UserError: DiceBear is not installed.
        """
        chosen = dict(self.fixed)
        for attribute, word in zip(self.attributes, values):
            value = attribute.values[word]
            if attribute.probability is not None:
                chosen[attribute.probability] = 0 if value is None else 100
            if value is not None:
                chosen[attribute.option] = value
        avatar, svg_to_bytes = drawing()
        svg = str(avatar(_style(self.style), chosen | options))
        png = svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
        file = io.BytesIO()
        Image.open(io.BytesIO(png)).convert("RGB").save(file, format="PNG")
        return file.getvalue()

    def count(self, *, new: bool) -> int:
        """How many different pictures there are of pairs that training shows, or of the others."""
        return self._count((), new)

    def at(self, index: int, *, new: bool) -> Values:
        """The picture of that number below `count`, in the order of the attributes' values."""
        values: Values = ()
        while len(values) < len(self.attributes):
            for value in self._choices(values):
                inside = self._count(self._key((*values, value)), new)
                if index < inside:
                    values = (*values, value)
                    break
                index -= inside
        return values

    def splits(
        self, draws: random.Random, *, samples: int, val: int, new: int
    ) -> Iterator[tuple[str, list[tuple[int, Values]]]]:
        """Different pictures for each split, with their numbers among all: `train` and `val` of pairs that training
        shows, `new` of the others. What is drawn between two splits changes the later one.

        Raises:
            UserError: there are not as many.
        """
        shown, others = self.count(new=False), self.count(new=True)
        if samples + val > shown or new > others:
            raise UserError(
                f"source.samples={samples} and source.val={val} are of the {shown} different {self.style} of the pairs "
                f"in training, source.new={new} of {others} others: ask for fewer"
            )
        chosen = draws.sample(range(shown), samples + val)
        yield "train", [(index, self.at(index, new=False)) for index in chosen[:samples]]
        yield "val", [(index, self.at(index, new=False)) for index in chosen[samples:]]
        yield "new", [(shown + index, self.at(index, new=True)) for index in draws.sample(range(others), new)]

    def _choices(self, values: Sequence[str | None]) -> Sequence[str]:
        """What the next attribute may be."""
        attribute = self.attributes[len(values)]
        words = tuple(attribute.values)
        if attribute.of is not None:
            place = self.names.index(attribute.of)
            if (word := values[place]) is not None and self.attributes[place].values[word] is None:
                return words[:1]
        return words

    def _key(self, values: Sequence[str | None]) -> tuple[str | None, ...]:
        """What of a picture's first attributes matters for how many there are: others are None, parts that are there
        the first of their kind."""
        parts = {self.names.index(it.of) for it in self.attributes if it.of is not None}
        key: list[str | None] = []
        for place, word in enumerate(values):
            if place in parts and place not in self.heldout and word is not None:
                own = self.attributes[place].values
                word = word if own[word] is None else next(iter(own))
            key.append(word if place in parts or place in self.heldout else None)
        return tuple(key)

    def _count_uncached(self, values: tuple[str | None, ...], new: bool) -> int:
        """Of pictures that begin so."""
        if len(values) == len(self.attributes):
            return int(self.is_new(values) == new)
        return sum(self._count(self._key((*values, value)), new) for value in self._choices(values))


@functools.cache
def derived(style: str) -> World:
    """The world of a style, of what its file says: its parts with their variants, and its colors.

    Captions tell all parts and colors but for colors of parts that may be missing. Of colors that have one name the
    first is taken. The classes are of one color and one part, the held-out pairs of that color and another part.

    Raises:
        UserError: DiceBear is not installed, or has no such style under CC0, or one with too few options.
    """
    definition = read_style(style)
    parts, colors = _parts(definition), _colors(definition)
    told = [it.name for it in (*parts, *colors) if it.told]
    leading = [it.name for it in colors if it.told and it.name != "background"]
    choices = sorted((it for it in parts if it.told), key=lambda it: (it.probability is not None, -len(it.values)))
    order = [*leading[:1], *(it.name for it in choices)]
    order += [name for name in told if name not in order]
    if len(order) < 3:
        raise UserError(f"source.style={style} has too few options to be told apart: take another, such as planets")
    first, second, third = order[:3]
    table = {it.name: list(it.values) for it in (*parts, *colors)}
    shown = table[third] if len(table[third]) < 3 else [word for word in table[third] if not word.startswith("no ")]
    pairs = tuple((word, shown[place % len(shown)]) for place, word in enumerate(table[first]))
    attributes = [*parts, *colors]
    if any({"extends", "translate", "rotate", "scale"} & set(it) for it in definition["components"].values()):
        seeds = {f"layout {number}": f"{style} {number}" for number in range(LAYOUTS)}
        attributes.append(Attribute("layout", seeds, "seed", told=False))
    noun = style.replace("-", " ")
    listed = ["{" + name + "}" for name in told]
    half = len(told) // 2
    return World(
        style,
        attributes=attributes,
        fixed={"seed": style, "backgroundColor": "#ffffff"} | _still(definition),
        wordings=(
            f"{noun} with {', '.join(listed[:-1])} and {listed[-1]}",
            ", ".join(listed),
            f"{', '.join(reversed(listed))}, {noun}",
        ),
        short_wordings=tuple(f"{noun} with {' and '.join(some)}" for some in (listed[:half], listed[half:])),
        classes=(first, second),
        heldout=(first, third),
        heldout_pairs=pairs,
    )


def read_style(style: str) -> dict[str, Any]:
    """A style's definition, of the package dicebear-styles.

    Raises:
        UserError: DiceBear is not installed, or has no such style, or one that is not under CC0.
    """
    try:
        folder = files("dicebear_styles")
    except ModuleNotFoundError as error:
        raise _missing(error) from None
    found = {path.name.removesuffix(".json"): path for path in folder.iterdir() if path.name.endswith(".json")}
    if style in found and (definition := _load(found[style]))["meta"]["license"]["name"].startswith("CC0"):
        return definition
    free = [name for name, path in sorted(found.items()) if _load(path)["meta"]["license"]["name"].startswith("CC0")]
    raise UserError(f"source.style={style} must be one of DiceBear's styles under CC0: {', '.join(free)}")


def _load(path: Any) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _parts(definition: Mapping[str, Any]) -> list[Attribute]:
    """Of a derived world: those that have variants to choose from."""
    parts = []
    for name, part in definition["components"].items():
        probability = f"{name}Probability" if part.get("probability", 100) < 100 else None
        values: dict[str, str | None] = {
            f"{_words(variant)} {_words(name)}": variant for variant in part.get("variants", ())
        }
        if probability is not None:
            values[f"no {_words(name)}"] = None
        if name != "animation" and len(values) > 1:
            parts.append(Attribute(_key_of(name), values, f"{name}Variant", probability))
    return parts


def _colors(definition: Mapping[str, Any]) -> list[Attribute]:
    """Of a derived world: those that have names to choose from."""
    optional = {name for name, part in definition["components"].items() if part.get("probability", 100) < 100}
    colors = []
    for name, color in definition["colors"].items():
        values: dict[str, str | None] = {}
        for value in color["values"]:
            values.setdefault(f"{color_name(value)} {_words(name)}", value)
        users = {part for part, it in definition["components"].items() if name in _named_colors(it)}
        alone = users.pop() if len(users) == 1 and name not in _named_colors(definition["canvas"]) else None
        of = alone if alone in optional else None
        if len(values) > 1:
            colors.append(
                Attribute(
                    _key_of(f"{name}Color" if name != "background" else name),
                    values,
                    f"{name}Color",
                    of=None if of is None else _key_of(of),
                    told=of is None,
                )
            )
    return colors


def _still(definition: Mapping[str, Any]) -> dict[str, Any]:
    return {"animationProbability": 0} if "animation" in definition["components"] else {}


def _named_colors(element: Any) -> set[str]:
    """The colors that a definition's element and those within refer to."""
    if isinstance(element, Mapping):
        own = {element["name"]} if element.get("type") == "color" else set()
        return own.union(*map(_named_colors, element.values()))
    return set().union(*map(_named_colors, element)) if isinstance(element, list) else set()


def _words(name: str) -> str:
    """E.g. earsRound -> "ears round", long01 -> "long 1"."""
    return " ".join(re.sub(r"0*(\d+)", r" \1", re.sub(r"(?<!^)([A-Z])", r" \1", name)).lower().split())


def _key_of(name: str) -> str:
    return _words(name).replace(" ", "_")


HUES = ((15, "red"), (42, "orange"), (68, "yellow"), (160, "green"), (195, "teal"), (255, "blue"), (290, "purple"),
        (345, "pink"), (361, "red"))  # fmt: skip


def color_name(value: str) -> str:
    """Of #rrggbb, e.g. "dark blue"; colors that look much alike have one name."""
    red, green, blue = (int(value[at : at + 2], 16) / 255 for at in (1, 3, 5))
    hue, lightness, saturation = colorsys.rgb_to_hls(red, green, blue)
    if lightness > 0.95 or lightness < 0.08:
        return "white" if lightness > 0.5 else "black"
    if saturation < 0.15:
        name = "gray"
    else:
        name = next(name for most, name in HUES if hue * 360 < most)
        if name == "orange" and lightness < 0.5 and saturation < 0.7:
            return "dark brown" if lightness < 0.25 else "brown"
    return f"dark {name}" if lightness < 0.3 else f"pale {name}" if lightness > 0.8 else name


@functools.cache
def _style(name: str) -> Any:
    try:
        from dicebear import Style
    except ModuleNotFoundError as error:
        raise _missing(error) from None
    return Style(read_style(name))


@functools.cache
def drawing() -> tuple[Any, Any]:
    """(DiceBear's class of pictures, the renderer).

    Raises:
        UserError: DiceBear is not installed.
    """
    try:
        from dicebear import Avatar
        from resvg_py import svg_to_bytes
    except ModuleNotFoundError as error:
        raise _missing(error) from None
    return Avatar, svg_to_bytes


def _missing(error: ModuleNotFoundError) -> UserError:
    return UserError(f"critters are drawn by {error.name}: pip install 'grn[critters]'")
