"""Losses: per-example numbers, of which 'loss' is the one we descend. Training and evaluation share them.

Legend: B images, N patch tokens, L classes.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from tif_jax.tokens import num_kept

Loss = Callable[[Float[Array, "B L"], Mapping[str, Array], Mapping[str, Any]], dict[str, Float[Array, " B"]]]


def classification(prediction, aux, batch, *, label_smoothing: float = 0.0) -> dict[str, Float[Array, " B"]]:
    """Cross-entropy with batch['label'] in nats, and whether the top class is right.

    Every aux['logits/...'] is scored likewise and the mean over all heads taken; every aux['loss/...'] is added.
    """
    num_classes = prediction.shape[-1]
    target = optax.smooth_labels(jax.nn.one_hot(batch["label"], num_classes), label_smoothing)
    # A model with several heads predicts with their mean but is trained through each.
    heads = [v for k, v in aux.items() if k.startswith("logits/")] or [prediction]
    loss = sum(optax.softmax_cross_entropy(logits, target) for logits in heads) / len(heads)
    loss = loss + sum(v for k, v in aux.items() if k.startswith("loss/"))
    return {"loss": loss, "top1": (prediction.argmax(-1) == batch["label"]).astype(jnp.float32)}


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


def keep_labels(
    impact: Float[Array | np.ndarray, "B N"], rho: float | str = 0.0, keep_ratio: float = 0.5
) -> Bool[Array, "B N"]:
    """Which tokens are worth keeping: impact above rho nats, or with rho 'top' each image's keep_ratio * N highest."""
    impact = jnp.asarray(impact)
    if isinstance(rho, str):
        assert rho == "top"
        rank = jnp.argsort(jnp.argsort(-impact, axis=1), axis=1)
        return rank < num_kept(keep_ratio, impact.shape[1])
    return impact > rho


def position_prior(labels: Bool[Array, "B N"]) -> Float[Array, " N"]:
    """Logit of the mean label of each raster position over a training set: the best filter that never looks."""
    # One imaginary example of each kind keeps positions that are always, or never, worth keeping finite.
    mean = (labels.sum(axis=0) + 1.0) / (labels.shape[0] + 2.0)
    return jax.scipy.special.logit(mean)
