"""The oracle: how much the loss of a frozen ViT changes when a patch token is masked (TIF's "delta loss").

    impact_i = L(f(x with token i masked), y) - L(f(x), y)        nats; positive: the token helps

Everything here walks the plain blocks: the model's reducer plays no part.

Legend: B images, N patch tokens, T = special + patch tokens, D width, L classes, M masks of a chunk.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from tif_jax.errors import InputError
from tif_jax.masked import masked_logits
from tif_jax.models.vit import ViT
from tif_jax.tokens import gates_to_log_weight, image_keys

ESTIMATORS = ("exact", "gradient", "sampled")
MASKS = ("zero", "content", "drop")
TARGETS = ("label", "teacher")
_MIN_GATE = 1e-3  # a gate of exactly 0 has no derivative with respect to its logarithm


class Scores(NamedTuple):
    impact: Float[Array, "B N"]  # nats, raster order
    prediction: Int[Array, " B"]  # the unmasked model's class
    loss: Float[Array, " B"]  # the unmasked model's cross-entropy with the label, nats; NaN where there is no label


def token_impact(
    model: ViT,
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
                  every attention layer (and the token's share under mean pooling): `drop` to first order.
      'sampled'   mean of -dL/dw at w = max(m, 1e-3) over num_samples random masks m ~ Bernoulli(keep_ratio)^N: what a
                  token is worth among half-empty neighbours. The masks depend on `seed` and the image alone.
    mask (exact): 'zero' (default: the token's input to the first block becomes 0), 'content' (only its position
      embedding remains), 'drop' (the token is absent). The other estimators are 'drop' by definition.
    target: 'label' (cross-entropy with `labels`), 'teacher' (KL divergence from the unmasked model's own prediction).
    chunk (exact): masked copies of each image that run at once; bounds memory.

    Raises InputError for unknown or contradictory options and for labels outside the model's classes.
    """
    num_classes = model.head.out_features
    if target == "label":
        if labels is None:
            raise InputError("target 'label' needs labels; target 'teacher' does without")
        labels = jnp.asarray(labels)
        if not isinstance(labels, jax.core.Tracer) and ((labels < 0) | (labels >= num_classes)).any():
            raise InputError(
                f"labels lie in [{labels.min()}, {labels.max()}]; the model has classes 0..{num_classes - 1}"
            )
    elif labels is None:
        labels = jnp.full(images.shape[0], -1, jnp.int32)
    options = check_options(estimator, mask, target, num_samples, keep_ratio) | {"seed": seed, "chunk": chunk}
    graphdef, params = nnx.split(model)
    return _run(graphdef, tuple(options.items()), None, params, images, labels).impact


def scorer(model: ViT, mesh: Mesh, *, seed: int = 0, chunk: int | None = None, **options):
    """The batch job's function (images, labels) -> Scores: images spread over the mesh, devices never communicate.

    The number of images must be a multiple of the number of devices. options: as for `token_impact`.
    """
    graphdef, params = nnx.split(model)
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    options = check_options(**options) | {"seed": seed, "chunk": chunk}
    return partial(_run, graphdef, tuple(options.items()), mesh, params)


def check_options(estimator: str, mask: str | None, target: str, num_samples: int, keep_ratio: float) -> dict:
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
    if num_samples < 1:
        raise InputError(f"num_samples is {num_samples}; at least 1")
    if not 0 < keep_ratio <= 1:
        raise InputError(
            f"keep_ratio is {keep_ratio}; it is the expected fraction of tokens in a random mask, in (0, 1]"
        )
    return dict(estimator=estimator, mask=mask, target=target, num_samples=num_samples, keep_ratio=keep_ratio)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _run(graphdef, options, mesh, params, images, labels):
    def score(params, images, labels):
        return _score(nnx.merge(graphdef, params), images, labels, **dict(options))

    if mesh is not None:
        data = PartitionSpec("data")
        score = jax.shard_map(score, mesh=mesh, in_specs=(PartitionSpec(), data, data), out_specs=data, check_vma=False)
    return score(params, images, labels)


def _score(model, images, labels, *, estimator, mask, target, num_samples, keep_ratio, seed, chunk) -> Scores:
    x = model.embed(images)
    logits = _forward(model, x)
    onehot = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    goal = onehot if target == "label" else jax.nn.softmax(logits)
    if estimator == "exact":
        impact = _exact(model, x, goal, mask, chunk) - _divergence(goal, logits)[:, None]
    elif estimator == "gradient":
        impact = _gate_gradient(model, x, goal, jnp.ones((x.shape[0], x.shape[1] - model.num_special), logits.dtype))
    else:
        impact = _sampled(model, x, goal, image_keys(seed, images), num_samples, keep_ratio)
    loss = jnp.where(labels < 0, jnp.nan, _divergence(onehot, logits))
    return Scores(impact, logits.argmax(axis=-1).astype(jnp.int32), loss)


def _forward(model, x, gates=None) -> Float[Array, "B L"]:
    log_weight = None if gates is None else gates_to_log_weight(gates, model.num_special)
    for block in model.blocks:
        x, _ = block(x, log_weight)
    return model.predict(x, {}, gates)[0]


def _divergence(goal: Float[Array, "B L"], logits: Float[Array, "B L"]) -> Float[Array, " B"]:
    """KL(goal || softmax(logits)) in nats: the cross-entropy where goal is one-hot."""
    return jnp.sum(jax.scipy.special.xlogy(goal, goal) - goal * jax.nn.log_softmax(logits), axis=-1)


def _exact(model, x, goal, mask, chunk) -> Float[Array, "B N"]:
    """Loss with token i masked, for every i, `chunk` masks at a time folded into the batch axis."""
    num_images, num_patches = x.shape[0], x.shape[1] - model.num_special
    chunk = min(chunk or _default_chunk(num_images), num_patches)
    logits = masked_logits(model, x, mask)

    def losses(positions: Int[Array, " M"]) -> Float[Array, "B M"]:
        loss = _divergence(jnp.repeat(goal, chunk, axis=0), logits(positions))
        return rearrange(loss, "(b m) -> b m", m=chunk)

    # The last chunk is filled up with the last position; what that computes is cut off below.
    num_chunks = -(-num_patches // chunk)
    positions = jnp.minimum(jnp.arange(num_chunks * chunk), num_patches - 1).reshape(num_chunks, chunk)
    return rearrange(jax.lax.map(losses, positions), "c b m -> b (c m)")[:, :num_patches]


def _default_chunk(num_images: int) -> int:
    rows = 16 if jax.default_backend() == "cpu" else 1024  # on CPU larger batches fall out of the cache
    return max(1, rows // num_images)


def _gate_gradient(model, x, goal, gates) -> Float[Array, "B N"]:
    """-dL/dw at w = gates: images do not interact, so the gradient of the summed loss is each image's own."""
    return -jax.grad(lambda w: _divergence(goal, _forward(model, x, w)).sum())(gates)


def _sampled(model, x, goal, keys, num_samples, keep_ratio) -> Float[Array, "B N"]:
    num_patches = x.shape[1] - model.num_special

    def sample(k: Int[Array, ""]) -> Float[Array, "B N"]:
        draw = partial(jax.random.bernoulli, p=keep_ratio, shape=(num_patches,))
        kept = jax.vmap(lambda key: draw(jax.random.fold_in(key, k)))(keys)
        return _gate_gradient(model, x, goal, jnp.maximum(kept.astype(goal.dtype), _MIN_GATE))

    return jax.lax.map(sample, jnp.arange(num_samples)).mean(axis=0)
