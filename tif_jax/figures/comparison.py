"""The figures of a comparison of runs."""

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tif_jax.figures.colours import CYCLE
from tif_jax.figures.plots import accuracy_against, blank, height_for, loss_of, narrow, save
from tif_jax.tasks import Metric, Task

_STYLES = ("-", "--", ":", "-.")  # of the reducers that a run fine-tunes
_KINDS = ("backbone", "filter", "adapter", "finetune")


def outcomes(rows: Sequence[Mapping[str, Any]], key: str, label: str, path: Path, metric: Metric) -> None:
    """The metric (mean and standard deviation) against `key`: a colour for each run, a marker for each reducer."""
    figure, axes = blank(9, height_for([f"{row['run']}: {row['label']}" for row in rows]))
    runs = [*dict.fromkeys(row["run"] for row in rows)]
    reducers = [*dict.fromkeys(row["reducer"] for row in rows)]
    for row in rows:
        if row[key] is not None:
            value, spread = row[metric.key]
            axes.errorbar(
                row[key], metric.factor * value, spread and metric.factor * spread, capsize=3,
                color=_colour(runs, row["run"]),
                fmt="os^Dv<>pXP*"[reducers.index(row["reducer"]) % 11], label=narrow(f"{row['run']}: {row['label']}"),
            )  # fmt: skip
    accuracy_against(axes, label, metric)
    figure.legend(loc="outside right upper", fontsize=8)
    axes.grid(alpha=0.3)
    save(figure, path, dpi=120)


def losses(curves: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]], path: Path, task: Task) -> None:
    """Training losses by run and stage, in a panel for each kind of stage: a colour for each run."""
    kinds = [kind for kind in _KINDS if any(_kind(name) == kind for stages in curves.values() for name in stages)]
    longest = [f"{run}: {Path(name).name}" for run, stages in curves.items() for name in stages]
    figure, grid = blank(4 * max(1, len(kinds)) + 2, height_for(longest), columns=max(1, len(kinds)))
    runs = [*curves]
    for kind, axes in zip(kinds, grid if len(kinds) > 1 else [grid], strict=True):
        for at, (run, stages) in enumerate(curves.items()):
            own = {Path(name).name: lines for name, lines in stages.items() if _kind(name) == kind}
            width = 1 + 1.5 * (len(runs) - 1 - at)  # a curve that two runs share shows the colours of both
            for style, (name, lines) in zip(itertools.cycle(_STYLES), own.items(), strict=False):
                points = [(line["step"], loss) for line in lines if (loss := loss_of(name, line)) is not None]
                label = f"{run}: {name}" if kind == "finetune" else run
                axes.plot(*zip(*points, strict=True), color=_colour(runs, run), ls=style, linewidth=width, label=label)
        axes.set(title=kind, xlabel="step")
        axes.grid(alpha=0.3)
    if kinds:
        (grid[0] if len(kinds) > 1 else grid).set_ylabel(f"training {task.loss}")
    handles = {
        label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), map(narrow, handles), loc="outside right upper", fontsize=8)
    save(figure, path, dpi=120)


def _kind(folder: str) -> str:
    return re.split(r"[-/]", folder)[0]


def _colour(runs: Sequence[str], run: str) -> str:
    return CYCLE[runs.index(run) % len(CYCLE)]
