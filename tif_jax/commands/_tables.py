"""Tables as text: columns are data."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


class Column(NamedTuple):
    """A column of a table whose rows are dicts, nested or not."""

    heading: str
    key: tuple[str, ...]  # where the value is in a row
    text: Callable[[Any], str] = str


def fixed(digits: int, factor: float = 1.0) -> Callable[[float], str]:
    """How a number is printed, once multiplied by the factor."""
    return lambda value: f"{factor * value:.{digits}f}"


def percent(value: tuple[float, float]) -> str:
    """Mean and standard deviation of a fraction, as in '86.10 ± 0.61'."""
    return " ± ".join(map(fixed(2, 100.0), value))


def markdown(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines."""
    head, *body = _cells(columns, rows)
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
