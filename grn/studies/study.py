"""A study of experiments/: points that are measured once each, by a command that can be stopped."""

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from grn.runtime.failures import MISTAKES, explain

T = TypeVar("T", bound=tuple)


def folder_of(study: str) -> Path:
    """Where a study keeps its points, beside the runs."""
    return Path(os.environ.get("GRN_RUNS", "runs")) / study


def missing(points: Iterable[T], path_of: Callable[..., Path]) -> Iterator[tuple[T, Path]]:
    """Those points whose file is not there when their turn comes, since other processes may measure some meanwhile.

    Args:
        points: a tuple each.
        path_of: (what is in a point's tuple) -> its file.

    Yields:
        (the point, the file that it is to be written to).
    """
    for point in points:
        if not (path := path_of(*point)).exists():
            yield point, path


def run_study(main: Callable[[], object]) -> None:
    """Calls `main`, its log on stderr; what a user can mend ends it with one line there and exit status 1."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main()
    except MISTAKES as error:
        sys.exit(f"error: {explain(error)}")
