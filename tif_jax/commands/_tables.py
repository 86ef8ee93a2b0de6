"""Tables as text: columns are data."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


class Column(NamedTuple):
    """A column of a table whose rows are dicts, nested or not."""

    heading: str
    key: tuple[str, ...]  # where the value is in a row
    text: Callable[[Any], str] = str


def fixed(digits: int, factor: float = 1.0) -> Callable[[float | None], str]:
    """How a number is printed, once multiplied by the factor; '-' if there is none."""
    return lambda value: "-" if value is None or math.isnan(value) else f"{factor * value:.{digits}f}"


def spread(digits: int, factor: float = 1.0) -> Callable[[tuple[float, float | None]], str]:
    """How mean and standard deviation, if it is known, are printed, as in '86.10 ± 0.61'."""
    return lambda value: " ± ".join(fixed(digits, factor)(number) for number in value if number is not None)


percent = spread(2, 100.0)  # of a fraction


def markdown(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines. A bar in a cell, as in a command line or a path, is escaped: it would begin another cell."""
    head, *body = ([cell.replace("|", "\\|") for cell in row] for row in _cells(columns, rows))
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]


def aligned(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines for a terminal: the first column begins, the others end below each other."""
    cells = _cells(columns, rows)
    first, *widths = (max(map(len, column)) for column in zip(*cells, strict=True))
    return [
        "  ".join([row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], widths, strict=True))])
        for row in cells
    ]


def _cells(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    return [[column.heading for column in columns], *([c.text(_value(row, c.key)) for c in columns] for row in rows)]


def _value(row: Any, key: tuple[str, ...]) -> Any:
    for part in key:
        row = row[part]
    return row
