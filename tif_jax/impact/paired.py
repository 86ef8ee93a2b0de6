"""Models compared on the same images: each image is its own control, so that differences are known better than means.

A value per image is a pair of one model's with another's on that image. The standard error of a mean difference is then that
of the differences, s / sqrt(E), whatever the two models have in common.

Legend: E images, B images of a batch, L classes.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from tif_jax.errors import WorkError
from tif_jax.impact.judge import Batch, over_batches
from tif_jax.models import Model

Terms = Mapping[str, Float[np.ndarray, " E"]]


class Estimate(NamedTuple):
    """A mean over images, and its standard error: None with fewer than two images."""

    mean: float
    error: float | None


def divergence(whole: Float[Array, "B L"], reduced: Float[Array, "B L"]) -> Float[Array, " B"]:
    """KL(whole || reduced) of the class probabilities of two predictions, in nats, 0 or more, at least float32."""
    log_p, log_q = (jax.nn.log_softmax(x.astype(jnp.promote_types(x.dtype, jnp.float32))) for x in (whole, reduced))
    return jnp.maximum(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1), 0)


def terms(
    classes: Int[np.ndarray, " E"],
    kl: Float[np.ndarray, " E"],
    whole: Int[np.ndarray, " E"],
    labels: Int[np.ndarray, " E"],
) -> Terms:
    """A number per image: agreement (whether the class is that of the unreduced model, `whole`), kl, and top1 where there are
    labels; top1 of an image without one (-1) is NaN.
    """
    found = {"agreement": (classes == whole).astype(float), "kl": np.asarray(kl, float)}
    if (labels >= 0).any():
        found["top1"] = np.where(labels >= 0, (classes == labels).astype(float), np.nan)
    return found


def unreduced_logits(
    model: Model, batches: Iterable[Batch], mesh: Mesh
) -> tuple[Float[np.ndarray, "E L"], Int[np.ndarray, " E"]]:
    """Logits of a classifier under its own reducer for all images that can be read, and their labels."""
    return over_batches(lambda models, images, _: models[0](images)[0], [model], batches, mesh)


def beside(
    models: Sequence[Model], batches: Iterable[Batch], mesh: Mesh, whole: Float[np.ndarray, "E L"]
) -> list[tuple[Int[np.ndarray, " E"], Float[np.ndarray, " E"]]]:
    """Of each model, what `terms` takes: the class of every image, and the divergence from the logits `whole` in nats.

    batches: of as many images as `whole` has rows; they are read once for all models. Raises WorkError for what is no number.
    """

    def of_batch(models, images, rows):
        found = [model(images)[0] for model in models]
        return [(logits.argmax(axis=-1), divergence(rows["whole"], logits)) for logits in found]

    found, _ = over_batches(of_batch, models, batches, mesh, {"whole": whole})
    for model, (_, kl) in zip(models, found, strict=True):
        if not np.isfinite(kl).all():
            raise WorkError(f"the outputs of {type(model.reducer).__name__} are no numbers (NaN); take other weights")
    return found


def estimate(values: Float[np.ndarray, " E"]) -> Estimate:
    """Of values per image; images without one (NaN) are left out."""
    values = values[~np.isnan(values)]
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return Estimate(float(values.mean()), error)


def difference(values: Float[np.ndarray, " E"], others: Float[np.ndarray, " E"]) -> Estimate:
    """Mean of `values` less `others`, and the standard error over pairs."""
    return estimate(values - others)


def front(costs: Sequence[float], merits: Sequence[float]) -> list[bool]:
    """Which points no other one beats: none is at most as costly and at least as good, and better in one of the two.

    Standard errors have no part in it.
    """
    order = sorted(range(len(costs)), key=lambda i: (costs[i], -merits[i]))
    found, best, of_best = [False] * len(costs), -math.inf, math.inf
    for i in order:
        found[i] = merits[i] > best or (merits[i] == best and costs[i] == of_best)
        if merits[i] > best:
            best, of_best = merits[i], costs[i]
    return found
