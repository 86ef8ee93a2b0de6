"""Tokens that go into others: what methods that merge have in common.

Legend: B images, T and S tokens, N patch tokens, M those that are left, R those that fuse into them, D width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tif_jax.layers import widened
from tif_jax.tokens import Tokens, join, merged, put, row_numbers, split, take


class Fusion(NamedTuple):
    """Which of N tokens fuse into which. A token that is neither left nor gone is dropped."""

    left: Int[Array, "B M"]  # rows of the tokens that are left, in the order that they will have
    gone: Int[Array, "B R"]  # rows of the tokens that fuse into these
    into: Int[Array, "B R"]  # into which, by their new rows


def fusion_of(gone: Int[Array, "B R"], target: Int[Array, "B R"], num_tokens: int) -> Fusion:
    """That of rows gone[b, r] into rows target[b, r], which are left; the tokens left keep their order."""
    num_images, num_gone = gone.shape
    image = jnp.arange(num_images)[:, None]
    stays = put(jnp.ones((num_images, num_tokens), jnp.int32), gone, jnp.zeros_like(gone))
    place = jnp.cumsum(stays, axis=1, dtype=jnp.int32) - 1
    # A sort would do, and takes ten times as long on a CPU.
    num_left = num_tokens - num_gone
    left = jnp.zeros((num_images, num_left + 1), jnp.int32)  # the last column takes what is gone: ONNX drops nothing
    left = left.at[image, jnp.where(stays > 0, place, num_left)].set(row_numbers(*stays.shape))[:, :num_left]
    return Fusion(left, gone, take(place, target))


def unit(x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
    """Rows scaled to length 1, whose products are cosines; at least float32, no gradient."""
    x = jax.lax.stop_gradient(x).astype(widened(x.dtype))
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(axis=-1, keepdims=True), 1e-24))


def length(x: Float[Array, "B N D"]) -> Float[Array, "B N"]:
    """Of the rows; at least float32, no gradient."""
    x = jax.lax.stop_gradient(x).astype(widened(x.dtype))
    return jnp.sqrt(jnp.maximum(jnp.square(x).sum(axis=-1), 1e-24))


def as_long(x: Float[Array, "B N D"], goal: Float[Array, "B N"], which: Bool[Array, "B N"]) -> Float[Array, "B N D"]:
    """Rows of x scaled to the length `goal`, but those not in `which` bit for bit. The factor passes no gradient."""
    scale = jnp.where(which, goal / length(x), 1)
    return (x.astype(scale.dtype) * scale[..., None]).astype(x.dtype)


def fuse_tokens(
    x: Float[Array, "B T D"], tokens: Tokens, weight: Float[Array, "B N"], fusion: Fusion, keep_length: bool = False
) -> tuple[Float[Array, "B S D"], Tokens]:
    """x and what its rows are after `fuse` of the patch tokens, which leaves special tokens alone.

    keep_length: a mean of different directions is short; it is made as long as its members are on the (weighted) mean.
    """
    special, patches = split(x, tokens.num_special)
    position, _ = fuse(tokens.position, weight, fusion)
    fused, _ = fuse(patches, weight, fusion)
    if keep_length:
        members, _ = fuse(length(patches)[..., None], weight, fusion)
        fused = as_long(fused, members[..., 0], total(jnp.ones_like(weight), fusion) > 1)
    return join(special, fused), merged(tokens, destination(fusion, patches.shape[1]), position)


def fuse(
    x: Float[Array, "B N D"], weight: Float[Array, "B N"], fusion: Fusion
) -> tuple[Float[Array, "B M D"], Float[Array, "B M"]]:
    """Means of the tokens that fuse, weighted by `weight` (above 0), and the sums of their weights.

    Written as token + sum of share (other - token), so that a token that nothing fuses into is a copy.
    """
    image = jnp.arange(x.shape[0])[:, None]
    together = total(weight, fusion)
    share = take(weight, fusion.gone) / take(together, fusion.into)
    left = take(x, fusion.left).astype(widened(x.dtype))
    difference = take(x, fusion.gone).astype(left.dtype) - take(left, fusion.into)
    fused = left.at[image, fusion.into].add(share[..., None].astype(left.dtype) * difference)
    return fused.astype(x.dtype), together


def total(value: Float[Array, "B N *rest"], fusion: Fusion) -> Float[Array, "B M *rest"]:
    """Sums over the tokens that fuse."""
    image = jnp.arange(value.shape[0])[:, None]
    return take(value, fusion.left).at[image, fusion.into].add(take(value, fusion.gone))


def destination(fusion: Fusion, num_tokens: int | None = None) -> Int[Array, "B N"]:
    """The row where each of the num_tokens tokens is after fusing, or -1. None: those that are left and gone are all."""
    num_images, num_left = fusion.left.shape
    num_tokens = num_left + fusion.gone.shape[1] if num_tokens is None else num_tokens
    rows = jnp.full((num_images, num_tokens), -1, jnp.int32)
    return put(put(rows, fusion.left, row_numbers(num_images, num_left)), fusion.gone, fusion.into)
