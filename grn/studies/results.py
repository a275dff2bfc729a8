"""The results of a study: its points, a JSON file each; their means and standard errors, as CSV and Markdown."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from grn.runtime.errors import UserError
from grn.runtime.files import write_text


def read_points(
    folder: Path,
    by: Sequence[str],
    measured: Sequence[str],
    *,
    pattern: str = "*.json",
    order: Mapping[str, Iterable[Any]] | None = None,
) -> pd.DataFrame:
    """A row a file, sorted.

    Args:
        by: the columns to sort by, first to last.
        measured: further keys that each file must have; others are kept where there are any, NaN elsewhere.
        pattern: of the files' names.
        order: of columns in `by`, all of their values in their order; the others ascend.

    Raises:
        UserError: no such file; one that is no JSON object, lacks a key or has a value that `order` does not know.
    """
    orders = {name: list(values) for name, values in (order or {}).items()}
    rows = []
    for path in sorted(folder.glob(pattern)):
        try:
            row = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{path} is no point of a study: it holds no JSON object")
        if lacks := [name for name in (*by, *measured) if name not in row]:
            raise UserError(f"{path} is no point of this study: it lacks {', '.join(lacks)}")
        for name, values in orders.items():
            if row[name] not in values:
                raise UserError(f"{path} is no point of this study: its {name} is {row[name]}, none of {values}")
        rows.append(row)
    if not rows:
        raise UserError(f"{folder} holds no points of this study ({pattern}): measure some, or give GRN_RUNS")
    rows.sort(key=lambda row: [orders[name].index(row[name]) if name in orders else row[name] for name in by])
    return pd.DataFrame(rows)


def over_seeds(points: pd.DataFrame, by: Sequence[str], measures: Sequence[str]) -> pd.DataFrame:
    """A row for each combination of the columns `by`, in the order in which they come first.

    Returns:
        the columns `by`; `seeds`, the number of points; of each measure its mean and, as `<measure>_error`, its
        standard error (of the sample's standard deviation; NaN of one point).
    """
    groups = points.groupby(list(by), sort=False, dropna=False)[list(measures)]
    # A seed that diverged makes the row NaN, where pandas would pass over it.
    table = groups.agg(
        [("mean", lambda seeds: seeds.mean(skipna=False)), ("sem", lambda seeds: seeds.sem(skipna=False))]
    )
    table.columns = [column for name in measures for column in (name, f"{name}_error")]
    table.insert(0, "seeds", groups.size())
    return table.reset_index()


def write_csv(table: pd.DataFrame, path: Path, float_format: str | None = "%.5g") -> None:
    """Writes `table` atomically; None as `float_format` writes every digit. Lines end as RFC 4180 has it."""
    write_text(path, table.to_csv(index=False, float_format=float_format, na_rep="nan", lineterminator="\r\n"))


@dataclass(frozen=True)
class Column:
    """How a column is told in Markdown, followed by its standard error where `<name>_error` has one.

    Args:
        title: its heading; `name` if None.
        scale: what numbers are multiplied by.
        spec: their format, as of `format`.
        unit: what follows them, with its space.
    """

    name: str
    title: str | None = None
    scale: float = 1
    spec: str = ""
    unit: str = ""


def markdown(table: pd.DataFrame, columns: Sequence[Column]) -> str:
    """The table's rows as Markdown: "value ± error" where there is an error, "-" for NaN."""
    lines = ["| " + " | ".join(column.title or column.name for column in columns) + " |", "|---" * len(columns) + "|"]
    for row in table.to_dict("records"):
        lines.append("| " + " | ".join(_cell(row, column) for column in columns) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, Any], column: Column) -> str:
    value, error = row[column.name], row.get(f"{column.name}_error", math.nan)
    if isinstance(value, str):
        return value
    told = [format(number * column.scale, column.spec) for number in (value, error) if not math.isnan(number)]
    return " ± ".join(told) + column.unit if told else "-"
