"""What the frozen model makes of the best tokens of a ranking, or of its tokens under a reducer.

Batches are those of `data.loader.evaluation_batches`: 'image' (B, Y, X, 3), 'label' (B,), 'weight' (B,), 0 for padding.

Legend: B images of a batch, E images in all, N patch tokens, L classes.
"""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing, nullcontext
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from tif_jax.layers import true_float32
from tif_jax.models import Model
from tif_jax.models.model import FULL
from tif_jax.models.params import params_of, with_params
from tif_jax.models.vit import ViT
from tif_jax.runtime.mesh import replicate, shard
from tif_jax.tokens import keep

Batch = Mapping[str, Any]
Outcome = dict[str, float]  # what `outcome` returns
Name = TypeVar("Name")


def judge_rankings(
    model: ViT,
    batches: Iterable[Batch],
    mesh: Mesh,
    rankings: Mapping[str, Float[np.ndarray, "E N"]],
    keep_ratios: Sequence[float],
) -> tuple[Outcome, dict[str, dict[float, Outcome]]]:
    """The outcome of the unreduced model, and for each ranking and keep ratio that of its best tokens alone."""

    def logits(models, images, rankings):
        best = {
            (name, ratio): logits_of_best(models[0], images, ranking, ratio)
            for name, ranking in rankings.items()
            for ratio in keep_ratios
        }
        return unreduced_logits(models[0], images), best

    (unreduced, best), labels = over_batches(logits, [model], batches, mesh, rankings)
    outcomes = {
        name: {ratio: outcome(best[name, ratio], unreduced, labels) for ratio in keep_ratios} for name in rankings
    }
    return outcome(unreduced, unreduced, labels), outcomes


def judge_models(
    model: ViT, batches: Iterable[Batch], mesh: Mesh, reduced: Mapping[Name, Model]
) -> dict[Name, Outcome]:
    """The outcome of each of the reduced models; what they agree with is `model`, unreduced."""

    def logits(models, images, _):
        return unreduced_logits(models[0], images), [other(images)[0] for other in models[1:]]

    (unreduced, found), labels = over_batches(logits, [model, *reduced.values()], batches, mesh)
    return {name: outcome(own, unreduced, labels) for name, own in zip(reduced, found, strict=True)}


def over_batches(
    function: Callable[[list[Any], Array, dict[str, Array]], Any],
    models: Sequence[Model],
    batches: Iterable[Batch],
    mesh: Mesh,
    rows: Mapping[str, Float[np.ndarray, "R ..."]] | None = None,
) -> tuple[Any, Int[np.ndarray, " E"]]:
    """function(models, images, rows of the batch) for all images, and their labels. Those of weight 0 are left out.

    function: gives a tree of arrays (B, ...), in a compiled program; of each array in `rows` it gets the batch's part.
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
            arrays = shard({"image": batch["image"], **of_batch}, mesh)
            found = jax.device_get(compute(params, arrays.pop("image"), arrays))
            real = batch["weight"] > 0
            parts.append(jax.tree.map(lambda x, real=real: x[real], (found, batch["label"])))
            num_done += len(real)
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def logits_of_best(
    model: ViT, images: Float[Array, "B Y X 3"], ranking: Float[Array, "B N"], keep_ratio: float
) -> Float[Array, "B L"]:
    """Logits of the frozen model when only the round(keep_ratio * N) highest-ranked patches enter its first block."""

    def best_alone(blocks, x, tokens, rngs=None):
        x, tokens = keep(x, tokens, ranking, keep_ratio)
        return FULL(blocks, x, tokens, rngs)[0], {"source": tokens.source}

    return model.predict(*model.encode(model.embed(images), reducer=best_alone))[0]


def unreduced_logits(model: ViT, images: Float[Array, "B Y X 3"]) -> Float[Array, "B L"]:
    """Logits of the model when all patches go all the way, whatever its own reducer does."""
    return model.predict(*model.encode(model.embed(images), reducer=FULL))[0]


def outcome(
    logits: Float[np.ndarray, "E L"], unreduced: Float[np.ndarray, "E L"], labels: Int[np.ndarray, " E"]
) -> Outcome:
    """Mean cross-entropy (nats), top-1, and how often the predicted class is that of the unreduced model (fractions)."""
    cross_entropy = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
    cross_entropy = cross_entropy - logits[np.arange(len(labels)), labels]
    predicted = logits.argmax(1)
    return {
        "cross_entropy": float(cross_entropy.mean()),
        "top1": float((predicted == labels).mean()),
        "agreement": float((predicted == unreduced.argmax(1)).mean()),
    }
