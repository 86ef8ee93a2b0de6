"""The oracle: how much the loss of a frozen ViT changes when a patch token is masked (TIF's "delta loss").

    impact_i = L(f(x with token i masked), y) - L(f(x), y)        positive: the token helps

L is the loss of the model's task (`objective`), in nats where it is a cross-entropy, or a user's own. Everything here walks
the plain blocks: the model's reducer plays no part.

Legend: B images, N patch tokens, T = special + patch tokens, D width, K random masks, M masks of a chunk.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int, Key

from tif_jax import checked
from tif_jax.errors import InputError
from tif_jax.impact.last_block import prediction_after
from tif_jax.impact.masked import masked_predictions
from tif_jax.impact.objective import TARGETS, Batch, objective
from tif_jax.layers import true_float32, widened
from tif_jax.models import ViT
from tif_jax.reducers import Aux
from tif_jax.tasks import CLASSIFICATION
from tif_jax.tokens import image_keys

ESTIMATORS = ("exact", "gradient", "sampled")
MASKS = ("zero", "content", "drop")
_FRACTION = checked.Range(above=0, most=1, advice="it is the expected fraction of tokens in a random mask")
_MIN_GATE = 1e-3  # a gate of exactly 0 has no derivative with respect to its logarithm


class Scores(NamedTuple):
    impact: Float[Array, "B N"]  # in the unit of the loss, raster order
    prediction: Int[Array, " B"]  # the unmasked model's class; -1 of what is no classifier
    loss: Float[Array, " B"]  # the unmasked model's, with the label; NaN where there is no label


class Units(NamedTuple):
    """Those of an image's masked forward passes (`exact`) or random masks from `first` up to `stop`, of `num_units`."""

    first: int | Int[Array, ""]
    stop: int | Int[Array, ""]


def check_options(estimator: str, mask: str | None, target: str, num_samples: Any, keep_ratio: Any) -> dict[str, Any]:
    """The options with the mask resolved. Raises InputError where they are unknown or contradict each other."""
    for name, value, allowed in (("estimator", estimator, ESTIMATORS), ("target", target, TARGETS)):
        if value not in allowed:
            raise InputError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")
    mask = mask or ("zero" if estimator == "exact" else "drop")
    if mask not in MASKS:
        raise InputError(f"mask is {mask!r}; allowed: {', '.join(MASKS)}")
    if estimator != "exact" and mask != "drop":
        raise InputError(f"estimator {estimator!r} is 'drop' by definition; mask {mask!r} needs estimator 'exact'")
    if (estimator, target) == ("gradient", "teacher"):
        raise InputError(
            "estimator 'gradient' with target 'teacher' is zero everywhere (KL is at its minimum): use 'sampled'"
        )
    num_samples = checked.value_of(int, num_samples, "num_samples", checked.Range(least=1))
    keep_ratio = checked.value_of(float, keep_ratio, "keep_ratio", _FRACTION)
    return dict(estimator=estimator, mask=mask, target=target, num_samples=num_samples, keep_ratio=keep_ratio)


def num_units(options: Mapping[str, Any], num_patches: int) -> int:
    """Masked forward passes (`exact`) or forward and backward passes that each image takes."""
    return {"exact": num_patches, "gradient": 1, "sampled": options["num_samples"]}[options["estimator"]]


def shared_scores(
    model: ViT,
    images: Float[Array, "B Y X 3"],
    batch: Batch,
    units: Units | None = None,
    num_shares: int | None = 1,
    *,
    chunk: int | None = None,
    **options,
) -> Scores:
    """The Scores as far as these units of every image make them: the impacts of all units add up to the whole.

    batch: what the loss reads, each array with a row for each image. units: by default all; else a share of `num_shares`
    equal ones (`scoring.in_shares`), or where that is None as many as they are when the program runs. chunk: as for
    `token_impact`. options: those of `check_options`, seed, an array or not, and loss, if it is a user's. A float32 model is
    computed in `true_float32`.
    """
    units = Units(0, num_units(options, model.grid[0] * model.grid[1])) if units is None else units
    with true_float32(model.dtype):
        return _grouped_scores(model, images, batch, units, num_shares, chunk, options)


def _grouped_scores(model, images, batch, units, num_shares, chunk, options) -> Scores:
    num_images = images.shape[0]
    chunk = chunk or default_chunk(options["estimator"], model.task)
    # All masks of few images rather than few masks of all images: what the masks of an image share takes memory too.
    share = -(-num_units(options, model.grid[0] * model.grid[1]) // (num_shares or 1))
    group = max(n for n in range(1, num_images + 1) if num_images % n == 0 and n <= max(1, chunk // share))
    chunk = _least_padding(share, chunk // group)
    # A number of chunks that is known beforehand lets the compiler, and the host, go on without asking the device.
    number = -(-share // chunk) if num_shares else (units.stop - units.first + chunk - 1) // chunk
    score = partial(_scores, model, units=units, chunk=chunk, num_chunks=number, **options)
    if group == num_images:
        return score(images=images, batch=batch)
    arrays = jax.tree.map(lambda x: x.reshape(-1, group, *x.shape[1:]), (images, dict(batch)))
    scores = jax.lax.map(lambda xs: score(images=xs[0], batch=xs[1]), arrays)
    return jax.tree.map(lambda x: x.reshape(num_images, *x.shape[2:]), scores)


def default_chunk(estimator: str, task: str) -> int:
    """Masked images at once on a device. A CPU is fastest while what is kept for the backward pass stays in its caches."""
    if jax.default_backend() != "cpu":
        return 1024 if task == CLASSIFICATION.name else 64  # a decoder has numbers for every pixel
    return 7 if estimator == "exact" else 4


def _scores(
    model, *, images, batch, units, chunk, num_chunks, estimator, mask, target, num_samples, keep_ratio, seed, loss=None
) -> Scores:
    """chunk: of each image."""
    x = model.embed(images)
    num_patches = x.shape[1] - model.num_special
    loss, label_loss = objective(model, target, loss)
    prediction, aux = prediction_after(model, model.blocks, x, model.tokens(x.shape[0]), x[:, model.num_special :])
    batch = {**batch, "image": images, "unmasked": prediction}
    if estimator == "gradient":  # its forward pass is the clean one: where the loss does not read that, it is deleted
        gates = jnp.ones((x.shape[0], num_patches), widened(x.dtype))
        impact, (prediction, aux) = _gate_gradient(model, x, loss, batch, gates)
        impact = jnp.where(units.first < units.stop, impact, 0)
    elif estimator == "exact":
        masked, position = _exact(model, x, loss, batch, mask, (units, chunk, num_chunks)), jnp.arange(num_patches)
        clean = loss(prediction, aux, batch)[:, None]
        is_ours = (units.first <= position) & (position < units.stop)
        impact = jnp.where(is_ours, masked.astype(clean.dtype) - clean, 0)
    else:
        kept = sample_masks(image_keys(seed, images), num_samples, num_patches, keep_ratio)
        impact = _sampled(model, x, loss, batch, kept, (units, chunk, num_chunks))
    return Scores(impact, _classes(model, prediction), label_loss(prediction, aux, batch))


def _classes(model: ViT, prediction: Float[Array, "B *prediction"]) -> Int[Array, " B"]:
    if model.task != CLASSIFICATION.name:
        return jnp.full(prediction.shape[:1], -1, jnp.int32)
    return prediction.argmax(axis=-1).astype(jnp.int32)


def _exact(model, x, loss, batch, mask, chunks) -> Float[Array, "B N"]:
    """Loss with token i masked, for the i of these units, and nothing meant for others; `chunk` of them at a time folded into
    the batch axis."""
    num_patches, chunk = x.shape[1] - model.num_special, chunks[1]
    predictions = masked_predictions(model, x, mask)

    def with_chunk(first: Int[Array, ""], impact: Float[Array, "B _"]) -> Float[Array, "B _"]:
        positions = first + jnp.arange(chunk)
        found = loss(*predictions(jnp.minimum(positions, num_patches - 1)), _copies(batch, chunk))
        found = rearrange(found, "(b m) -> b m", m=chunk).astype(impact.dtype)
        return jax.lax.dynamic_update_slice_in_dim(impact, found, first, axis=1)

    # The last chunk may go beyond the last patch. In the widest type that there is: the loss may be a user's.
    nothing = jnp.zeros((x.shape[0], num_patches + chunk), jnp.result_type(float))
    return _over_chunks(with_chunk, chunks, nothing)[:, :num_patches]


def _over_chunks(with_chunk: Callable[[Int[Array, ""], Array], Array], chunks: tuple, nothing: Array) -> Array:
    """with_chunk(first unit of a chunk, what was found before), chunk after chunk. chunks: of which units, of which size, how
    many."""
    units, chunk, number = chunks
    return jax.lax.fori_loop(0, number, lambda i, found: with_chunk(units.first + i * chunk, found), nothing)


def _least_padding(num_units: int, most: int) -> int:
    """The chunk, at most `most` and more than half of it, whose multiples go least beyond num_units; the largest such."""
    most = min(most, num_units)
    return min(range(most, most // 2, -1), key=lambda chunk: -(-num_units // chunk) * chunk)


def _copies(batch: Batch, number: int) -> dict[str, Array]:
    """Every image's rows so many times in succession."""
    return jax.tree.map(partial(jnp.repeat, repeats=number, axis=0), dict(batch))


def _gate_gradient(model, x, loss, batch, gates) -> tuple[Float[Array, "B N"], tuple[Array, Aux]]:
    """-dL/dw at w = gates, and the prediction and aux there. Images do not interact: the summed loss has each image's own
    gradient."""

    def total_loss(gates):
        patches = x[:, model.num_special :]
        found = prediction_after(model, model.blocks, x, model.tokens(x.shape[0]), patches, gates)
        return loss(*found, batch).sum(), found

    gradient, found = jax.grad(total_loss, has_aux=True)(gates)
    return -gradient, found


def _sampled(model, x, loss, batch, kept, chunks) -> Float[Array, "B N"]:
    """What these units add to the mean of -dL/dw over the masks, `chunk` of them at a time folded into the batch axis."""
    num_samples, wide, (units, chunk, _) = kept.shape[1], widened(x.dtype), chunks

    def with_chunk(first: Int[Array, ""], impact: Float[Array, "B N"]) -> Float[Array, "B N"]:
        sample = first + jnp.arange(chunk)
        gates = jnp.maximum(kept[:, jnp.minimum(sample, num_samples - 1)].astype(wide), _MIN_GATE)
        copies = _copies({"x": x, **batch}, chunk)
        found, _ = _gate_gradient(model, copies.pop("x"), loss, copies, rearrange(gates, "b m n -> (b m) n"))
        counts = (sample < units.stop).astype(found.dtype)  # what fills up the last chunk has no weight
        return impact + jnp.einsum("bmn,m->bn", rearrange(found, "(b m) n -> b m n", m=chunk), counts)

    nothing = jnp.zeros((x.shape[0], kept.shape[2]), wide)
    return _over_chunks(with_chunk, chunks, nothing) / num_samples


def sample_masks(keys: Key[Array, " B"], num_samples: int, num_patches: int, keep_ratio: float) -> Bool[Array, "B K N"]:
    """Random masks for `sampled`: True with probability keep_ratio, the tokens of a mask independent of each other.

    They come in antithetic pairs, from u and 1 - u; and a token's distances from 0 or 1, min(u, 1 - u), are stratified over
    the pairs. So with an even number of masks every token is in the same number of them, up to two, at 0.5 in just half.
    """
    num_pairs = -(-num_samples // 2)

    def draw(key: Key[Array, ""]) -> Bool[Array, "K N"]:
        order, place, side = (jax.random.uniform(k, (num_pairs, num_patches)) for k in jax.random.split(key, 3))
        distance = (order.argsort(axis=0) + place) / (2 * num_pairs)
        u = jnp.where(side < 0.5, distance, 1 - distance)
        masks = jnp.stack([u, 1 - u], axis=1) < keep_ratio
        return masks.reshape(-1, num_patches)[:num_samples]

    return jax.vmap(draw)(keys)
