"""Zero-TPrune (Wang, Dedhia, Jha, "Zero-Shot Token Pruning through Leveraging of the Attention Graph", CVPR 2024).

Between two blocks, the attention of the former is a graph in which tokens vote for each other. Patches much like a more
important one leave first, and of the others those with the lowest page rank. Nothing is learned.

Legend: B images, H heads, T tokens, N patch tokens, R dropped ones, K kept ones.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tif_jax.errors import InputError
from tif_jax.reducers import _schedule as schedule
from tif_jax.reducers._between import amounts, walk
from tif_jax.reducers.tome import unit_keys
from tif_jax.tokens import QueryKey, Tokens, attention_logits, put, take, top_k

_ROUNDS = (30, 5, 1)  # of voting, in the first quarter of the blocks, between, and in the last quarter
_VARIANCES = (
    0.01,
    0.7,
)  # of a head's page rank, whose mean is about 1: heads outside say too little, or too much of few


@dataclass(frozen=True)
class ZeroTprune:
    """Before every site keeps round(keep_ratio * M) of the M patch tokens there.

    keep_ratio: one for all sites, or one for each. num_kept: instead, numbers of patch tokens left, one for each site or each
    block. sites: block indices counted from 0, at least 1; None is one after a quarter, a half and three quarters of the
    way: 4, 7, 10 of 12.
    similar: the share, in [0, 1], of those dropped that go for being like a more important one; at most half of the M do.
    """

    keep_ratio: float | tuple[float, ...] = 0.7
    sites: tuple[int, ...] | None = None
    num_kept: tuple[int, ...] | None = None
    similar: float = 0.5

    def __post_init__(self):
        schedule.check(self.keep_ratio, self.sites, self.num_kept)
        if not 0 <= self.similar <= 1:
            raise InputError(f"similar is {self.similar}; it is a share of the patches that are dropped, 0 to 1")

    def __call__(self, blocks, x, tokens, rngs=None):
        per_site = amounts(self.keep_ratio, self.sites, self.num_kept, len(blocks))
        return walk(blocks, x, tokens, rngs, per_site, partial(self._choose, len(blocks)))

    def _choose(self, depth: int, qk: QueryKey, tokens: Tokens, block: int, num_kept: int) -> Int[Array, "B K"]:
        attention = jax.lax.stop_gradient(jax.nn.softmax(attention_logits(qk.query, qk.key), axis=-1))
        special, num_patches = tokens.num_special, tokens.index.shape[1]
        present = jnp.ones((attention.shape[0], num_patches), attention.dtype)
        if num_similar := min(round(self.similar * (num_patches - num_kept)), num_patches // 2):
            votes = page_rank(attention, present, tokens.has_class, rounds=1)
            copies = redundant(unit_keys(qk, special), importance(votes[..., special:], present), num_similar)
            present = put(present, copies, jnp.zeros(copies.shape, present.dtype))
        votes = page_rank(
            attention, present, tokens.has_class, _ROUNDS[(4 * block >= depth) + (4 * block >= 3 * depth)]
        )
        return top_k(jnp.where(present > 0, importance(votes[..., special:], present), -jnp.inf), num_kept)


def page_rank(
    attention: Float[Array, "B H T T"], present: Float[Array, "B N"], has_class: bool, rounds: int
) -> Float[Array, "B H T"]:
    """How much attention a token gets from those that get much; of the tokens present the mean is about 1, 0 for others.

    All begin with 1, a class token, the first, with sqrt(number present). In every round each token hands out what it has,
    divided as its attention to the tokens present.
    """
    num_special = attention.shape[-1] - present.shape[1]
    there = jnp.pad(present, ((0, 0), (num_special, 0)), constant_values=1)
    signal = there.at[:, 0].set(there.sum(axis=1) ** 0.5) if has_class else there
    signal = jnp.broadcast_to(signal[:, None], attention.shape[:3])
    divided = 1 / jnp.einsum("bhts,bs->bht", attention, there, precision="highest")
    for _ in range(rounds):  # written out: exports know no loop
        signal = jnp.einsum("bhts,bht->bhs", attention, signal * divided, precision="highest") * there[:, None]
    return signal


def importance(signal: Float[Array, "B H N"], present: Float[Array, "B N"]) -> Float[Array, "B N"]:
    """Root mean square over the heads whose signal varies neither too little nor too much among the patches present.

    Where that is no head, over all.
    """
    total = present.sum(axis=1)[:, None]
    mean = jnp.einsum("bhn,bn->bh", signal, present, precision="highest") / total
    square = jnp.square(signal - mean[..., None])
    variance = jnp.einsum("bhn,bn->bh", square, present, precision="highest") / total
    heads = (variance >= _VARIANCES[0]) & (variance <= _VARIANCES[1])
    heads = (heads | ~heads.any(axis=1, keepdims=True)).astype(signal.dtype)
    square = jnp.einsum("bhn,bh->bn", jnp.square(signal), heads, precision="highest")
    return jnp.sqrt(square / heads.sum(axis=1, keepdims=True))


def redundant(metric: Float[Array, "B N C"], importance: Float[Array, "B N"], number: int) -> Int[Array, "B R"]:
    """Of the less important half those most similar to one of the more important half: `number` of them, most similar first.

    Ties go to the more important.
    """
    num_patches = metric.shape[1]
    _, order = jax.lax.top_k(importance, num_patches)
    above, below = order[:, : num_patches - num_patches // 2], order[:, num_patches - num_patches // 2 :]
    similarity = jnp.einsum("bnc,bmc->bnm", take(metric, below), take(metric, above), precision="highest")
    _, most = jax.lax.top_k(similarity.max(axis=2), number)
    return take(below, most)
