"""Losses: per-example numbers, of which 'loss' is the one we descend. Training and evaluation share them.

Legend: B images, N patch tokens, L classes.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from tif_jax.errors import InputError
from tif_jax.impact.labels import keep_labels
from tif_jax.layers import widened
from tif_jax.tokens import take

Loss = Callable[[Float[Array, "B L"], Mapping[str, Array], Mapping[str, Any]], dict[str, Float[Array, " B"]]]

_WITHOUT_TOKENS = "distil with tokens_weight=0 (finetune.distillation.tokens_weight of a config)"


def classification(prediction, aux, batch, *, label_smoothing: float = 0.0) -> dict[str, Float[Array, " B"]]:
    """Cross-entropy with batch['label'] in nats, and whether the top class is right.

    Of mixed images (`mixing.mix`) the target is both labels, each with its weight. Where there are aux['logits/...'], the
    loss is the mean over these instead; every aux['loss/...'] is added. A label that is no class makes the loss NaN.
    """
    num_classes = prediction.shape[-1]
    target, beyond = jax.nn.one_hot(batch["label"], num_classes), _nan_beyond(batch["label"], num_classes)
    if "other_label" in batch:
        weight = batch["label_weight"][:, None]
        target = weight * target + (1 - weight) * jax.nn.one_hot(batch["other_label"], num_classes)
        beyond = beyond + _nan_beyond(batch["other_label"], num_classes)
    target = optax.smooth_labels(target, label_smoothing)
    # A model with several heads predicts with some of them, or their mean, but is trained through each.
    heads = [v for k, v in aux.items() if k.startswith("logits/")] or [prediction]
    loss = sum(optax.softmax_cross_entropy(logits, target) for logits in heads) / len(heads)
    loss = loss + sum(v for k, v in aux.items() if k.startswith("loss/")) + beyond
    return {"loss": loss, "top1": (prediction.argmax(-1) == batch["label"]).astype(jnp.float32)}


def _nan_beyond(label: Int[Array | np.ndarray, " B"], num_classes: int) -> Float[Array, " B"]:
    """NaN for what is no class, else 0: jax.nn.one_hot makes zeros of it, whose loss is 0, as if all were learned."""
    return jnp.where((label >= 0) & (label < num_classes), 0.0, jnp.nan)


def distillation(
    prediction, aux, batch, *, base: Loss = classification, logits_weight: float = 0.5, tokens_weight: float = 0.5
) -> dict[str, Float[Array, " B"]]:
    """The base loss and what a teacher would have said (DynamicViT, section 3.3): needs a step with a `teacher`.

    Adds logits_weight * KL(teacher || student) of the class distributions, in nats, and tokens_weight * the mean squared
    difference between the patch tokens left and the teacher's in the same places; with 0 tokens are not compared.
    """
    terms = base(prediction, aux, batch)
    terms["teacher_kl"] = _teacher_kl(prediction, batch)
    loss = terms["loss"] + logits_weight * terms["teacher_kl"]
    if tokens_weight:
        if "teacher/tokens" not in batch or "tokens" not in aux:
            raise InputError(f"only the tokens of ViTs can be compared; {_WITHOUT_TOKENS}")
        terms["teacher_mse"] = _token_difference(aux, batch["teacher/tokens"])
        loss = loss + tokens_weight * terms["teacher_mse"]
    return {**terms, "loss": loss}


def hard_distillation(
    prediction, aux, batch, *, base: Loss = classification, weight: float = 0.5
) -> dict[str, Float[Array, " B"]]:
    """(1 - weight) * the base loss + weight * cross-entropy, in nats, with the teacher's top class (Touvron et al. 2021).

    Distillation heads, where there are any, learn from the teacher and the other heads from the labels; every
    aux['loss/...'] is added. Needs a step with a `teacher`.
    """
    taught_heads = {k: v for k, v in aux.items() if k.startswith("logits/") and k.endswith("distillation")}
    extra = sum(v for k, v in aux.items() if k.startswith("loss/"))
    rest = {k: v for k, v in aux.items() if k not in taught_heads and not k.startswith("loss/")}
    terms, said = base(prediction, rest, batch), batch["teacher/logits"].argmax(axis=-1)
    taught = sum(
        optax.softmax_cross_entropy_with_integer_labels(logits, said)
        for logits in taught_heads.values() or [prediction]
    ) / max(1, len(taught_heads))
    return {**terms, "loss": (1 - weight) * terms["loss"] + weight * taught + extra, "teacher_cross_entropy": taught}


def _teacher_kl(prediction: Float[Array | np.ndarray, "B L"], batch: Mapping[str, Any]) -> Float[Array, " B"]:
    """KL(teacher || student) of the class distributions in nats."""
    taught, said = (jax.nn.log_softmax(logits, axis=-1) for logits in (batch["teacher/logits"], prediction))
    return jnp.sum(jnp.exp(taught) * (taught - said), axis=-1)


def _token_difference(aux: Mapping[str, Any], taught: Float[Array, "B N D"]) -> Float[Array, " B"]:
    """Mean over the patch tokens left, and over channels, of the squared difference to the teacher's; 0 if none is left."""
    tokens = aux["tokens"]
    if tokens.shape[1] != taught.shape[1]:
        kept = aux.get("kept")
        if kept is None or kept.shape[1] != tokens.shape[1]:
            raise InputError(
                f"{tokens.shape[1]} patch tokens come out, not all of them patches of the teacher's "
                f"{taught.shape[1]}: this reducer makes tokens of several patches; {_WITHOUT_TOKENS}"
            )
        taught = take(jnp.asarray(taught), kept)
    if tokens.shape[2] != taught.shape[2]:
        raise InputError(
            f"the teacher's tokens have width {taught.shape[2]}, the student's {tokens.shape[2]}; {_WITHOUT_TOKENS}"
        )
    wide = widened(tokens.dtype)
    difference = jnp.mean((tokens.astype(wide) - taught.astype(wide)) ** 2, axis=2)
    # The mask says where to compare; that comparing less lowers the loss must not teach the reducer to drop.
    left = jax.lax.stop_gradient(aux["mask"]) if "mask" in aux else jnp.ones(difference.shape, wide)
    total = left.sum(axis=1)
    return (difference * left).sum(axis=1) / jnp.where(total > 0, total, 1)


def impact(
    prediction, aux, batch, *, rho: float | str = 0.0, keep_ratio: float = 0.5, positive_weight: float = 1.0
) -> dict[str, Float[Array, " B"]]:
    """Sigmoid cross-entropy in nats between aux['filter_logits'] and the label "worth keeping" of batch['impact'].

    It must not read `prediction`: only so can the compiler delete the blocks from the filter's training step.
    rho, keep_ratio: see `keep_labels`. positive_weight multiplies the loss of the tokens worth keeping.
    """
    logits = aux["filter_logits"]
    labels = keep_labels(batch["impact"], rho, keep_ratio).astype(logits.dtype)
    loss = optax.sigmoid_binary_cross_entropy(logits, labels) * jnp.where(labels > 0, positive_weight, 1.0)
    return {
        "loss": loss.mean(axis=1),
        "accuracy": ((logits > 0) == (labels > 0)).mean(axis=1),
        "positives": labels.mean(axis=1),  # class balance
    }


def selector(prediction, aux, batch) -> dict[str, Float[Array, " B"]]:
    """ToSA's selectors against the attention maps they are to predict, in nats: see `Tosa`, fitting.

    Like `impact`, it must not read `prediction`.
    """
    return {"loss": aux["loss/selector"]}


def divergence(prediction, aux, batch) -> dict[str, Float[Array, " B"]]:
    """log(0.1 + KL(teacher || student)) of the class distributions, KL in nats; needs a step with a `teacher`.

    With the logarithm, the few images far from their teacher do not dominate the loss.
    """
    kl = _teacher_kl(prediction, batch)
    agreement = (prediction.argmax(axis=-1) == batch["teacher/logits"].argmax(axis=-1)).astype(jnp.float32)
    return {"loss": jnp.log(0.1 + kl), "teacher_kl": kl, "agreement": agreement}
