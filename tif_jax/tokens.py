"""Pure functions on tokens, all with static shapes.

Legend: B images, T and S tokens, P patches of the raster, N patch tokens, K kept patch tokens, M rows that a patch is a
mixture of, D width, H heads, C channels of a head.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int, Key, Shaped

from tif_jax.errors import InputError
from tif_jax.layers import widened


class QueryKey(NamedTuple):
    """What attention compared, and made of it: queries and keys after q/k norm and rotary positions, before 1/sqrt(C).

    Scores are derived by whoever needs them.
    """

    query: Float[Array, "B T H C"]
    key: Float[Array, "B T H C"]
    unrotated_key: Float[Array, "B T H C"] | None = None  # before rotary positions, if there are any
    # The values as each head has mixed them, before the output layer and its norm. LeViT's attention does not say.
    head_output: Float[Array, "B H T C"] | None = None

    @property
    def content_key(self) -> Float[Array, "B T H C"]:
        """Keys as they are whatever the place of their token: how alike two tokens are is asked of these."""
        return self.key if self.unrotated_key is None else self.unrotated_key


GONE, BESIDE = -1, -2  # in `Tokens.source`


class Spread(NamedTuple):
    """Patches as mixtures of rows of x: of each patch M rows and the weight of each."""

    rows: Int[Array, "B P M"]
    weight: Float[Array, "B P M"]


class Tokens(NamedTuple):
    """What the rows of a token array are."""

    num_special: int  # class, distillation and register tokens in front: never reduced
    grid: tuple[int, int]  # rows, columns of the patch raster
    index: Int[Array, "B N"]  # type: ignore[assignment]  # (hides tuple.index)  number in the raster of each patch token
    has_class: bool  # whether the first special token is a class token
    # Row and column in the raster, from 0, of each patch token of x: what blocks read, if their positions are rotary. A
    # token made of several patches lies at their mean, weighted as they are in it (our choice), and has no index.
    position: Float[Array, "B N 2"]
    # For each patch of the raster the row of x, among the patch tokens, that it lives in. GONE: it was dropped. BESIDE: it
    # is in no row, but passes the blocks by, as it is in `offset`, and comes back.
    source: Int[Array, "B P"]
    # What a patch has beside what the row has: what passes by, or how it differs from the token that stands for it.
    offset: Float[Array, "B P D"] | None = None
    spread: Spread | None = None  # what patches are instead of a row of their own, where tokens are clusters of them


def raster_tokens(
    num_images: int, num_special: int, grid: tuple[int, int], has_class: bool, dtype: Any = jnp.float32
) -> Tokens:
    """Before anything is reduced: the special tokens, then all patches in raster order. dtype: of positions."""
    places = np.stack(np.divmod(np.arange(grid[0] * grid[1]), grid[1]), axis=-1)
    position = jnp.broadcast_to(jnp.asarray(places, dtype)[None], (num_images, *places.shape))
    index = row_numbers(num_images, grid[0] * grid[1])
    return Tokens(num_special, grid, index, has_class, position, index)


def at_rows(tokens: Tokens, rows: Int[Array, "B K"], others: int = GONE) -> Tokens:
    """Of those patch tokens alone, by their places among all of them. others: the source of the patches in the rest."""
    source = follow(tokens.source, rows_of(rows, tokens.position.shape[1], others))
    return tokens._replace(index=take(tokens.index, rows), position=take(tokens.position, rows), source=source)


def set_aside(tokens: Tokens, rows: Int[Array, "B K"], offset: Float[Array, "B N D"], others: int = BESIDE) -> Tokens:
    """At those rows alone, while the rest waits. others: the source of the rest, to which each of them adds its offset."""
    of_others = put(offset, rows, jnp.zeros((*rows.shape, offset.shape[2]), offset.dtype))
    return at_rows(tokens, rows, others)._replace(offset=on_raster(tokens, of_others))


def merged(tokens: Tokens, destination: Int[Array, "B N"], position: Float[Array, "B K 2"]) -> Tokens:
    """After patch token n went into row destination[b, n], together with others or alone. position: of the K rows."""
    return tokens._replace(position=position, source=follow(tokens.source, destination))


def on_raster(tokens: Tokens, patches: Float[Array, "B N D"]) -> Float[Array, "B P D"]:
    """For each patch of the raster the token that it lives in; zeros for one that lives in none."""
    value = take(patches, jnp.maximum(tokens.source, 0))
    return jnp.where(tokens.source[..., None] >= 0, value, 0)


def mixed(patches: Float[Array, "B N D"], spread: Spread) -> Float[Array, "B P D"]:
    """Each patch as its mixture of rows, summed at least in float32.

    As a product of two matrices, most of the first zeros: rows would be gathered M times as many as there are patches.
    """
    wide = widened(patches.dtype)
    num_images, num_patches, _ = spread.rows.shape
    image, patch = jnp.arange(num_images)[:, None, None], jnp.arange(num_patches)[None, :, None]
    dense = jnp.zeros((num_images, num_patches, patches.shape[1]), wide)
    dense = dense.at[image, patch, spread.rows].add(spread.weight.astype(wide))
    return jnp.einsum("bpn,bnd->bpd", dense, patches.astype(wide), precision="highest").astype(patches.dtype)


def mean_position(position: Float[Array, "B N 2"], weight: Float[Array, "B N"]) -> Float[Array, "B 1 2"]:
    """Where a token lies that is made of these patch tokens with these weights. No gradient."""
    weight = jax.lax.stop_gradient(weight).astype(position.dtype) + jnp.finfo(position.dtype).tiny
    weight = weight / weight.sum(axis=1, keepdims=True)
    return jnp.einsum("bn,bnp->bp", weight, position, precision="highest")[:, None]


def check_rows(x: Float[Array, "B T D"], tokens: Tokens) -> None:
    """Raises InputError unless `tokens` has a position for each patch token of x."""
    if x.shape[1] != tokens.num_special + tokens.position.shape[1]:
        raise InputError(
            f"a block got {x.shape[1]} tokens and the positions of {tokens.position.shape[1]} patches behind "
            f"{tokens.num_special} special tokens; a reducer that changes the rows of x has to change `tokens` with it "
            "(tif_jax.tokens: keep, keep_rows, at_rows)"
        )


def require_class(tokens: Tokens, method: str) -> None:
    """Raises InputError where a method that asks the class token finds none."""
    if not tokens.has_class:
        raise InputError(f"{method} ranks patches by the attention of the class token; this model has none")


def row_numbers(num_images: int, num_rows: int) -> Int[Array, "B N"]:
    """0, 1, ... for every image: of patch tokens, their raster positions before anything is reduced."""
    return jnp.broadcast_to(jnp.arange(num_rows, dtype=jnp.int32)[None], (num_images, num_rows))


def split(x: Float[Array, "B T D"], num_special: int) -> tuple[Float[Array, "B S D"], Float[Array, "B N D"]]:
    """The special tokens and the patch tokens."""
    return x[:, :num_special], x[:, num_special:]


def join(special: Float[Array, "B S D"], patches: Float[Array, "B N D"]) -> Float[Array, "B T D"]:
    """Inverse of `split`."""
    return jnp.concatenate([special, patches], axis=1)


def top_k(scores: Float[Array, "B N"], k: int) -> Int[Array, "B K"]:
    """Positions of the k highest scores, ascending: kept tokens stay in raster order, so k = N is the identity.

    Ties go to the lower position. No gradient.
    """
    _, index = jax.lax.top_k(jax.lax.stop_gradient(scores), k)
    return jnp.sort(index, axis=1).astype(jnp.int32)


def take(x: Shaped[Array, "B N *rest"], index: Int[Array, "B K"]) -> Shaped[Array, "B K *rest"]:
    """Row index[b, k] of every image's x[b]."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)


def put(
    x: Shaped[Array, "B N *rest"], index: Int[Array, "B K"], y: Shaped[Array, "B K *rest"]
) -> Shaped[Array, "B N *rest"]:
    """x with y[b, k] in row index[b, k] of x[b], the other rows as they are: undoes `take`. No row may occur twice."""
    set_rows = lambda x, index, y: x.at[index].set(y, unique_indices=True, mode="promise_in_bounds")  # noqa: E731
    return jax.vmap(set_rows)(x, index, y)


def keep(
    x: Float[Array, "B T D"], tokens: Tokens, scores: Float[Array, "B N"], keep_ratio: float, round_to: int = 1
) -> tuple[Float[Array, "B S D"], Tokens]:
    """`keep_rows` of the `num_kept` patches with the highest scores; round_to counts the special tokens, too."""
    number = num_kept(keep_ratio, scores.shape[1], num_special=tokens.num_special, round_to=round_to)
    return keep_rows(x, tokens, top_k(scores, number))


def keep_rows(
    x: Float[Array, "B T D"], tokens: Tokens, rows: Int[Array, "B K"]
) -> tuple[Float[Array, "B S D"], Tokens]:
    """The special tokens and those patch tokens, by their places among all of them, ascending: raster order is kept."""
    special, patches = split(x, tokens.num_special)
    return join(special, take(patches, rows)), at_rows(tokens, rows)


def rows_of(kept: Int[Array, "B K"], num_patches: int, others: int) -> Int[Array, "B N"]:
    """For each of num_patches tokens its place among the kept ones; `others` for those that are not kept."""
    return put(jnp.full((kept.shape[0], num_patches), others, jnp.int32), kept, row_numbers(*kept.shape))


def follow(source: Int[Array, "B P"], rows: Int[Array, "B N"]) -> Int[Array, "B P"]:
    """Where patches live after row n went to rows[b, n]; who lives in none stays so."""
    return jnp.where(source < 0, source, take(rows, jnp.maximum(source, 0)))


def check_keep_ratio(keep_ratio: float, round_to: int = 1) -> None:
    """Raises InputError unless keep_ratio is a fraction in (0, 1] and round_to a number of tokens."""
    if not 0 < keep_ratio <= 1:
        raise InputError(f"keep_ratio is {keep_ratio}; it is the fraction of patch tokens kept, in (0, 1]")
    if round_to < 1:
        raise InputError(f"round_to is {round_to}; tokens are kept up to a multiple of it, 1 or more")


def num_kept(keep_ratio: float, num_patches: int, num_special: int = 0, round_to: int = 1) -> int:
    """How many of num_patches tokens a keep_ratio in (0, 1] leaves.

    round_to: so many more that with the special tokens they are a multiple of it, or all.
    """
    number = max(1, round(keep_ratio * num_patches)) + num_special
    return min(num_patches, -(-number // round_to) * round_to - num_special)


def attention_logits(
    query: Float[Array, "B T H C"], key: Float[Array, "B S H C"], key_log_weight: Float[Array, "B S"] | None = None
) -> Float[Array, "B H T S"]:
    """query key^T / sqrt(C) + key_log_weight, queries before keys, at least in float32.

    The one definition, for attention as for who ranks by it: in one program XLA computes equal terms once.
    """
    query, key = rearrange(query, "b t h c -> b h t c"), rearrange(key, "b s h c -> b h s c")
    wide = widened(query.dtype)
    logits = jnp.einsum("bhtc,bhsc->bhts", query, key, preferred_element_type=wide) / query.shape[-1] ** 0.5
    return logits if key_log_weight is None else logits + key_log_weight[:, None, None, :].astype(logits.dtype)


def class_attention(
    qk: QueryKey, num_special: int, key_log_weight: Float[Array, "B T"] | None = None
) -> Float[Array, "B N"]:
    """Attention of the class token to each patch token, mean over heads, at least in float32; rows sum to at most 1.

    The special tokens' columns take part in the softmax and are then left out, not renormalised (EViT, section 3.2).
    key_log_weight: what the block's attention added to the logits of each key.
    """
    return class_attention_of_heads(qk, num_special, key_log_weight).mean(axis=1)


def class_attention_of_heads(
    qk: QueryKey, num_special: int, key_log_weight: Float[Array, "B T"] | None = None
) -> Float[Array, "B H N"]:
    """`class_attention` of each head by itself."""
    wide = widened(qk.query.dtype)
    query = qk.query[:, 0].astype(wide)
    logits = jnp.einsum("bhc,bthc->bht", query, qk.key.astype(wide)) / qk.query.shape[-1] ** 0.5
    if key_log_weight is not None:
        logits = logits + key_log_weight[:, None].astype(wide)
    return jax.nn.softmax(logits, axis=-1)[:, :, num_special:]


def gates_to_log_weight(gates: Float[Array, "B N"], num_special: int) -> Float[Array, "B T"]:
    """Gates in [0, 1] on the patch tokens as logarithms to add to attention logits; special tokens have gate 1."""
    return jnp.pad(jnp.log(gates), ((0, 0), (num_special, 0)))


def image_keys(seed: int | Int[Array, ""], x: Float[Array, "B *rest"]) -> Key[Array, " B"]:
    """A random key per image that depends on the seed and the bits of x[b] alone: not on the batch around it."""
    bits = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(x).astype(jnp.float32), jnp.uint32)
    bits = bits.reshape(x.shape[0], math.prod(x.shape[1:]))  # of no images, too
    weights = jnp.arange(1, 1 + bits.shape[1], dtype=jnp.uint32)[None]
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.sum(bits * weights, axis=1))
