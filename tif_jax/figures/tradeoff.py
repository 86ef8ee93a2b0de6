"""What is left of a prediction against what it costs: by multiply-adds and by measured time, with the front of each."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tif_jax.figures.colours import CYCLE
from tif_jax.figures.plots import blank, height_for, narrow, save

_MARKERS = "os^DvPX<>*"
_RING = 11  # points


class Axis(NamedTuple):
    """What is drawn along an axis: where it is in a row, its name, from a row's number to what is drawn."""

    key: str
    label: str
    factor: float = 1.0


def tradeoff(rows: Sequence[Mapping[str, Any]], costs: Sequence[Axis], merits: Sequence[Axis], path: Path) -> None:
    """A panel for each merit (down) and cost (across): points of a reducer are joined, those on the front have a ring.

    A row: reducer, row[cost] a number, row[merit] (mean, standard error or None), row["fronts"] a set of (merit, cost).
    """
    height = max(3.6 * len(merits), height_for([row["reducer"] for row in rows]))
    figure, grid = blank(4.5 * len(costs) + 2.5, height, len(merits), len(costs))
    panels = np.asarray(grid, object).reshape(len(merits), len(costs))
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["reducer"], []).append(row)
    for merit, line in zip(merits, panels, strict=True):
        for cost, axes in zip(costs, line, strict=True):
            for i, (name, members) in enumerate(groups.items()):
                _draw(axes, name, members, i, cost, merit)
            on_front = [row for row in rows if (merit.key, cost.key) in row["fronts"]]
            onto = sorted((row[cost.key], merit.factor * row[merit.key][0]) for row in on_front)
            axes.step(*zip(*onto, strict=True), where="post", color="0.6", linewidth=1, zorder=0, label="front")
            axes.set(xlabel=cost.label, ylabel=merit.label, xlim=(0, None))
            axes.grid(alpha=0.3)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, map(narrow, labels), loc="outside right upper", fontsize=8)
    save(figure, path, dpi=120)


def _draw(axes: Any, name: str, rows: Sequence[Mapping[str, Any]], i: int, cost: Axis, merit: Axis) -> None:
    """One reducer's points, by rising cost."""
    rows = sorted(rows, key=lambda row: row[cost.key])
    x = [row[cost.key] for row in rows]
    means = [merit.factor * row[merit.key][0] for row in rows]
    errors = [merit.factor * (row[merit.key][1] or 0) for row in rows]
    colour, marker = CYCLE[i % len(CYCLE)], _MARKERS[i // len(CYCLE) % len(_MARKERS)]
    axes.errorbar(x, means, errors, fmt=f"{marker}-", color=colour, capsize=2, markersize=4, linewidth=1, label=name)
    ringed = [(a, b) for a, b, row in zip(x, means, rows, strict=True) if (merit.key, cost.key) in row["fronts"]]
    if ringed:
        axes.plot(*zip(*ringed, strict=True), "o", markersize=_RING, markerfacecolor="none", color=colour)
