"""What the plots of studies have in common."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes


def error_bars(
    axis: Axes, table: pd.DataFrame, x: str, y: str, by: str, styles: Mapping[Any, str], **keywords: Any
) -> None:
    """Column `y` over column `x`, a line for each value of the column `by` that has a style (of matplotlib, "o-C0").

    Bars are `<y>_error`, standard errors over seeds. The table's order is that of the points; lines are called as their
    values are, unless `label` is among the keywords.
    """
    for value, style in styles.items():
        rows = table[table[by] == value]
        axis.errorbar(rows[x], rows[y], rows[f"{y}_error"], fmt=style, capsize=2, **{"label": value} | keywords)


def log_x(axis: Axes, ticks: Sequence[float]) -> None:
    """A logarithmic axis of x with these ticks alone."""
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
