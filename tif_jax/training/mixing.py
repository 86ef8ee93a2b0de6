"""Mixup and CutMix: every image of a batch is mixed with another one, inside the compiled step.

Legend: B images, Y rows, X columns.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32

from tif_jax import checked
from tif_jax.checked import key


@dataclasses.dataclass(frozen=True)
class Mixing:
    """How batches are mixed; by default not at all. InputError on values that are not allowed."""

    mixup: float = key(0.0, "alpha of mixup: shares are drawn from Beta(alpha, alpha); 0: no mixup", least=0, most=1e6)
    cutmix: float = key(
        0.0, "alpha of CutMix: shares are drawn from Beta(alpha, alpha); 0: no CutMix", least=0, most=1e6
    )
    switch: float = key(0.5, "probability of CutMix, else mixup, where both are on", least=0, most=1)
    probability: float = key(1.0, "probability that a batch is mixed", least=0, most=1)

    def __post_init__(self):
        checked.check(self)


def mix(key: Array, batch: Mapping[str, Array], options: Mixing) -> dict[str, Array]:
    """The batch with batch['image'] (B, Y, X, 3) mixed with itself in reverse order.

    Adds other_label (B,), the label of the image mixed in, and label_weight (B,) in [0, 1], the share of the image's own
    `label`, which stays. As timm does it for whole batches: all images are mixed alike, by mixup (Zhang et al. 2018) or
    CutMix (Yun et al. 2019), with a share drawn from Beta(alpha, alpha). With neither, the batch as it is.
    """
    if not options.mixup and not options.cutmix:
        return dict(batch)
    image, label = batch["image"], batch["label"]
    _, rows, columns, _ = image.shape
    keys = jax.random.split(key, 4)
    chance = options.switch if options.mixup and options.cutmix else 1.0 if options.cutmix else 0.0
    cuts = jax.random.bernoulli(keys[0], chance)
    alpha = jnp.where(cuts, options.cutmix or 1.0, options.mixup or 1.0)
    share = jax.random.beta(keys[1], alpha, alpha)
    share = jnp.where(jax.random.bernoulli(keys[2], options.probability), share, 1.0)
    # Both are weighted sums: mixup's weight is the same everywhere, CutMix's is 0 in a box and 1 around it.
    inside = _box(keys[3], (rows, columns), share)
    weight = jnp.where(cuts, jnp.where(inside, 0.0, 1.0), share)[None, :, :, None]
    own, other = image.astype(jnp.float32), image[::-1].astype(jnp.float32)
    # The picture's border cuts some boxes off: what counts is the share of pixels that stays.
    share = jnp.where(cuts, 1 - inside.mean(dtype=jnp.float32), share)
    return {
        **batch,
        "image": (weight * own + (1 - weight) * other).astype(image.dtype),
        "other_label": label[::-1],
        "label_weight": jnp.broadcast_to(share, label.shape),
    }


def _box(key: Array, size: tuple[int, int], share: Float32[Array, ""]) -> Bool[Array, "Y X"]:
    """Which pixels lie in CutMix's box: as wide for its height as the picture, 1 - share of its area, centred anywhere."""
    inside = []
    for axis, length in enumerate(size):
        side = (length * jnp.sqrt(1 - share)).astype(jnp.int32)
        start = jax.random.randint(jax.random.fold_in(key, axis), (), 0, length) - side // 2
        places = jnp.arange(length)
        inside.append((places >= start) & (places < start + side))
    return inside[0][:, None] & inside[1][None]
