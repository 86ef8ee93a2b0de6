"""Losses and metrics of dense tasks: a number per image, from a prediction and a label map of the same size.

Beside its terms each loss returns `valid`, the fraction of the image's pixels that count. All terms of an image without a
valid pixel are 0, the loss's gradient too; a mean over images leaves it out by `valid`.

Legend: B images, Y X height and width in pixels, L classes.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from tif_jax.data.label_maps import IGNORED
from tif_jax.layers import widened
from tif_jax.tasks import DEPTH

MAX_DEPTH = 10.0  # metres: the usual cap of NYU Depth V2

_NEAREST = 1e-3  # metres: metrics take nothing for nearer
LEAST_IN_LOG = 1e-6  # metres: keeps the loss finite, and its gradient alive far below _NEAREST
_EIGEN_FRAME = (480, 640)
_EIGEN_ROWS, _EIGEN_COLUMNS = (45, 471), (41, 601)
_MULTIPLIER, _VARIANCE_WEIGHT = 10.0, 0.85

Truth = Float[Array | np.ndarray, "B Y X"]
Valid = Bool[Array | np.ndarray, "B Y X"]


def depth(
    prediction: Float[Array | np.ndarray, "B Y X"],
    aux: Mapping[str, Any],
    batch: Mapping[str, Any],
    *,
    cap: float = MAX_DEPTH,
    eigen_crop: bool = False,
) -> dict[str, Float[Array, " B"]]:
    """`scale_invariant_log` of batch['label_map'] (metres, 0: not measured) plus every aux['loss/...'], and `depth_metrics`.

    Pixels farther than `cap` metres do not count; eigen_crop: nor do those at the edges (`eigen_mask`).
    """
    truth = batch["label_map"]
    valid = valid_depth(truth, cap)
    if eigen_crop:
        valid = valid & eigen_mask(truth.shape[1:])[None]
    loss = scale_invariant_log(prediction, truth, valid) + _of_aux(aux)
    metrics = depth_metrics(prediction, truth, valid, cap)
    return {"loss": loss, **metrics, "valid": valid.mean(axis=(1, 2), dtype=jnp.float32)}


def of_task(name: str, max_depth: float) -> Callable[..., dict[str, Float[Array, " B"]]]:
    """What a model of a dense task is trained by: `depth`, up to max_depth metres, or `segmentation`."""
    return partial(depth, cap=max_depth) if name == DEPTH.name else segmentation


def valid_depth(truth: Truth, cap: float) -> Bool[Array, "B Y X"]:
    """Where depth was measured and is at most `cap` metres."""
    truth = jnp.asarray(truth)
    return (truth > 0) & (truth <= cap)


def eigen_mask(size: tuple[int, int]) -> Bool[np.ndarray, "Y X"]:
    """The part of a frame of NYU Depth V2 that depth is compared in (Eigen et al. 2014): rows 45 to 470 of 480, columns 41
    to 600 of 640.

    A view of another size is taken for the whole frame: the pixels count whose centres lie in that part.
    """

    def inside(number: int, of: int, bounds: tuple[int, int]) -> Bool[np.ndarray, " n"]:
        centres = (np.arange(number) + 0.5) * of / number
        return (bounds[0] <= centres) & (centres < bounds[1])

    rows, columns = map(inside, size, _EIGEN_FRAME, (_EIGEN_ROWS, _EIGEN_COLUMNS))
    return rows[:, None] & columns


def scale_invariant_log(
    prediction: Float[Array | np.ndarray, "B Y X"],
    truth: Truth,
    valid: Valid,
    *,
    multiplier: float = _MULTIPLIER,
    variance_weight: float = _VARIANCE_WEIGHT,
) -> Float[Array, " B"]:
    """multiplier * sqrt(mean(g^2) - variance_weight * mean(g)^2), g = log prediction - log truth, both in metres.

    Eigen et al. 2014, equation 4, with the root, multiplier and weight of BTS (Lee et al. 2019, equation 3) and AdaBins.
    The means are over the valid pixels of an image; BTS's are over those of a batch. Where g is 0 the gradient is 0.
    """
    g = _log_ratio(prediction, truth, valid, LEAST_IN_LOG)
    mean = _mean(g, valid)
    # The same as in the equation, but as a sum of squares, so that rounding makes nothing negative.
    spread = _mean((g - mean[:, None, None]) ** 2, valid) + (1 - variance_weight) * mean**2
    return multiplier * _root(spread)


def depth_metrics(
    prediction: Float[Array | np.ndarray, "B Y X"], truth: Truth, valid: Valid, cap: float
) -> dict[str, Float[Array, " B"]]:
    """The usual errors over the valid pixels of each image; the prediction d is brought into [1 mm, cap] first, truth t is
    not.

    abs_rel: mean |d - t| / t. rmse: root of the mean (d - t)^2, metres. log10: mean |log10 d - log10 t|. silog: 100 *
    sqrt(mean g^2 - (mean g)^2), g = ln d - ln t, as KITTI's benchmark has it. delta1, delta2, delta3: the fraction of
    pixels with max(d / t, t / d) below 1.25, 1.25^2, 1.25^3. Equations: Eigen et al. 2014, section 4.
    """
    prediction = jnp.clip(_widened(prediction), _NEAREST, cap)
    safe = jnp.where(valid, truth, 1.0)
    difference, g = prediction - safe, _log_ratio(prediction, truth, valid, _NEAREST)
    ratio = jnp.maximum(prediction / safe, safe / prediction)
    centred = g - _mean(g, valid)[:, None, None]
    within = {f"delta{k}": _mean(ratio < 1.25**k, valid) for k in (1, 2, 3)}
    return {
        "abs_rel": _mean(jnp.abs(difference) / safe, valid),
        "rmse": _root(_mean(difference**2, valid)),
        "log10": _mean(jnp.abs(g), valid) / np.log(10),
        "silog": 100 * _root(_mean(centred**2, valid)),
        **within,
    }


def segmentation(
    prediction: Float[Array | np.ndarray, "B Y X L"], aux: Mapping[str, Any], batch: Mapping[str, Any]
) -> dict[str, Float[Array, " B"]]:
    """Mean cross-entropy of the pixels with batch['label_map'] (a class; -1: ignored) in nats, and how many are right.

    Every aux['loss/...'] is added. A label that is neither a class nor -1 makes the image's loss NaN. pixel_accuracy is the
    fraction of an image's valid pixels whose top class is right.
    """
    labels, num_classes = batch["label_map"], prediction.shape[-1]
    valid = labels != IGNORED
    each = optax.softmax_cross_entropy_with_integer_labels(_widened(prediction), jnp.clip(labels, 0, num_classes - 1))
    beyond = valid & ((labels < 0) | (labels >= num_classes))
    loss = _mean(each, valid) + jnp.where(beyond.any(axis=(1, 2)), jnp.nan, 0.0)
    return {
        "loss": loss + _of_aux(aux),
        "pixel_accuracy": _mean(prediction.argmax(axis=-1) == labels, valid),
        "valid": valid.mean(axis=(1, 2), dtype=jnp.float32),
    }


def depth_divergence(prediction, aux, batch) -> dict[str, Float[Array, " B"]]:
    """Root mean squared difference of ln depth from the teacher's; needs a step with a `teacher`."""
    taught = batch["teacher/logits"]
    everywhere = jnp.ones(taught.shape, bool)
    return {"loss": _root(_mean(_log_ratio(prediction, taught, everywhere, _NEAREST) ** 2, everywhere))}


def segmentation_divergence(prediction, aux, batch) -> dict[str, Float[Array, " B"]]:
    """log(0.1 + KL(teacher || student)), KL the mean over pixels in nats (`losses.divergence`); needs a `teacher`."""
    taught, said = (jax.nn.log_softmax(logits, axis=-1) for logits in (batch["teacher/logits"], prediction))
    kl = jnp.sum(jnp.exp(taught) * (taught - said), axis=-1).mean(axis=(1, 2))
    return {"loss": jnp.log(0.1 + kl), "teacher_kl": kl}


def class_counts(
    prediction: Float[Array | np.ndarray, "B Y X L"], labels: Int[Array | np.ndarray, "B Y X"]
) -> dict[str, Float[Array, "B L"]]:
    """Pixels per class: those `labelled`, and `intersection` and `union` of these and those predicted; none ignored."""
    num_classes = prediction.shape[-1]
    labelled = jax.nn.one_hot(labels, num_classes, dtype=bool)  # of -1 nothing
    predicted = jax.nn.one_hot(
        jnp.where(labels != IGNORED, prediction.argmax(axis=-1), IGNORED), num_classes, dtype=bool
    )

    def count(where: Bool[Array, "B Y X L"]) -> Float[Array, "B L"]:
        return where.sum(axis=(1, 2), dtype=jnp.float32)  # exact up to 2^24 pixels

    return {
        "labelled": count(labelled),
        "intersection": count(labelled & predicted),
        "union": count(labelled | predicted),
    }


def mean_iou(intersection: Float[np.ndarray, " L"], union: Float[np.ndarray, " L"]) -> float:
    """The mean of intersection / union over classes, of counts summed over a data set.

    Classes that were neither labelled nor predicted anywhere are left out; NaN if that leaves none.
    """
    there = union > 0
    return float(np.mean(intersection[there] / union[there])) if there.any() else float("nan")


def _of_aux(aux: Mapping[str, Any]) -> Any:
    return sum(value for name, value in aux.items() if name.startswith("loss/"))


def _log_ratio(
    prediction: Float[Array | np.ndarray, "B Y X"], truth: Truth, valid: Valid, least: float
) -> Float[Array, "B Y X"]:
    """ln prediction - ln truth where it is valid, else 0."""
    # `where` before the logarithm, too: behind it alone, the gradient of what is not valid would be NaN.
    ratio = jnp.maximum(_widened(prediction), least) / jnp.where(valid, truth, 1.0)
    return jnp.log(jnp.where(valid, ratio, 1.0))


def _mean(values: Array, valid: Valid) -> Float[Array, " B"]:
    """Over the valid pixels of each image; 0 where there are none."""
    number = valid.sum(axis=(1, 2))
    total = jnp.where(valid, _widened(values), 0).sum(axis=(1, 2))
    return total / jnp.maximum(number, 1).astype(total.dtype)


def _root(square: Float[Array, " B"]) -> Float[Array, " B"]:
    """Its gradient is 0 at 0, where that of sqrt is infinite."""
    zero = square <= 0  # of NaN it is not
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, square)))


def _widened(values: Array | np.ndarray) -> Array:
    """In float32 at least."""
    return jnp.asarray(values, widened(values.dtype))
