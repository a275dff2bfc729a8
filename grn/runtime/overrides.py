"""Free text, paths and URLs on the command line, taken as they stand.

Hydra reads `key=value` by a grammar of its own, in which commas, =, braces, brackets, quotes and letters beyond ASCII
mean something or are errors. Which keys hold text is known before it reads: their values are quoted for it here.
"""

import re
import sys
from collections.abc import Sequence

from hydra.core.override_parser.types import Quote, QuotedString

from grn.runtime.errors import UserError
from grn.runtime.ranks import place

# Keys of free text: there, a comma before a space is a comma.
TEXT = frozenset(
    (
        *("prompts", "negative_prompt", "prompt_prefix", "prompt_suffix", "context_prefix"),
        *("caption", "caption_prefix", "caption_suffix", "notes", "setup"),
    )
)
# Keys of paths, URLs and names, by their last part.
PATHS = frozenset(
    (
        *("ckpt", "ckpt_path", "out", "root", "init", "mask", "start", "erasures", "train", "val", "results"),
        *("rewritten", "host", "aspect"),
        *("path", "file", "folder"),
        *("names", "weights", "reference", "features", "pixels", "tokenizer", "cache_dir", "save_dir", "dirpath"),
        *("default_root_dir", "name", "project", "group", "entity", "id", "tags", "searchpath", "storage"),
        *("account", "partition", "qos", "constraint", "extractor", "monitor", "license", "tracking_uri"),
        *("experiment_name", "run_name", "repo"),
    )
)
# Keys of paths that a last part does not tell.
WHOLE = re.compile(
    r"paths\.\w+|suite\.(prompts|source)|(.+\.)?scorer\.\w+\.(detector|clip)|hydra\.(run|sweep)\.(dir|subdir)"
)
# Of those, what may also be a number or a mapping, e.g. source.val=1000 or data.pixels={0.25M:1,1M:3}.
MIXED = re.compile(r"source\.val|(.*\.)?(features|pixels|weights)")
# In a sweep, values by these functions are Hydra's.
FUNCTIONS = re.compile(r"(choice|range|interval|glob|shuffle|sort|tag|extend_list)\s*\(.*\)", re.DOTALL)

QUOTED = re.compile(r"""\s*(["'])((?:(?!\1|\\).|\\.)*)\1\s*""", re.DOTALL)
NUMBER = re.compile(r"[+-]?(\d[\d_]*(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
MAPPING = re.compile(r"\{[^{}]*:[^{}]*\}")
# What Hydra reads as the text that it is.
PLAIN = re.compile(r"(?!(null|true|false|inf|nan)$)([A-Za-z_/]|\.\.?/)[\w./:@-]*", re.ASCII | re.IGNORECASE)
INTERPOLATION = re.compile(r"\$\{[\w.:,/ -]+\}")


def literal(arguments: Sequence[str], *, sweep: bool = False) -> list[str]:
    """Overrides with the values of text and path keys quoted, so that Hydra takes them as they stand.

    What is quoted already stays as it is, as do null, `[a,b]` (a list) and, in a `sweep` (-m), `a,b`, of which each
    part is taken as it stands.

    Raises:
        UserError: a value that may mean two things; the line says how to write each.
    """
    return [_literal(argument, sweep=sweep) for argument in arguments]


def kind(key: str) -> str | None:
    """ "text", "path", or None of what Hydra reads; `key` as in an argument, with or without +, ++ and dots."""
    name = key.lstrip("+")
    leaf = name.rpartition(".")[2]
    if leaf in TEXT and not WHOLE.fullmatch(name):
        return "text"
    if leaf == "tokenizer" and leaf == name:  # the config group
        return None
    return "path" if leaf in PATHS or WHOLE.fullmatch(name) else None


def _literal(argument: str, *, sweep: bool) -> str:
    key, equals, value = argument.partition("=")
    of = None if key.startswith("~") or not equals else kind(key)
    if of is None or value in ("", "null") or (sweep and FUNCTIONS.fullmatch(value)):
        return argument
    if MIXED.fullmatch(key.lstrip("+")) and (NUMBER.fullmatch(value) or MAPPING.fullmatch(value)):
        return argument
    separator = r"," if of == "path" else r",(?!\s)"
    parts = _split(value, separator if sweep else None)
    return f"{key}={','.join(_value(key, part, separator, of) for part in parts)}"


def _value(key: str, value: str, separator: str, of: str) -> str:
    """A list or a scalar in Hydra's grammar."""
    if value == "null" or QUOTED.fullmatch(value) or INTERPOLATION.fullmatch(value):
        return value
    if not (value.startswith("[") and value.endswith("]")):
        return quote(value, of)
    inner = value[1:-1]
    if not inner.strip():
        return value
    if "],[" in inner:
        raise UserError(f"{key}={value} is two lists: add -m to run both, or quote a text: '{key}=[\"...\"]'")
    quoted = _quoted_list(inner)
    if quoted is not None:
        return f"[{','.join(quoted)}]"
    items = [item.strip() for item in _split(inner, separator)]
    if of == "text" and re.search(r",\s", inner) and place()[0] == 0:
        count = "one text" if len(items) == 1 else f"{len(items)} texts"
        print(
            f"{key}: {count}, in which commas before spaces are commas; to tell texts apart: "
            f'\'{key}=["one, of two","another"]\'',
            file=sys.stderr,
        )
    return f"[{','.join(item if QUOTED.fullmatch(item) else quote(item, of) for item in items)}]"


def _quoted_list(inner: str) -> list[str] | None:
    """The parts of "a","b", all quoted, spaces between them or not; None of anything else."""
    found, position = [], 0
    while match := QUOTED.match(inner, position):
        found.append(match[0].strip())
        if match.end() == len(inner):
            return found
        if inner[match.end()] != ",":
            return None
        position = match.end() + 1
    return None


def _split(value: str, separator: str | None) -> list[str]:
    """Parts between separators that stand in no brackets or braces, and in no quoted part."""
    if separator is None:
        return [value]
    parts, start, depth, position = [], 0, 0, 0
    while position < len(value):
        at_start = position == start
        quoted = QUOTED.match(value, position) if at_start else None
        if quoted and (quoted.end() == len(value) or value[quoted.end()] == ","):
            position = quoted.end()
            continue
        character = value[position]
        if character in "[{":
            depth += 1
        elif character in "]}":
            depth = max(0, depth - 1)
        elif depth == 0 and re.compile(separator).match(value, position):
            parts.append(value[start:position])
            start = position + 1
        position += 1
    return [*parts, value[start:]]


def quote(text: str, of: str) -> str:
    """A text or path, which may hold anything, in Hydra's grammar."""
    if PLAIN.fullmatch(text):
        return text
    if of == "text":  # where ${...} is text, too
        text = re.sub(r"(\\*)\$\{", lambda match: f"{match[1] * 2}\\${{", text)
    return QuotedString(text, Quote.double).with_quotes()
