"""The one exception for what a user can mend: a key, a path, a file, a shape; and checks of values that end in it."""

import math


class UserError(Exception):
    """What is wrong and how to mend it, in one line that names the key or the path.

    Entry points print it without a stack of frames (`grn.cli`); everything else that escapes is a bug and keeps its
    traceback. Raised in a DataLoader worker it reaches the main process wrapped in the worker's traceback, of which
    only the last line is kept.
    """

    def __init__(self, message: str):
        if message.startswith("Caught ") and "Original Traceback" in message:
            message = message.strip().rsplit("\n", 1)[-1].partition(": ")[2]
        super().__init__(message)


def check_count(key: str, value: object, *, least: int = 1) -> None:
    """Raises:
    UserError: no whole number, or one below `least`.
    """
    if type(value) is not int or value < least:
        raise UserError(f"{key}={value} must be a whole number, at least {least}")


def check_number(key: str, value: object, *, least: float, most: float = math.inf) -> None:
    """Raises:
    UserError: no number, or one outside `least` to `most`.
    """
    if type(value) not in (int, float) or not least <= value <= most:
        bounds = f"of at least {least}" if most == math.inf else f"in {least} to {most}"
        raise UserError(f"{key}={value} must be a number {bounds}")
