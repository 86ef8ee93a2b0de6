"""How models of each task are trained and measured: the loss, and what evaluation sums over images.

Legend: B images.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from tif_jax import dense_losses, tasks
from tif_jax.dense_losses import MAX_DEPTH
from tif_jax.models import Model
from tif_jax.training import losses

Terms = dict[str, Float[Array, "B ..."]]
Sums = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Judged:
    """task: which metrics there are, and which of them decides.

    terms: numbers of each image, (B, ...), that evaluation sums; where there is `valid`, an image of which that is 0 counts
    for nothing. measured: entries of metrics.json from these sums and the number of images that count.
    """

    task: tasks.Task
    loss: losses.Loss
    divergence: losses.Loss  # from a teacher's prediction of the same images, without labels
    terms: Callable[..., Terms]  # of (prediction, aux, batch)
    measured: Callable[[Sums, float | int], dict[str, float]]

    @property
    def headline(self) -> tasks.Metric:
        return self.task.headline


def of_task(name: str, *, max_depth: float = MAX_DEPTH, eigen_crop: bool = False) -> Judged:
    """The loss of a task, and how it is evaluated. Of depth: pixels farther than max_depth metres do not count; with
    eigen_crop, nor do those at the edges when it is evaluated.

    Raises InputError for a name that is no task.
    """
    task = tasks.of_name(name)
    if task is tasks.CLASSIFICATION:
        return Judged(task, losses.classification, losses.divergence, losses.classification, _means)
    loss = dense_losses.of_task(name, max_depth)
    if task is tasks.DEPTH:
        return Judged(task, loss, dense_losses.depth_divergence, partial(loss, eigen_crop=eigen_crop), _means)
    return Judged(task, loss, dense_losses.segmentation_divergence, _segmentation_terms, _of_counts)


def of_model(model: Model, eigen_crop: bool = False) -> Judged:
    """Of a model's task, up to the depth that it can say at most."""
    return of_task(model.task, max_depth=getattr(model, "max_depth", MAX_DEPTH), eigen_crop=eigen_crop)


def _segmentation_terms(prediction: Array, aux: Mapping[str, Any], batch: Mapping[str, Any]) -> Terms:
    terms = dense_losses.segmentation(prediction, aux, batch)
    return terms | dense_losses.class_counts(prediction, batch["label_map"])


def _means(sums: Sums, images: float | int) -> dict[str, float]:
    return {name: float(total / images) for name, total in sums.items()}


def _of_counts(sums: Sums, images: float | int) -> dict[str, float]:
    """Mean loss of an image; pixel accuracy and mIoU of all pixels together."""
    return {
        "loss": float(sums["loss"] / images),
        "pixel_accuracy": float(np.sum(sums["intersection"]) / np.sum(sums["labelled"])),
        "miou": dense_losses.mean_iou(sums["intersection"], sums["union"]),
    }
