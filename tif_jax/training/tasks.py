"""What tasks are judged by, in one place: the loss of each, its metrics, and which of them decides.

Legend: B images.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float

from tif_jax.errors import InputError
from tif_jax.models import Model
from tif_jax.training import dense_losses, losses
from tif_jax.training.dense_losses import MAX_DEPTH

Terms = dict[str, Float[Array, "B ..."]]
Sums = Mapping[str, Any]


class Metric(NamedTuple):
    """A number that tables have a column for."""

    key: str  # in metrics.json
    name: str  # for readers
    unit: str  # that it is printed in: '%', 'm', or '' where it has none
    digits: int  # behind the point
    factor: float = 1.0  # from metrics.json to that unit
    most: float | None = None  # what it can not exceed, in that unit
    higher_is_better: bool = True

    @property
    def heading(self) -> str:
        """Of a column."""
        return f"{self.name} {self.unit}".rstrip()

    @property
    def label(self) -> str:
        """Of an axis."""
        return f"{self.name} ({self.unit})" if self.unit else self.name

    def merit(self, value: float) -> float:
        """The value, negative where lower is better: the largest merit is the best."""
        return value if self.higher_is_better else -value


@dataclasses.dataclass(frozen=True)
class Task:
    """How models of a task are trained and judged.

    terms: numbers of each image, (B, ...), that evaluation sums; where there is `valid`, an image of which that is 0 counts
    for nothing. measured: the entries of metrics.json from these sums and the number of images that count. headline: what
    rows are drawn and `best` is chosen by; others: what tables show beside it. hub_tag: what hubs call the task.
    """

    name: str
    loss: losses.Loss
    terms: Callable[..., Terms]  # of (prediction, aux, batch)
    measured: Callable[[Sums, float], dict[str, float]]
    headline: Metric
    others: tuple[Metric, ...]
    hub_tag: str


def _segmentation_terms(prediction: Array, aux: Mapping[str, Any], batch: Mapping[str, Any]) -> Terms:
    terms = dense_losses.segmentation(prediction, aux, batch)
    return terms | dense_losses.class_counts(prediction, batch["label_map"])


def _means(sums: Sums, images: int | float) -> dict[str, float]:
    return {name: float(total / images) for name, total in sums.items()}


def _of_counts(sums: Sums, images: int | float) -> dict[str, float]:
    """Mean loss of an image; pixel accuracy and mIoU of all pixels together."""
    return {
        "loss": float(sums["loss"] / images),
        "pixel_accuracy": float(np.sum(sums["intersection"]) / np.sum(sums["labelled"])),
        "miou": dense_losses.mean_iou(sums["intersection"], sums["union"]),
    }


_PERCENT: dict[str, Any] = dict(unit="%", digits=2, factor=100.0, most=100.0)
_OF_DELTA: dict[str, Any] = dict(unit="", digits=3, most=1.0)

CLASSIFICATION = Task(
    name="classification",
    loss=losses.classification,
    terms=losses.classification,
    measured=_means,
    headline=Metric("top1", "top-1", **_PERCENT),
    others=(Metric("top1_among_classes", "among classes", **_PERCENT),),  # where the data have fewer than the model
    hub_tag="image-classification",
)
DEPTH = Task(
    name="depth",
    loss=dense_losses.depth,
    terms=dense_losses.depth,
    measured=_means,
    headline=Metric("rmse", "RMSE", "m", 3, higher_is_better=False),
    others=(
        Metric("abs_rel", "AbsRel", "", 3, higher_is_better=False),
        Metric("delta1", "delta1", **_OF_DELTA),
    ),
    hub_tag="depth-estimation",
)
SEGMENTATION = Task(
    name="segmentation",
    loss=dense_losses.segmentation,
    terms=_segmentation_terms,
    measured=_of_counts,
    headline=Metric("miou", "mIoU", **_PERCENT),
    others=(Metric("pixel_accuracy", "pixel accuracy", **_PERCENT),),
    hub_tag="image-segmentation",
)
TASKS = {task.name: task for task in (CLASSIFICATION, DEPTH, SEGMENTATION)}


def of_task(name: str, *, max_depth: float = MAX_DEPTH, eigen_crop: bool = False) -> Task:
    """The task of a name. max_depth, metres, and eigen_crop: which pixels count where the task is depth.

    Raises InputError for another name.
    """
    if name not in TASKS:
        raise InputError(f"the task is {name!r}; it is one of {', '.join(TASKS)}")
    task = TASKS[name]
    if task is not DEPTH:
        return task
    loss = partial(dense_losses.depth, cap=max_depth)
    return dataclasses.replace(task, loss=loss, terms=partial(loss, eigen_crop=eigen_crop))


def of_model(model: Model, eigen_crop: bool = False) -> Task:
    """The task of a model, with the depth that it can say at most."""
    name = getattr(model, "task", CLASSIFICATION.name)
    return of_task(name, max_depth=getattr(model, "max_depth", MAX_DEPTH), eigen_crop=eigen_crop)


def of_metrics(metrics: Mapping[str, Any]) -> Task:
    """The task that entries of metrics.json are of. Those of classification do not name theirs."""
    return of_task(metrics.get("task", CLASSIFICATION.name))
