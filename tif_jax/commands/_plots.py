"""The figures of a report."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tif_jax.runtime import files


def accuracy_cost(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Top-1 (mean, standard deviation or None) against GMAC, one point per reducer."""
    figure, axes = _figure(9, 4)
    for i, row in enumerate(rows):
        marker = "os^Dv"[i // 10 % 5]  # there are ten colours
        top1, spread = row["top1"]
        axes.errorbar(
            row["gmac"], 100 * top1, spread and 100 * spread, fmt=marker, capsize=3, label=_narrow(row["label"])
        )
    axes.set(xlabel="GMAC per image", ylabel="top-1 (%)", xlim=(0, None))
    figure.legend(loc="outside right upper", fontsize=7)
    axes.grid(alpha=0.3)
    _save(figure, path, dpi=120)


def training_curves(curves: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Training loss of each run against the fraction of its steps."""
    figure, axes = _figure(6, 4)
    drawn = {name: lines for name, lines in curves.items() if lines}
    for name, lines in drawn.items():
        steps = [line["step"] / lines[-1]["step"] for line in lines]
        axes.plot(steps, [line["loss"] for line in lines], label=_narrow(name))
    positive = all(line["loss"] > 0 for lines in drawn.values() for line in lines)
    axes.set(
        xlabel="fraction of the run's steps", ylabel="training loss (nats)", yscale="log" if positive else "linear"
    )
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    _save(figure, path, dpi=120)


def picture_page(pictures: Sequence[Mapping[str, np.ndarray]], path: Path) -> None:
    """A row per image: the image (Y, X, 3) in [0, 1], oracle impact, predicted impact, what the kept tokens show."""
    titles = ("image", "oracle impact", "prediction", "kept tokens")
    figure, grid = _figure(8, 2 * len(pictures), rows=len(pictures), columns=4)
    for axes, picture in zip(grid, pictures, strict=True):
        image, kept = picture["image"], picture["kept"]
        height, width = (size // cells for size, cells in zip(image.shape, kept.shape, strict=False))
        visible = np.kron(kept, np.ones((height, width), bool))[..., None]
        bound = np.abs(picture["impact"]).max()
        axes[0].imshow(image)
        axes[1].imshow(picture["impact"], cmap="RdBu_r", vmin=-bound, vmax=bound)
        axes[2].imshow(picture["logits"], cmap="viridis")
        axes[3].imshow(np.where(visible, image, 0.5 + 0.15 * (image - 0.5)))
        for panel in axes:
            panel.set_axis_off()
    for panel, title in zip(grid[0], titles, strict=True):
        panel.set_title(title, fontsize=10)
    _save(figure, path, dpi=100)


def _save(figure: Any, path: Path, dpi: int) -> None:
    image = io.BytesIO()
    figure.savefig(image, dpi=dpi, format="png")
    files.write(path, image.getvalue())


def _narrow(label: str) -> str:
    """Broken into lines that leave the axes some room: labels of reducers with many options are long."""
    return "\n".join(textwrap.wrap(label, 28, break_on_hyphens=False))


def _figure(width: int, height: int, rows: int = 1, columns: int = 1):
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns)
