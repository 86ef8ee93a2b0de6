"""The oracle: how much the loss of a frozen ViT changes when a patch token is masked (TIF's "delta loss").

    impact_i = L(f(x with token i masked), y) - L(f(x), y)        nats; positive: the token helps

Everything here walks the plain blocks: the model's reducer plays no part.

Legend: B images, N patch tokens, T = special + patch tokens, D width, L classes, K random masks, M masks of a chunk.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from tif_jax import checked
from tif_jax.errors import InputError
from tif_jax.impact.last_block import logits_after
from tif_jax.impact.masked import masked_logits
from tif_jax.layers import true_float32, widened
from tif_jax.models import Model, ViT, check_images, check_seed, plain_vit, require_head
from tif_jax.tokens import image_keys

ESTIMATORS = ("exact", "gradient", "sampled")
MASKS = ("zero", "content", "drop")
TARGETS = ("label", "teacher")
_FRACTION = checked.Range(above=0, most=1, advice="it is the expected fraction of tokens in a random mask")
_MIN_GATE = 1e-3  # a gate of exactly 0 has no derivative with respect to its logarithm


class Scores(NamedTuple):
    impact: Float[Array, "B N"]  # nats, raster order
    prediction: Int[Array, " B"]  # the unmasked model's class
    loss: Float[Array, " B"]  # the unmasked model's cross-entropy with the label, nats; NaN where there is no label


def token_impact(
    model: Model,
    images: Float[Array | np.ndarray, "B Y X 3"],
    labels: Int[Array | np.ndarray, " B"] | None = None,
    *,
    estimator: str = "exact",
    mask: str | None = None,
    target: str = "label",
    num_samples: int = 16,
    keep_ratio: float = 0.5,
    seed: int = 0,
    chunk: int | None = None,
) -> Float[Array, "B N"]:
    """Impact of every patch token in nats, raster order, float32; positive: the token helps.

    estimator:
      'exact'     N masked forwards minus the clean one.
      'gradient'  -dL/dw at w = 1, one backward pass, where the gate w_i in [0, 1] multiplies exp(logit to key i) in
                  every attention layer (also of attention pooling; and the token's share in a mean): `drop` to first order.
      'sampled'   mean of -dL/dw at w = max(m, 1e-3) over num_samples random masks m ~ Bernoulli(keep_ratio)^N: what a
                  token is worth among half-empty neighbours. The masks depend on `seed` and the image alone.
    mask (exact): 'zero' (default: the token's input to the first block becomes 0), 'content' (only its position
      embedding remains), 'drop' (the token is absent). The other estimators are 'drop' by definition.
    target: 'label' (cross-entropy with `labels`), 'teacher' (KL divergence from the unmasked model's own prediction).
    chunk: masked images (image x mask) that run at once: bounds memory. Default: 7 on a CPU, with a backward pass 4,
      else 1024; `scoring.Scorer` fits it to the device's memory.

    Raises InputError for unknown or contradictory options, for what are no normalised images or no labels of the model's
    classes, and for a LeViT.
    """
    model = plain_vit(model, "impact")
    require_head(model, "impact, a difference of losses,")
    options = check_options(estimator, mask, target, num_samples, keep_ratio)
    options["seed"] = check_seed(seed)
    options["chunk"] = checked.value_of(int | None, chunk, "chunk", checked.Range(least=1))
    check_images(model, images)
    num_images, num_classes = len(images), model.num_classes
    if target == "label" and labels is None:
        raise InputError("target 'label' needs labels; target 'teacher' does without")
    if labels is None:
        labels = jnp.full(num_images, -1, jnp.int32)
    else:
        labels = _checked_labels(labels, num_images, num_classes, least=0 if target == "label" else -1)
    graphdef, params = nnx.split(model)
    return _jitted(graphdef, tuple(options.items()), params, images, labels).impact


def _checked_labels(labels: Any, num_images: int, num_classes: int, least: int) -> Int[Array, " B"]:
    """As an array. Raises InputError unless they are one class's number for each image; -1, where allowed, is no label."""
    try:
        labels = jnp.asarray(labels)
    except (TypeError, ValueError):
        raise InputError(f"labels are {labels!r:.60}; they are an array of whole numbers") from None
    if labels.shape != (num_images,) or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise InputError(
            f"labels are {labels.dtype} of shape {labels.shape}; for {num_images} images they are as many whole numbers, "
            f"0..{num_classes - 1}"
        )
    if not isinstance(labels, jax.core.Tracer) and num_images and (labels.min() < least or labels.max() >= num_classes):
        raise InputError(f"labels lie in [{labels.min()}, {labels.max()}]; the model has classes 0..{num_classes - 1}")
    return labels


@partial(jax.jit, static_argnums=(0, 1))
def _jitted(graphdef, options, params, images, labels) -> Scores:
    model = nnx.merge(graphdef, params)
    scores = shared_scores(model, images, labels, **dict(options))
    return scores._replace(impact=scores.impact[:, : model.grid[0] * model.grid[1]])


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
    labels: Int[Array, " B"],
    share: int | Int[Array, ""] = 0,
    num_shares: int = 1,
    *,
    chunk: int | None = None,
    **options,
) -> Scores:
    """The Scores as far as one of num_shares workers on the same images makes them; see `whole_impact`.

    chunk: as for `token_impact`. options: those of `check_options` and seed. A float32 model is computed in `true_float32`.
    """
    with true_float32(model.dtype):
        return _grouped_scores(model, images, labels, share, num_shares, chunk, options)


def _grouped_scores(model, images, labels, share, num_shares, chunk, options) -> Scores:
    num_images = images.shape[0]
    chunk = chunk or default_chunk(options["estimator"])
    # All masks of few images rather than few masks of all images: what the masks of an image share takes memory too.
    units = -(-num_units(options, model.grid[0] * model.grid[1]) // num_shares)
    group = max(n for n in range(1, num_images + 1) if num_images % n == 0 and n <= max(1, chunk // units))
    score = partial(_scores, model, share=share, num_shares=num_shares, chunk=chunk // group, **options)
    if group == num_images:
        return score(images=images, labels=labels)
    arrays = jax.tree.map(lambda x: x.reshape(-1, group, *x.shape[1:]), (images, labels))
    scores = jax.lax.map(lambda xs: score(images=xs[0], labels=xs[1]), arrays)
    return jax.tree.map(lambda x: x.reshape(num_images, *x.shape[2:]), scores)


def default_chunk(estimator: str) -> int:
    """Masked images at once on a device. A CPU is fastest while what is kept for the backward pass stays in its caches."""
    if jax.default_backend() != "cpu":
        return 1024
    return 7 if estimator == "exact" else 4


def whole_impact(shares: Float[Array | np.ndarray, "B S _"], estimator: str, num_patches: int):
    """(B, N) from the impacts of all shares: `exact` divides the tokens among them, the others their random masks."""
    if estimator == "exact":
        return rearrange(shares, "b s n -> b (s n)")[:, :num_patches]
    return shares.sum(axis=1)


def _scores(
    model, *, images, labels, share, num_shares, chunk, estimator, mask, target, num_samples, keep_ratio, seed
) -> Scores:
    """chunk: of each image."""
    x = model.embed(images)
    num_patches = x.shape[1] - model.num_special
    onehot = jax.nn.one_hot(labels, model.num_classes, dtype=widened(x.dtype))

    def goal(logits: Float[Array, "B L"]) -> Float[Array, "B L"]:
        return onehot if target == "label" else jax.nn.softmax(logits)

    if estimator == "gradient":  # its forward pass is the clean one
        gates = jnp.ones((x.shape[0], num_patches), onehot.dtype)
        impact, logits = _gate_gradient(model, x, goal(onehot), gates)
        impact = jnp.where(share == 0, impact, 0)
    else:
        logits = logits_after(model, model.blocks, x, model.tokens(x.shape[0]))
        if estimator == "exact":
            impact = _exact(model, x, goal(logits), mask, share, num_shares, chunk)
            impact = impact - _divergence(goal(logits), logits)[:, None]
        else:
            kept = sample_masks(image_keys(seed, images), num_samples, num_patches, keep_ratio)
            impact = _sampled(model, x, goal(logits), kept, share, num_shares, chunk)
    loss = jnp.where(labels < 0, jnp.nan, _divergence(onehot, logits))
    return Scores(impact, logits.argmax(axis=-1).astype(jnp.int32), loss)


def _divergence(goal: Float[Array, "B L"], logits: Float[Array, "B L"]) -> Float[Array, " B"]:
    """KL(goal || softmax(logits)) in nats: the cross-entropy where goal is one-hot."""
    return jnp.sum(jax.scipy.special.xlogy(goal, goal) - goal * jax.nn.log_softmax(logits), axis=-1)


def _exact(model, x, goal, mask, share, num_shares, chunk) -> Float[Array, "B n"]:
    """Loss with token i masked, for a share of the i, `chunk` of them at a time folded into the batch axis."""
    num_patches = x.shape[1] - model.num_special
    logits = masked_logits(model, x, mask)

    def losses(positions: Int[Array, " M"]) -> Float[Array, "B M"]:
        loss = _divergence(jnp.repeat(goal, positions.size, axis=0), logits(positions))
        return rearrange(loss, "(b m) -> b m", m=positions.size)

    # Shares and chunks are filled up with the last position; what that computes is cut off again.
    size = -(-num_patches // num_shares)
    chunk = _least_padding(size, chunk)
    positions = share * size + jnp.arange(-(-size // chunk) * chunk)
    positions = jnp.minimum(positions, num_patches - 1).reshape(-1, chunk)
    return rearrange(jax.lax.map(losses, positions), "c b m -> b (c m)")[:, :size]


def _least_padding(num_units: int, most: int) -> int:
    """The chunk, at most `most` and more than half of it, whose multiples go least beyond num_units; the largest such."""
    most = min(most, num_units)
    return min(range(most, most // 2, -1), key=lambda chunk: -(-num_units // chunk) * chunk)


def _gate_gradient(model, x, goal, gates) -> tuple[Float[Array, "B N"], Float[Array, "B L"]]:
    """-dL/dw at w = gates, and the logits there. Images do not interact: the summed loss has each image's own gradient."""

    def total_loss(gates):
        logits = logits_after(model, model.blocks, x, model.tokens(x.shape[0]), gates)
        return _divergence(goal, logits).sum(), logits

    gradient, logits = jax.grad(total_loss, has_aux=True)(gates)
    return -gradient, logits


def _sampled(model, x, goal, kept, share, num_shares, chunk) -> Float[Array, "B N"]:
    """A share of the mean of -dL/dw over the masks, `chunk` of them at a time folded into the batch axis."""
    num_samples = kept.shape[1]
    size = -(-num_samples // num_shares)
    chunk = _least_padding(size, chunk)
    sample = (share * size + jnp.arange(-(-size // chunk) * chunk)).reshape(-1, chunk)
    last = jnp.minimum((share + 1) * size, num_samples)  # what fills up shares and chunks has no weight

    def impacts(sample: Int[Array, " M"]) -> Float[Array, "B N"]:
        gates = jnp.maximum(kept[:, jnp.minimum(sample, num_samples - 1)].astype(goal.dtype), _MIN_GATE)
        copies = partial(jnp.repeat, repeats=chunk, axis=0)
        impact, _ = _gate_gradient(model, copies(x), copies(goal), rearrange(gates, "b m n -> (b m) n"))
        return jnp.einsum(
            "bmn,m->bn", rearrange(impact, "(b m) n -> b m n", m=chunk), (sample < last).astype(impact.dtype)
        )

    return jax.lax.map(impacts, sample).sum(axis=0) / num_samples


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
