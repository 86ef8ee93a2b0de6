"""What impact is the change of: a number for each image, by the model's task and the target, or a user's own.

A loss is a function (prediction, aux, batch) -> (B,). batch: what is known of the images ('label' or 'label_map'), the images
themselves ('image'), and what the network predicts of them with all tokens ('unmasked').

Legend: B images, Y X height and width in pixels, L classes.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Num

from tif_jax import dense_losses
from tif_jax.errors import InputError
from tif_jax.layers import at_least_float32, widened
from tif_jax.models import Model, ViT
from tif_jax.tasks import CLASSIFICATION, DEPTH

TARGETS = ("label", "teacher")

Batch = Mapping[str, Any]
Loss = Callable[[Array, Mapping[str, Any], Batch], Array]


class Objective(NamedTuple):
    loss: Loss  # impact is its change
    label_loss: Loss  # of the unmasked network, for the shards: with the label; NaN where there is none


def objective(model: ViT, target: str, own: Loss | None = None) -> Objective:
    """Of a model's task. own: a loss of the user's, for both."""
    if own is not None:
        checked = _per_image(own)
        return Objective(checked, checked)
    if model.task == CLASSIFICATION.name:
        return Objective(_cross_entropy if target == "label" else _divergence_from_unmasked, _known_cross_entropy)
    by_label = dense_losses.of_task(model.task, model.max_depth)
    if target == "label":
        with_label: Loss = lambda *given: by_label(*given)["loss"]  # noqa: E731
    else:
        with_label = _depth_difference if model.task == DEPTH.name else _pixel_divergence
    return Objective(with_label, partial(_known, by_label))


def described(model: ViT, target: str) -> str:
    """The loss in words, for manifests."""
    if model.task == CLASSIFICATION.name:
        return "cross-entropy, nats" if target == "label" else "KL divergence from the unmasked network, nats"
    if model.task == DEPTH.name:
        by_label = f"scale-invariant log loss of depths up to {model.max_depth:g} m, no unit"
        return by_label if target == "label" else "mean squared difference of ln depth to the unmasked network, no unit"
    by_label = "mean cross-entropy of the labelled pixels, nats"
    return by_label if target == "label" else "mean KL divergence of the pixels from the unmasked network, nats"


def divergence(goal: Float[Array, "*rest L"], logits: Float[Array, "*rest L"]) -> Float[Array, "*rest"]:
    """KL(goal || softmax(logits)) in nats: the cross-entropy where goal is one-hot."""
    return jnp.sum(jax.scipy.special.xlogy(goal, goal) - goal * jax.nn.log_softmax(logits), axis=-1)


def _cross_entropy(prediction: Float[Array, "B L"], aux: Any, batch: Batch) -> Float[Array, " B"]:
    return divergence(jax.nn.one_hot(batch["label"], prediction.shape[-1], dtype=prediction.dtype), prediction)


def _known_cross_entropy(prediction: Float[Array, "B L"], aux: Any, batch: Batch) -> Float[Array, " B"]:
    return jnp.where(batch["label"] < 0, jnp.nan, _cross_entropy(prediction, aux, batch))


def _divergence_from_unmasked(prediction: Float[Array, "B L"], aux: Any, batch: Batch) -> Float[Array, " B"]:
    return divergence(jax.nn.softmax(batch["unmasked"]), prediction)


def _known(by_label: Callable[..., Mapping[str, Array]], prediction: Array, aux: Any, batch: Batch) -> Array:
    """The loss with the label maps, NaN where a map has no pixel that counts or there is no map."""
    if "label_map" not in batch:
        return jnp.full(prediction.shape[:1], jnp.nan, prediction.dtype)
    terms = by_label(prediction, aux, batch)
    return jnp.where(terms["valid"] > 0, terms["loss"], jnp.nan)


def _depth_difference(prediction: Float[Array, "B Y X"], aux: Any, batch: Batch) -> Float[Array, " B"]:
    """Mean over all pixels of (ln d - ln d')^2, d' of the unmasked network: a relative error squared, without a unit."""
    here, there = (jnp.log(jnp.maximum(depth, dense_losses.LEAST_IN_LOG)) for depth in (prediction, batch["unmasked"]))
    return jnp.square(here - there).mean(axis=(1, 2))


def _pixel_divergence(prediction: Float[Array, "B Y X L"], aux: Any, batch: Batch) -> Float[Array, " B"]:
    return divergence(jax.nn.softmax(batch["unmasked"]), prediction).mean(axis=(1, 2))


def _per_image(loss: Loss) -> Loss:
    """The loss. Raises InputError, when it is traced, unless it gives one real number for each image."""

    def checked(prediction: Array, aux: Mapping[str, Any], batch: Batch) -> Array:
        found = loss(prediction, aux, batch)
        is_array = isinstance(found, jax.Array | np.ndarray)
        if not is_array or found.shape != prediction.shape[:1] or not jnp.issubdtype(found.dtype, jnp.floating):
            said = f"{found.dtype} of shape {found.shape}" if is_array else f"a {type(found).__name__}"
            raise InputError(
                f"the loss gives {said}; it gives a float for each image of the prediction, ({len(prediction)},) here"
            )
        return at_least_float32(jnp.asarray(found))

    return checked


def label_key(model: Model) -> str:
    """The entry of a batch that the task's own loss reads."""
    return "label" if model.task == CLASSIFICATION.name else "label_map"


def label_shape(model: Model, num_images: int) -> jax.ShapeDtypeStruct:
    """Of that entry."""
    if model.task == CLASSIFICATION.name:
        return jax.ShapeDtypeStruct((num_images,), jnp.int32)
    kind = jnp.float32 if model.task == DEPTH.name else jnp.int32
    return jax.ShapeDtypeStruct((num_images, *model.image_size), kind)


def has_label(model: ViT, labels: Num[np.ndarray, "B ..."]) -> Bool[np.ndarray, " B"]:
    """Which images have one, or a label map with a pixel that counts."""
    if model.task == CLASSIFICATION.name:
        return labels >= 0
    counts = labels >= 0
    if model.task == DEPTH.name:
        counts = np.asarray(dense_losses.valid_depth(labels, model.max_depth))
    return np.any(counts, axis=(1, 2))


def checked_batch(model: ViT, labels: Any, num_images: int, target: str, own: Loss | None) -> dict[str, Array]:
    """`labels` of `token_impact` as a batch. Raises InputError for what the loss can not be made of."""
    if own is not None:
        if target != "label":
            raise InputError(
                f"target is {target!r}, and a loss of your own says itself what it compares with: leave the target, and read "
                "batch['unmasked'] for what the network predicts with all tokens"
            )
        given = labels if isinstance(labels, Mapping) else {} if labels is None else {label_key(model): labels}
        return {name: _array_of_images(name, value, num_images) for name, value in given.items()}
    key = label_key(model)
    found = labels.get(key) if isinstance(labels, Mapping) else labels
    if found is not None:
        check = _checked_labels if key == "label" else _checked_maps
        return {key: check(model, found, num_images, -1 if target == "teacher" else 0)}
    if target == "label":
        named = f", as {key!r} of a batch" if isinstance(labels, Mapping) else ""
        raise InputError(f"target 'label' needs labels{named}; target 'teacher' does without")
    return {key: jnp.full(num_images, -1, jnp.int32)} if key == "label" else {}


def _array_of_images(name: str, value: Any, num_images: int) -> Array:
    try:
        array = value if isinstance(value, jax.Array) else np.asarray(value)
    except ValueError:  # rows of different lengths
        array = np.array(None)
    if not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool):
        raise InputError(f"labels[{name!r}] is {value!r:.60}; it is an array of numbers with a row for each image")
    if array.shape[:1] != (num_images,):
        raise InputError(
            f"labels[{name!r}] has shape {array.shape}; for {num_images} images it has as many rows ({num_images}, ...)"
        )
    return jnp.asarray(array)


def _checked_labels(model: ViT, labels: Any, num_images: int, least: int) -> Array:
    """As an array. Raises InputError unless they are one class's number for each image; -1, where allowed, is no label."""
    num_classes = model.num_classes
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


def _checked_maps(model: ViT, maps: Any, num_images: int, least: int) -> Array:
    """As an array. Raises InputError unless there is a label map of the model's task and size for each image."""
    is_depth = model.task == DEPTH.name
    kind = jnp.floating if is_depth else jnp.integer
    shape = (num_images, *model.image_size)
    array = _array_of_images("label_map", maps, num_images)
    if array.shape != shape or not jnp.issubdtype(array.dtype, kind):
        said = "metres as floats, 0: not measured" if is_depth else f"classes 0..{model.num_classes - 1}, -1: ignored"
        raise InputError(
            f"label maps are {array.dtype} of shape {array.shape}; for {num_images} images {shape}, {said}"
        )
    if isinstance(array, jax.core.Tracer) or not array.size:
        return array
    lowest, highest = array.min(), array.max()
    if is_depth and not jnp.isfinite(array).all():  # of which XLA's min and max may know nothing
        raise InputError("label maps of depth have numbers that are not finite; they are metres, 0 where not measured")
    if is_depth and lowest < 0:
        raise InputError(f"label maps of depth lie in [{lowest}, {highest}]; they are metres, 0 where not measured")
    if not is_depth and (lowest < -1 or highest >= model.num_classes):
        raise InputError(f"label maps lie in [{lowest}, {highest}]; the model has classes 0..{model.num_classes - 1}")
    return array.astype(widened(array.dtype)) if is_depth else array
