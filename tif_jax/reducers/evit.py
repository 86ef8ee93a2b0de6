"""EViT (Liang et al., "Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations", 2022).

Between attention and feed-forward network of some blocks, the patches to which the class token attends least leave,
or are fused into one token. The ranking uses attention that is there anyway, so that there is nothing to train.

Legend: B images, T tokens, S tokens left, N patch tokens, M patch tokens at a site, K kept patch tokens, D width.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tif_jax.errors import InputError
from tif_jax.layers import widened
from tif_jax.reducers import _schedule as schedule
from tif_jax.tokens import (
    class_attention,
    join,
    mean_position,
    merged,
    require_class,
    rows_of,
    split,
    take,
    top_k,
)


@dataclass(frozen=True)
class Evit:
    """At every site keeps the ceil(keep_ratio * M) attentive tokens and fuses the inattentive ones into a further one.

    fuse: whether the inattentive tokens are fused, or gone. The fused token is an ordinary patch token from then on: it
    counts in the next site's M, and may be kept, or fused again, there.

    aux has `source`, and `kept` unless a site ranks an earlier site's fused token: how many patches stay tokens of their
    own then depends on whether that one is kept, and differs between images.
    """

    keep_ratio: float | tuple[float, ...] = 0.7
    sites: tuple[int, ...] | None = None
    num_kept: tuple[int, ...] | None = None
    fuse: bool = True

    def __post_init__(self):
        schedule.check(self.keep_ratio, self.sites, self.num_kept)
        if not isinstance(self.fuse, bool):
            raise InputError(f"fuse is {self.fuse!r}; allowed: True, False")

    def __call__(self, blocks, x, tokens, rngs=None):
        require_class(tokens, "evit")
        amounts = schedule.amounts(self.keep_ratio, self.sites, self.num_kept, len(blocks))
        own = tokens.index  # raster positions of the patches that are tokens of their own, while their number is known
        for i, block in enumerate(blocks):
            x, qk = block.attend(x, tokens, rngs=rngs)
            num_patches = x.shape[1] - tokens.num_special
            if (num_kept := self._num_kept(amounts.get(i, 1.0), num_patches)) < num_patches:
                scores = class_attention(qk, tokens.num_special)
                kept = top_k(scores, num_kept)
                rows = rows_of(kept, num_patches, others=num_kept if self.fuse else -1)
                fused = rows == num_kept if self.fuse else None
                x = reorganise(x, scores, kept, fused)
                tokens = merged(tokens, rows, _positions(tokens.position, scores, kept, fused))
                own = take(own, kept) if own is not None and own.shape[1] == num_patches else None
            x = block.feed_forward(x, rngs=rngs)
        return x, {"source": tokens.source} | ({} if own is None else {"kept": own})

    def _num_kept(self, amount: schedule.Amount, num_patches: int) -> int:
        num_kept = schedule.count(amount, num_patches, math.ceil)
        # Ratios are of the kept tokens, numbers of the tokens left: the fused one is among those.
        is_number = isinstance(amount, int) and num_kept < num_patches
        return max(1, num_kept - 1) if is_number and self.fuse else num_kept


def _positions(
    position: Float[Array, "B M 2"],
    scores: Float[Array, "B M"],
    kept: Int[Array, "B K"],
    fused: Bool[Array, "B M"] | None,
) -> Float[Array, "B _ 2"]:
    """Where the patch tokens lie that `reorganise` leaves."""
    left = take(position, kept)
    return left if fused is None else join(left, mean_position(position, jnp.where(fused, scores, 0)))


def reorganise(
    x: Float[Array, "B T D"],
    scores: Float[Array, "B M"],
    kept: Int[Array, "B K"],
    fused: Bool[Array, "B M"] | None,
) -> Float[Array, "B S D"]:
    """The special tokens, the kept tokens and, unless `fused` is None, the sum over fused tokens of score * token.

    The scores are weights of the sum as they are: not renormalised. Through them, but not through the ranking, the
    gradient reaches the attention.
    """
    special, patches = split(x, x.shape[1] - scores.shape[1])
    left = take(patches, kept)
    if fused is None:
        return join(special, left)
    wide = widened(x.dtype)
    weights = jnp.where(fused, scores, 0.0).astype(wide)
    token = jnp.einsum("bm,bmd->bd", weights, patches.astype(wide))[:, None].astype(x.dtype)
    return join(special, jnp.concatenate([left, token], axis=1))
