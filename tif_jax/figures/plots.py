"""The figures of a report."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tif_jax.figures.colours import CYCLE, impact_scale, logit_scale
from tif_jax.figures.maps import enlarged, map_over, tokens_over
from tif_jax.runtime import files
from tif_jax.tasks import CLASSIFICATION, Metric, Task

_MARKERS = "os^DvPX"
_LABEL = 28  # letters of a line of a legend


def accuracy_cost(
    rows: Sequence[Mapping[str, Any]],
    path: Path,
    metric: Metric = CLASSIFICATION.headline,
    cost: tuple[str, str] = ("gmac", "GMAC per image"),
) -> None:
    """The metric (mean, standard deviation or None) against the cost (its key, its name), one point per reducer: each its
    own colour and marker."""
    figure, axes = blank(9, height_for([row["label"] for row in rows]))
    for i, row in enumerate(rows):
        value, spread = row[metric.key]
        axes.errorbar(
            row[cost[0]], metric.factor * value, spread and metric.factor * spread, capsize=3, label=narrow(row["label"]),
            fmt=_MARKERS[i // len(CYCLE) % len(_MARKERS)], color=CYCLE[i % len(CYCLE)],
        )  # fmt: skip
    accuracy_against(axes, cost[1], metric)
    figure.legend(loc="outside right upper", fontsize=8)
    axes.grid(alpha=0.3)
    save(figure, path, dpi=120)


def accuracy_against(axes: Any, cost: str, metric: Metric) -> None:
    """Labels and limits of a drawing of a metric, which ends at the most that it can be, against a cost from 0 on."""
    top = axes.get_ylim()[1] if metric.most is None else min(axes.get_ylim()[1], metric.most + metric.most / 200)
    axes.set(xlabel=cost, ylabel=metric.label, xlim=(0, None), ylim=(None, top))


def training_curves(curves: Mapping[str, Sequence[Mapping[str, Any]]], path: Path, task: Task = CLASSIFICATION) -> None:
    """The loss of each run against the fraction of its steps, faint, and its running mean: one panel for each kind of loss.

    The axis is logarithmic where all losses of a panel are positive and span more than a factor of five.
    """
    from matplotlib.ticker import LogLocator

    panels: dict[str, dict[str, Sequence[Mapping[str, Any]]]] = {}
    for name, lines in curves.items():
        if lines:
            panels.setdefault(_kind_of_loss(name, task), {})[name] = lines
    width = 4.5 * max(1, len(panels)) + 3
    figure, all_axes = blank(width, height_for([*curves]), columns=max(1, len(panels)))
    number = 0
    for axes, (kind, runs) in zip(np.atleast_1d(all_axes), panels.items(), strict=False):
        losses = []
        for name, lines in runs.items():
            steps = np.array([line["step"] for line in lines])
            loss = np.array([np.nan if (value := loss_of(name, line)) is None else value for line in lines], float)
            colour, style = CYCLE[number % len(CYCLE)], ("-", "--", ":")[number // len(CYCLE) % 3]
            axes.plot(steps / steps[-1], loss, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(steps / steps[-1], _running_mean(loss), style, color=colour, label=narrow(name))
            losses.append(loss[np.isfinite(loss)])
            number += 1
        values = np.concatenate(losses)
        spans = len(values) and values.min() > 0 and values.max() > 5 * values.min()
        axes.set(xlabel="fraction of the run's steps", title=kind, yscale="log" if spans else "linear")
        axes.grid(alpha=0.3, which="both" if spans else "major")
        if spans:  # plain numbers, of which there are few
            axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
    if panels:
        figure.legend(loc="outside right upper", fontsize=8)
    save(figure, path, dpi=120)


def picture_page(pictures: Sequence[Mapping[str, Any]], path: Path, impact_unit: str = "nats") -> None:
    """A row per image: its class, its pixels, oracle impact, the filter's logits, and what it keeps; legends at the foot.

    Each is a dict: image (Y, X, 3) in [0, 1]; impact, logits and kept, one number per patch; perhaps class.
    """
    from tif_jax.figures.sheet import colour_bar, show

    of_impact = impact_scale(np.stack([picture["impact"] for picture in pictures]), impact_unit)
    of_logits = logit_scale(np.stack([picture["logits"] for picture in pictures]))
    shape = pictures[0]["image"].shape
    figure, grid = blank(8, 2 * len(pictures) * shape[0] / shape[1] + 1, rows=len(pictures), columns=4)
    grid = np.asarray(grid).reshape(len(pictures), 4)
    for i, (axes, picture) in enumerate(zip(grid, pictures, strict=True)):
        photo = np.rint(255 * picture["image"]).astype(np.uint8)
        kept = np.asarray(picture["kept"], bool)
        own = np.where(kept, np.arange(kept.size).reshape(kept.shape), -1)
        columns = {
            "image": enlarged(photo),
            "oracle impact": map_over(photo, picture["impact"], of_impact),
            "prediction": map_over(photo, picture["logits"], of_logits),
            "kept tokens": tokens_over(photo, own),
        }
        for panel, (title, drawn) in zip(axes, columns.items(), strict=True):
            show(panel, drawn, "" if i else title)
        name = str(picture.get("class", ""))
        lying = dict(rotation=0, ha="right", va="center") if len(name) <= 3 else {}
        axes[0].set_ylabel("\n".join(textwrap.wrap(name, 18)), fontsize=10, parse_math=False, **lying)
    colour_bar(figure, grid[:, 1], of_impact)
    colour_bar(figure, grid[:, 2], of_logits)
    save(figure, path, dpi=100)


def _kind_of_loss(run: str, task: Task) -> str:
    if run.startswith("adapter"):
        return f"adapter: {task.divergence}"
    return "filter: loss (nats)" if run.startswith("filter") else f"{task.name}: {task.loss}"


def loss_of(run: str, line: Mapping[str, Any]) -> float | None:
    """What is drawn of a line of a run's log: of an adapter, whose loss is a logarithm, the divergence in nats."""
    return line.get("teacher_kl", line["loss"]) if run.startswith("adapter") else line["loss"]


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Over a tenth of all values, fewer at the ends; what is no number is left out."""
    half = len(values) // 20
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return np.array([np.nanmean(w) if np.isfinite(w).any() else np.nan for w in windows])


def save(figure: Any, path: Path, dpi: int) -> None:
    from tif_jax.figures.sheet import as_png

    files.write(path, as_png(figure, dpi))


def height_for(labels: Sequence[str]) -> float:
    """Inches of a figure beside whose axes a legend of these labels has room, set in 8 points."""
    lines = sum(1 + narrow(label).count("\n") for label in labels)
    return max(4.2, 0.5 + 0.134 * lines + 0.056 * len(labels))


def narrow(label: str) -> str:
    """Broken into lines that leave the axes some room: labels of reducers with many options are long."""
    return "\n".join(textwrap.wrap(label, _LABEL, break_on_hyphens=False))


def blank(width: int | float, height: int | float, rows: int = 1, columns: int = 1):
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns)
