"""MCTF (Lee et al., "Multi-criteria Token Fusion with One-step-ahead Attention for Efficient Vision Transformers", 2024).

Patch tokens are dealt alternately into two sets, and pairs across the sets fuse that are alike, matter little and stand for
few patches, all three at once: half of them from the first set into the second, half the other way.

Legend: B images, T tokens, N patch tokens, O and E those of odd and of even rows, R that fuse into others, M that are left, S
those and the special ones, D width, H heads.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from tif_jax.errors import InputError
from tif_jax.layers import widened
from tif_jax.reducers import _schedule as schedule
from tif_jax.reducers._density_peaks import products
from tif_jax.reducers._fusion import Fusion, fuse, fuse_tokens, total, unit
from tif_jax.reducers._steps import limited, log_sizes, walk
from tif_jax.tokens import QueryKey, attention_logits, join, put, row_numbers, split, take

_DEFAULT = 16  # the authors' number of tokens per block
_LEAST = 1e-12  # attention may underflow


@dataclass(frozen=True)
class Mctf:
    """Fuses patch tokens by similarity, informativeness and size together, between the blocks.

    num_merged: how many, at each block but the first, a mean if it has a fraction; or an integer for each block. At most
    half of those there.
    keep_ratio: instead, the share that is left at each of the `sites`, or one for each; at least half of those there.
    sites: block indices; None is a quarter, a half and three quarters of the way: 3, 6, 9 of 12.
    one_step_ahead: a block's attention says what matters before the block, which then attends by its maps of all tokens,
    fused as they are; else behind the block. Nothing fuses before the first block or behind the last.
    temperatures: of similarity, informativeness and size: a criterion is raised to the power 1 / temperature, so that it
    counts the less the higher that is. 0 leaves one out.
    proportional: attention in proportion to how many patches a token stands for, as in ToMe; aux['size'] says it of those
    left.
    """

    num_merged: int | float | tuple[int, ...] = _DEFAULT
    keep_ratio: float | tuple[float, ...] | None = None
    sites: tuple[int, ...] | None = None
    one_step_ahead: bool = False
    temperatures: tuple[float, ...] = (1.0, 20.0, 40.0)
    proportional: bool = True

    def __post_init__(self):
        schedule.check_merged(self.num_merged)
        if self.keep_ratio is not None:
            schedule.check(self.keep_ratio, self.sites, None)
            if self.num_merged != _DEFAULT:
                raise InputError(f"keep_ratio is {self.keep_ratio} and num_merged {self.num_merged}; give one of them")
        elif self.sites is not None:
            raise InputError(f"sites is {self.sites}; give keep_ratio with it, or a tuple num_merged for each block")
        if len(self.temperatures) != 3 or not all(0 <= t < math.inf for t in self.temperatures):
            raise InputError(
                f"temperatures is {self.temperatures}; it is three numbers from 0: of similarity, informativeness, size"
            )

    def per_block(self, depth: int, num_patches: int) -> tuple[int, ...]:
        """How many of num_patches tokens fuse at each of `depth` blocks."""
        outside = 0 if self.one_step_ahead else depth - 1
        if self.keep_ratio is None:
            wanted = schedule.merged_per_block(self.num_merged, depth, first=1)
            return limited((*wanted[:outside], 0, *wanted[outside + 1 :]), self, num_patches)
        amounts, left, numbers = schedule.amounts(self.keep_ratio, self.sites, None, depth), num_patches, []
        for i in range(depth):
            numbers.append(0 if i == outside else left - schedule.count(amounts.get(i, 1.0), left, _ceil))
            left -= min(numbers[-1], self.most(left))
        return limited(tuple(numbers), self, num_patches)

    def most(self, num_patches: int) -> int:
        """How many of num_patches can fuse at one block."""
        return num_patches // 2

    def step(self, block, x, tokens, size, number, rngs=None):
        log_size = log_sizes(size, tokens, self.proportional)
        if not number:
            return block(x, tokens, log_size, rngs)[0], tokens, size
        if self.one_step_ahead:
            maps = block.look(x, tokens, log_size)
            matters = received(maps)
        else:
            x, qk = block(x, tokens, log_size, rngs)
            matters = informativeness(qk, log_size)
        patches = split(x, tokens.num_special)[1]
        size = jnp.ones(patches.shape[:2], widened(x.dtype)) if size is None else size
        matters = matters[:, tokens.num_special :]
        fusion = match(affinity(patches, matters, size, self.temperatures), number // 2, number - number // 2)
        weight = matters * size
        x, tokens = fuse_tokens(x, tokens, weight, fusion)
        size = total(size, fusion)
        if self.one_step_ahead:
            x, _ = block.attend(x, tokens, rngs=rngs, maps=fused_maps(maps, weight, fusion))
            x = block.feed_forward(x, rngs)
        return x, tokens, size

    def __call__(self, blocks, x, tokens, rngs=None):
        return walk(self, blocks, x, tokens, rngs)


def _ceil(number: float) -> int:
    return math.ceil(number - 1e-9)


def informativeness(qk: QueryKey, log_weight: Float[Array, "B T"] | None = None) -> Float[Array, "B T"]:
    """`received` in the block that gave `qk`. log_weight: as the block was given it."""
    # As attention computes it, so that it is computed once.
    return received(jax.nn.softmax(attention_logits(qk.query, qk.key, log_weight), axis=-1))


def received(maps: Float[Array, "B H T T"]) -> Float[Array, "B T"]:
    """How much attention each token gets, mean over heads and queries, special tokens' included: above 0. No gradient."""
    return jnp.maximum(jax.lax.stop_gradient(maps).mean(axis=(1, 2)), _LEAST)


def affinity(
    x: Float[Array, "B N D"],
    matters: Float[Array, "B N"],
    size: Float[Array, "B N"],
    temperatures: tuple[float, ...] = (1.0, 20.0, 40.0),
) -> Float[Array, "B O E"]:
    """How readily the tokens of odd rows fuse with those of even rows, from 0; at least float32, no gradient.

    ((1 + cosine) / 2)^(1/t0) (1 / product of what they matter)^(1/t1) (1 / product of their sizes)^(1/t2) for temperatures
    t0, t1, t2; without the factors whose temperature is 0. Factors of a token alone are relative to the largest of the image.
    """
    direction = unit(x)
    of_similarity, *of_others = temperatures
    readiness = jnp.ones(x.shape[:2], direction.dtype)
    for value, temperature in zip((matters, size), of_others, strict=True):
        if temperature:
            least = value.min(axis=1, keepdims=True)
            readiness = readiness * jax.lax.stop_gradient(least / value).astype(direction.dtype) ** (1 / temperature)
    pairs = readiness[:, 1::2, None] * readiness[:, None, ::2]
    if not of_similarity:
        return pairs
    similarity = jnp.maximum((1 + products(direction[:, 1::2], direction[:, ::2])) / 2, 0)
    return pairs * (similarity if of_similarity == 1 else similarity ** (1 / of_similarity))


def match(affinity: Float[Array, "B O E"], num_odd: int, num_even: int) -> Fusion:
    """Bidirectional bipartite soft matching of tokens whose odd rows are set against the even ones.

    First the num_odd odd tokens of the highest affinity fuse, each into the even one where it is highest. Then as many as
    num_even even tokens do into the odd ones that are left, and take along what has fused into them. What is left are
    the odd tokens in their order, then the even ones by affinity, the highest first (without num_even: in their order).
    Ties go to the lower row. num_odd is below the number of odd rows if num_even is not 0.
    """
    num_images, odd, even = affinity.shape
    _, order = jax.lax.top_k(affinity.max(axis=2), odd)
    gone_odd, left_odd = order[:, :num_odd], jnp.sort(order[:, num_odd:], axis=1)
    target = jnp.argmax(take(affinity, gone_odd), axis=2)  # the even token
    rest = take(affinity, left_odd)
    left_even, gone_even = row_numbers(num_images, even), jnp.zeros((num_images, 0), jnp.int32)
    into_odd = gone_even
    if num_even:
        _, order = jax.lax.top_k(rest.max(axis=1), even)
        gone_even, left_even = order[:, :num_even], order[:, num_even:]
        into_odd = jnp.argmax(jnp.take_along_axis(rest, gone_even[:, None], axis=2), axis=1).astype(jnp.int32)
    row_of_even = put(jnp.zeros((num_images, even), jnp.int32), gone_even, into_odd)
    row_of_even = put(row_of_even, left_even, odd - num_odd + row_numbers(*left_even.shape))
    return Fusion(
        left=jnp.concatenate([2 * left_odd + 1, 2 * left_even], axis=1).astype(jnp.int32),
        gone=jnp.concatenate([2 * gone_odd + 1, 2 * gone_even], axis=1).astype(jnp.int32),
        into=jnp.concatenate([take(row_of_even, target), into_odd], axis=1),
    )


def fused_maps(maps: Float[Array, "B H T T"], weight: Float[Array, "B N"], fusion: Fusion) -> Float[Array, "B H S S"]:
    """Attention maps of all tokens as those of the S tokens after fusing: what keys get adds up, queries are means.

    In front of the N patch tokens, to which `weight` and `fusion` belong, are T - N special ones.
    """
    num_special, num_heads = maps.shape[2] - weight.shape[1], maps.shape[1]
    special, patches = split(rearrange(maps, "b h q k -> b k (h q)"), num_special)
    by_query = rearrange(join(special, total(patches, fusion)), "b k (h q) -> b q (h k)", h=num_heads)
    special, patches = split(by_query, num_special)
    return rearrange(join(special, fuse(patches, weight, fusion)[0]), "b q (h k) -> b h q k", h=num_heads)
