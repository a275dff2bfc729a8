"""Tables on stdout."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

WIDEST = 100_000  # columns


def show(table: "Table") -> None:
    """Prints it as wide as the terminal; without one (a pipe, a log), or COLUMNS, as wide as it is, so that paths in
    its title and cells stay in one piece: rich would break them at 80 columns.
    """
    from rich.console import Console

    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(width=WIDEST)
        table.min_width = console.measure(str(table.title or "")).maximum
    console.print(table)
