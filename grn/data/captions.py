"""The captions that text refiners are trained on: drawn, shortened, worded and dropped."""

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass

from grn.data.samples import read_captions, read_metadata

_FIELD = re.compile(r"\{(\w+)\}")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[\u3002\uff01\uff1f])\s*")  # and CJK full stops


@dataclass(frozen=True)
class Captions:
    """Raw webdataset sample -> one of its captions.

    Args:
        weights: names of captions (`read_captions`), and how often each is drawn, in proportion, of those there are.
        dropout: share of captions that are replaced by the empty one, prefix and suffix included.
        sentence_dropout: share of captions that keep only their first sentences, each number of them as likely.
        prefix, suffix: what stands before and behind, as it is, e.g. a task's tag; of the suffix, `{name}` is the text
            of that name in `key.json`, nothing where there is none.
    """

    weights: tuple[tuple[str, float], ...]
    dropout: float = 0.0
    sentence_dropout: float = 0.0
    prefix: str = ""
    suffix: str = ""

    def draw(self, raw: Mapping[str, object], draws: random.Random) -> tuple[str, str]:
        """(name, caption) of one of a sample's captions; the caption is empty where it is dropped.

        Raises:
            Skip: the sample has none of them.
        """
        weights = dict(self.weights)
        found = read_captions(raw, list(weights))
        name = draws.choices(list(found), [weights[name] for name in found])[0]
        if draws.random() < self.dropout:
            return name, ""
        caption = found[name]
        if self.sentence_dropout and draws.random() < self.sentence_dropout:
            caption = first_sentences(caption, draws)
        return name, self.worded(raw, caption)

    def worded(self, raw: Mapping[str, object], caption: str) -> str:
        """A caption with what stands around it."""
        suffix = self.suffix
        if _FIELD.search(suffix):
            metadata = read_metadata(raw)
            told = {name: value for name, value in metadata.items() if isinstance(value, str)}
            suffix = _FIELD.sub(lambda field: told.get(field[1], "").strip(), suffix).rstrip()
            suffix = suffix.encode(errors="replace").decode()  # JSON's "\\ud800" is no text
        return f"{self.prefix}{caption}{suffix}"


def caption_draws(seed: int, pass_number: int, key: object) -> random.Random:
    """What a sample's caption is drawn by in a pass over the data, and what else the text refiner's data draw."""
    return random.Random(f"caption/{seed}/{pass_number}/{key}")


def first_sentences(caption: str, draws: random.Random) -> str:
    """As many of its first sentences as are drawn, at least one."""
    ends = [match.start() for match in _SENTENCE_END.finditer(caption)] + [len(caption)]
    ends = [end for end in dict.fromkeys(ends) if caption[:end].strip()]
    return caption[: draws.choice(ends)]
