"""What the frozen model makes of the best tokens of a ranking, or of its tokens under a reducer.

Batches are those of `data.loader.evaluation_batches`: 'image' (B, Y, X, 3), 'label' (B,), 'weight' (B,), 0 for padding; of
dense tasks also 'label_map' (B, Y, X).

Legend: B images of a batch, E images in all, N patch tokens, K kept ones, L classes, Y X height and width in pixels.
"""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing, nullcontext
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Num

from tif_jax import dense_losses
from tif_jax.layers import true_float32
from tif_jax.models import Model
from tif_jax.models.model import FULL
from tif_jax.models.params import params_of, with_params
from tif_jax.models.vit import ViT
from tif_jax.runtime.mesh import replicate, shard
from tif_jax.tasks import CLASSIFICATION, DEPTH, SEGMENTATION, Metric
from tif_jax.tokens import keep_rows, num_kept, top_k

Batch = Mapping[str, Any]
_MAPS = "label_map"  # in a batch
_VALID = "valid"
Outcome = dict[str, float]  # by the keys of a task's OUTCOMES
Name = TypeVar("Name")

# What there is to say of a ranking, by task. The last is by how much the prediction is still that of the unreduced model.
OUTCOMES: dict[str, tuple[Metric, ...]] = {
    CLASSIFICATION.name: (
        Metric("cross_entropy", "cross-entropy", "nats", 3, higher_is_better=False),
        Metric("top1", "top-1", "", 3),
        Metric("agreement", "agreement with the unreduced model", "", 3),
    ),
    DEPTH.name: (
        DEPTH.headline,
        Metric("difference", "RMS difference to the unreduced model", "m", 3, higher_is_better=False),
    ),
    SEGMENTATION.name: (
        Metric("cross_entropy", "cross-entropy", "nats", 3, higher_is_better=False),
        Metric("pixel_accuracy", "pixel accuracy", "", 3),
        Metric("agreement", "agreement of pixels with the unreduced model", "", 3),
    ),
}


def judge_rankings(
    model: ViT,
    batches: Iterable[Batch],
    mesh: Mesh,
    rankings: Mapping[str, Float[np.ndarray, "E N"]],
    keep_ratios: Sequence[float],
    eigen_crop: bool = False,
) -> tuple[Outcome, dict[str, dict[float, Outcome]]]:
    """The outcome of the unreduced model, and for each ranking and keep ratio that of its best tokens alone.

    eigen_crop: depth is compared in `dense_losses.eigen_mask` alone.
    """

    def terms(models, images, rows):
        whole = unreduced(models[0], images)
        best = {
            (name, ratio): best_alone(models[0], images, rows[name], ratio)
            for name in rankings
            for ratio in keep_ratios
        }
        return jax.tree.map(partial(_terms, models[0], whole, rows.get(_MAPS), eigen_crop=eigen_crop), (whole, best))

    (whole, best), labels = over_batches(terms, [model], batches, mesh, rankings)
    outcomes = {name: {ratio: _outcome(best[name, ratio], whole, labels) for ratio in keep_ratios} for name in rankings}
    return _outcome(whole, whole, labels), outcomes


def judge_models(
    model: ViT, batches: Iterable[Batch], mesh: Mesh, reduced: Mapping[Name, Model]
) -> dict[Name, Outcome]:
    """The outcome of each of the reduced models; what they agree with is `model`, unreduced."""

    def terms(models, images, rows):
        whole = unreduced(models[0], images)
        found = [other(images)[0] for other in models[1:]]
        return jax.tree.map(partial(_terms, models[0], whole, rows.get(_MAPS)), (whole, found))

    (whole, found), labels = over_batches(terms, [model, *reduced.values()], batches, mesh)
    return {name: _outcome(own, whole, labels) for name, own in zip(reduced, found, strict=True)}


def over_batches(
    function: Callable[[list[Any], Array, dict[str, Array]], Any],
    models: Sequence[Model],
    batches: Iterable[Batch],
    mesh: Mesh,
    rows: Mapping[str, Float[np.ndarray, "R ..."]] | None = None,
) -> tuple[Any, Int[np.ndarray, " E"]]:
    """function(models, images, rows of the batch) for all images, and their labels. Those of weight 0 are left out.

    function: gives a tree of arrays (B, ...), in a compiled program; of each array in `rows` it gets the batch's part, and
    the batch's label maps, if it has some, as 'label_map'.
    rows: a row for each image in the batches, also for one that can not be read.
    """
    graphdefs = [nnx.split(model)[0] for model in models]
    params = [replicate(params_of(model), mesh) for model in models]

    @jax.jit
    def compute(params, images, rows):
        with true_float32(models[0].dtype):
            return function([with_params(*pair) for pair in zip(graphdefs, params, strict=True)], images, rows)

    parts, num_done = [], 0
    with closing(batches) if isinstance(batches, Generator) else nullcontext():
        for batch in batches:
            index = num_done + np.arange(len(batch["label"]))
            of_batch = {name: array[np.minimum(index, len(array) - 1)] for name, array in (rows or {}).items()}
            of_batch |= {_MAPS: batch[_MAPS]} if _MAPS in batch else {}
            arrays = shard({"image": batch["image"], **of_batch}, mesh)
            found = jax.device_get(compute(params, arrays.pop("image"), arrays))
            real = batch["weight"] > 0
            parts.append(jax.tree.map(lambda x, real=real: x[real], (found, batch["label"])))
            num_done += len(real)
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def best_alone(
    model: ViT, images: Float[Array, "B Y X 3"], ranking: Float[Array, "B N"], keep_ratio: float
) -> Float[Array, "B *prediction"]:
    """What the frozen model predicts when only the round(keep_ratio * N) highest-ranked patches enter its first block."""
    return alone(model, images, top_k(ranking, num_kept(keep_ratio, ranking.shape[1])))


def alone(model: ViT, images: Float[Array, "B Y X 3"], kept: Int[Array, "B K"]) -> Float[Array, "B *prediction"]:
    """What the frozen model predicts where only the patches in these places, ascending, enter its first block."""

    def walk(blocks, x, tokens, rngs=None):
        x, tokens = keep_rows(x, tokens, kept)
        return FULL(blocks, x, tokens, rngs)[0], {"source": tokens.source}

    return model.predict(*model.encode(model.embed(images), blocks=model.blocks_of_prediction, reducer=walk))[0]


def unreduced(model: ViT, images: Float[Array, "B Y X 3"]) -> Float[Array, "B *prediction"]:
    """What the model predicts when all patches go all the way, whatever its own reducer does."""
    return model.predict(*model.encode(model.embed(images), blocks=model.blocks_of_prediction, reducer=FULL))[0]


def _terms(
    model: ViT,
    whole: Float[Array, "B *prediction"],
    maps: Num[Array, "B Y X"] | None,
    prediction: Float[Array, "B *prediction"],
    *,
    eigen_crop: bool = False,
) -> Any:
    """What outcomes are made of. Of pixels that is made in the program, where they are: a number per image for each entry of
    OUTCOMES, and the share of its pixels that count. Of a classifier the logits.
    """
    if model.task == CLASSIFICATION.name:
        return prediction
    batch = {_MAPS: maps}
    if model.task == DEPTH.name:
        found = dense_losses.depth(prediction, {}, batch, cap=model.max_depth, eigen_crop=eigen_crop)
        difference = jnp.sqrt(jnp.square(prediction - whole).mean(axis=(1, 2)))
        return {"rmse": found["rmse"], "difference": difference, _VALID: found["valid"]}
    found = dense_losses.segmentation(prediction, {}, batch)
    same = prediction.argmax(axis=-1) == whole.argmax(axis=-1)
    return {
        "cross_entropy": found["loss"],
        "pixel_accuracy": found["pixel_accuracy"],
        "agreement": same.mean(axis=(1, 2), dtype=jnp.float32),
        _VALID: found["valid"],
    }


def _outcome(found: Any, whole: Any, labels: Int[np.ndarray, " E"]) -> Outcome:
    if isinstance(found, Mapping):  # images in which no pixel counts are left out, as in evaluation
        counts = found[_VALID] > 0
        return {name: float(values[counts].mean()) for name, values in found.items() if name != _VALID}
    return outcome(found, whole, labels)


def outcome(
    logits: Float[np.ndarray, "E L"], unreduced: Float[np.ndarray, "E L"], labels: Int[np.ndarray, " E"]
) -> Outcome:
    """Of a classifier: mean cross-entropy (nats), top-1, and how often the class is that of the unreduced one (fractions)."""
    cross_entropy = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
    cross_entropy = cross_entropy - logits[np.arange(len(labels)), labels]
    predicted = logits.argmax(1)
    return {
        "cross_entropy": float(cross_entropy.mean()),
        "top1": float((predicted == labels).mean()),
        "agreement": float((predicted == unreduced.argmax(1)).mean()),
    }
