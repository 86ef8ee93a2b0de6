"""AS-ViT (Liu et al., "Adaptive Sparse ViT: Towards Learnable Adaptive Token Pruning by ... Self-Attention", IJCAI 2023).

Before some blocks those patches stay to which the class token attends most, with heads weighted, for each patch, by how much
they have to say of it: by the length of their output. Here how many stay is given; the authors learn thresholds.

Legend: B images, H heads, N patch tokens.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from tif_jax.layers import widened
from tif_jax.reducers import _schedule as schedule
from tif_jax.reducers._between import amounts, walk
from tif_jax.tokens import QueryKey, class_attention_of_heads, require_class, top_k


@dataclass(frozen=True)
class AsVit:
    """Before every site keeps round(keep_ratio * M) of the M patch tokens there, by the attention of the block before.

    keep_ratio: one for all sites, or one for each. num_kept: instead, numbers of patch tokens left, one for each site or each
    block. sites: block indices counted from 0, at least 1; None is one after a quarter, a half and three quarters of the
    way: 4, 7, 10 of 12.
    """

    keep_ratio: float | tuple[float, ...] = 0.7
    sites: tuple[int, ...] | None = None
    num_kept: tuple[int, ...] | None = None

    def __post_init__(self):
        schedule.check(self.keep_ratio, self.sites, self.num_kept)

    def __call__(self, blocks, x, tokens, rngs=None):
        require_class(tokens, "as_vit")
        per_site = amounts(self.keep_ratio, self.sites, self.num_kept, len(blocks))

        def choose(qk, tokens, block, num_kept):
            return top_k(head_weighted_attention(qk, tokens.num_special), num_kept)

        return walk(blocks, x, tokens, rngs, per_site, choose)


def head_weighted_attention(qk: QueryKey, num_special: int) -> Float[Array, "B N"]:
    """Class attention to each patch, mean over heads weighted by the lengths of their outputs for it, at least float32."""
    assert qk.head_output is not None
    output = qk.head_output[:, :, num_special:].astype(widened(qk.head_output.dtype))
    length = jnp.sqrt(jnp.square(output).sum(axis=-1))
    weight = length / (length.sum(axis=1, keepdims=True) + 1e-8)
    return (class_attention_of_heads(qk, num_special) * weight).sum(axis=1)
