"""DynamicViT (Rao et al., "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification", NeurIPS 2021).

Before some blocks a small network predicts for every patch whether it is worth keeping. In training its decisions are drawn
and mask the attention; in inference the patches that it would keep most surely stay and the others are gone.

Legend: B images, N patch tokens, D width.
"""

import itertools
import math
import operator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tif_jax.errors import InputError
from tif_jax.layers import Linear, gelu, widened
from tif_jax.reducers import _schedule as schedule
from tif_jax.tokens import GONE, at_rows, follow, join, row_numbers, split, take, top_k


class Left(NamedTuple):
    """What a site leaves: a number of patch tokens in inference, in training a share of all patches on average."""

    number: int
    share: float


class KeepPredictor(nnx.Module):
    """log P(keep), log P(drop) of each patch token, from half of its features and the mean of the others' other half."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        linear = partial(Linear, kernel_init=nnx.initializers.truncated_normal(0.02), rngs=rngs)
        half, quarter = max(1, width // 2), max(1, width // 4)
        self.norm = nnx.LayerNorm(width, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        self.features = linear(width, width)
        self.layer_0, self.layer_1, self.layer_2 = linear(width, half), linear(half, quarter), linear(quarter, 2)

    def __call__(self, patches: Float[Array, "B N D"], mask: Float[Array, "B N"]) -> Float[Array, "B N 2"]:
        """mask: which patches are still there; the mean is over these. At least float32."""
        half = patches.shape[2] // 2
        y = gelu(self.features(self.norm(patches.astype(widened(patches.dtype)))), approximate=False)
        total = mask.sum(axis=1, keepdims=True)
        # An image may lose all its patches in training: the mean is then 0, not a NaN for the whole run.
        mean = jnp.einsum("bn,bnd->bd", mask, y[..., half:]) / jnp.where(total > 0, total, 1)
        mean = jnp.broadcast_to(mean[:, None], (*y.shape[:2], mean.shape[1]))
        y = self.layer_0(jnp.concatenate([y[..., :half], mean], axis=2))
        y = self.layer_2(gelu(self.layer_1(gelu(y, approximate=False)), approximate=False))
        return jax.nn.log_softmax(y, axis=-1)


class DynamicVit(nnx.Module):
    """After the s-th site floor(keep_ratio^s * N) of the N patches are left.

    keep_ratio: relative to what the site before left, one for all sites or one for each; the floor is of the product with N.
    num_kept: instead, numbers of tokens left, one for each site; or one for each block, and sites are where it falls.
    ratio_weight: of aux['loss/ratio'], the squared deviation of the share of patches kept from the wanted one, mean over
    the sites.

    Without `rngs` patches are gathered: aux has `kept` and `source`. With `rngs` (training) every token stays, and aux has
    `mask`, which patches the last site left, `source` as if the rest were gone, and `loss/ratio`. depth: None makes no
    predictors (a check of the options).
    """

    def __init__(
        self,
        keep_ratio: float | tuple[float, ...] = 0.7,
        sites: tuple[int, ...] | None = None,
        num_kept: tuple[int, ...] | None = None,
        ratio_weight: float = 2.0,
        *,
        width: int,
        num_patches: int,
        depth: int | None,
        rngs: nnx.Rngs,
    ):
        schedule.check(keep_ratio, sites, num_kept)
        if not 0 <= ratio_weight < math.inf:
            raise InputError(f"ratio_weight is {ratio_weight}; it multiplies a loss, from 0")
        self.keep_ratio, self.num_kept, self.ratio_weight = keep_ratio, num_kept, ratio_weight
        amounts = {} if depth is None else schedule.amounts(keep_ratio, sites, num_kept, depth)
        if num_kept is None:
            amounts = dict(zip(amounts, itertools.accumulate(amounts.values(), operator.mul), strict=True))
        elif schedule.is_per_block(sites, num_kept, depth):
            amounts = {site: left.number for site, left in _falling(tuple(amounts.items()), num_patches).items()}
        self.amounts = tuple(amounts.items())
        for site in amounts:
            setattr(self, f"predictor_{site}", KeepPredictor(width, rngs=rngs))

    def __call__(self, blocks, x, tokens, rngs=None):
        sites = _falling(self.amounts, tokens.index.shape[1])
        return self._gather(sites, blocks, x, tokens) if rngs is None else self._mask(sites, blocks, x, tokens, rngs)

    def _gather(self, sites, blocks, x, tokens):
        left = tokens
        for i, block in enumerate(blocks):
            if i in sites:
                special, patches = split(x, tokens.num_special)
                everyone = jnp.ones(patches.shape[:2], widened(x.dtype))
                kept = top_k(self._predict(i, patches, everyone)[..., 0], sites[i].number)
                x, left = join(special, take(patches, kept)), at_rows(left, kept)
            x, _ = block(x, left)
        return x, {"kept": left.index, "source": left.source}

    def _mask(self, sites, blocks, x, tokens, rngs):
        num_special = tokens.num_special
        mask = jnp.ones(tokens.index.shape, widened(x.dtype))
        deviations = [jnp.zeros(x.shape[0], mask.dtype)]
        key_weight, left = None, tokens  # weights are all 1 before the first site
        for i, block in enumerate(blocks):
            if i in sites:
                log_probs = self._predict(i, split(x, num_special)[1], mask)
                noise = jax.random.gumbel(rngs.keep_decisions(), log_probs.shape, log_probs.dtype)
                mask = mask * decide(log_probs, noise)  # what is gone does not come back
                deviations.append((mask.mean(axis=1) - sites[i].share) ** 2)
                key_weight = jnp.pad(mask, ((0, 0), (num_special, 0)), constant_values=1)
                # A dense head is to learn from what there is without `rngs`.
                rows = jnp.where(mask > 0, row_numbers(*mask.shape), GONE)
                left = tokens._replace(source=follow(tokens.source, rows))
            x, _ = block.attend(x, left, key_weight=key_weight, rngs=rngs)
            x = block.feed_forward(x, rngs)
        ratio = self.ratio_weight / max(1, len(sites)) * sum(deviations)
        return x, {"mask": mask, "source": left.source, "loss/ratio": ratio}

    def _predict(self, site: int, patches: Float[Array, "B N D"], mask: Float[Array, "B N"]) -> Float[Array, "B N 2"]:
        return getattr(self, f"predictor_{site}")(patches, mask)


def decide(log_probs: Float[Array, "B N 2"], noise: Float[Array, "B N 2"]) -> Float[Array, "B N"]:
    """1 where a patch is kept, 0 where not: a draw from exp(log_probs) if the noise is Gumbel noise.

    The gradient is that of the relaxed decision, softmax(log_probs + noise) (straight-through Gumbel-softmax, Jang et al.
    2017, at the authors' temperature, 1).
    """
    keep, drop = jnp.moveaxis(log_probs + noise, 2, 0)
    soft = jax.nn.sigmoid(keep - drop)
    return (keep >= drop).astype(soft.dtype) + (soft - jax.lax.stop_gradient(soft))  # in this order exactly 0 or 1


def _falling(amounts: tuple[tuple[int, schedule.Amount], ...], num_patches: int) -> dict[int, Left]:
    """The sites that leave fewer patch tokens than arrive, with what they leave of num_patches. Ratios are of num_patches."""
    sites, arriving = {}, num_patches
    for site, amount in amounts:
        number = schedule.count(amount, arriving if isinstance(amount, int) else num_patches, math.floor)
        if number < arriving:
            share = number / num_patches if isinstance(amount, int) else amount
            sites[site], arriving = Left(number, share), number
    return sites
