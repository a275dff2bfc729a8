"""The one exception for what a user can mend: a key, a path, a file, a shape; and checks of values that end in it."""

import math
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeGuard


class UserError(Exception):
    """What is wrong and how to mend it, in one line that names the key or the path.

    Entry points print it without a stack of frames (`grn.cli.entry`); all else that escapes is a bug and keeps its
    traceback. Raised in a DataLoader worker it reaches the main process wrapped in the worker's traceback, of which
    only the last line is kept.
    """

    def __init__(self, message: str):
        if message.startswith("Caught ") and "Original Traceback" in message:
            message = message.strip().rsplit("\n", 1)[-1].partition(": ")[2]
        super().__init__("; ".join(line.strip() for line in message.splitlines() if line.strip()))


def check_count(key: str, value: object, *, least: int = 1, most: int | None = None) -> None:
    """Raises:
    UserError: no whole number, or one outside `least` to `most`.
    """
    if type(value) is not int or value < least or (most is not None and value > most):
        bounds = f"at least {least}" if most is None else f"{least} to {most}"
        raise UserError(f"{key}={value} must be a whole number, {bounds}")


def check_number(key: str, value: object, *, least: float, most: float = math.inf) -> None:
    """Raises:
    UserError: no finite number, or one outside `least` to `most`.
    """
    if not _is_plain(value) or not least <= value <= most or value == math.inf:
        bounds = f"of at least {least}" if most == math.inf else f"in {least} to {most}"
        raise UserError(f"{key}={value} must be a number {bounds}")


def check_kinds(settings: Any, key: str, *, most: int) -> None:
    """Of a dataclass of settings.

    Args:
        key: where the config has it.
        most: of whole numbers.

    Raises:
        UserError: a value that is not of its default's kind, or not finite.
    """
    for setting in fields(settings):
        value, default = getattr(settings, setting.name), setting.default
        place = f"{key}.{setting.name}"
        if isinstance(default, int):
            check(type(value) is int and value <= most, place, f"a whole number, at most {most}", value)
        elif isinstance(default, float):
            check(_is_number(value), place, "a finite number", value)
        elif isinstance(default, tuple):
            pair = isinstance(value, Sequence) and len(value) == len(default) and all(map(_is_number, value))
            check(pair, place, "two numbers, [low, high]", value)


def _is_number(value: object) -> bool:
    return _is_plain(value) and abs(value) <= sys.float_info.max


def _is_plain(value: object) -> TypeGuard[int | float]:
    return type(value) in (int, float)


def check(holds: bool, key: str, needed: str, value: object) -> None:
    """Raises:
    UserError: it does not hold; the line says what is `needed`.
    """
    if not holds:
        raise UserError(f"{key} must be {needed}, got {value}")
