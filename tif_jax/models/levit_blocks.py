"""The blocks of LeViT, each of two half-steps: those that leave the raster as it is, and those that halve it.

Legend: B images, T tokens in, S tokens out or keys, N patch tokens, M patch tokens after a shrink, D width in, E width out,
H heads, C channels of a head's keys, V channels of its values.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from tif_jax.errors import InputError
from tif_jax.layers import BatchNorm, Linear, drop_path
from tif_jax.models.model import token_embedding
from tif_jax.tokens import QueryKey, Tokens, attention_logits

_STRIDE = 2  # of a shrink block
ACTIVATIONS = {"hard_swish": jax.nn.hard_swish, "silu": jax.nn.silu}


class LinearNorm(nnx.Module):
    """A linear layer without bias, then batch normalisation whose scale starts at `scale`."""

    def __init__(self, width: int, out: int, *, scale: float = 1.0, dtype, rngs: nnx.Rngs):
        self.linear = Linear(width, out, use_bias=False, dtype=dtype, rngs=rngs)
        self.norm = BatchNorm(out, scale=scale)

    def __call__(self, x: Float[Array, "B T D"], training: bool) -> Float[Array, "B T E"]:
        return self.norm(self.linear(x), training)


class Attention(nnx.Module):
    """Multi-head attention whose values have twice the channels of its keys; the activation before the output layer.

    grid: the raster for which there are biases, one per head and distance between rows and columns; None: no biases.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        key_dim: int,
        *,
        grid: tuple[int, int] | None,
        activation: str,
        dtype,
        rngs: nnx.Rngs,
    ):
        self.num_heads, self.key_dim, self.grid, self.activation = num_heads, key_dim, grid, activation
        self.qkv = LinearNorm(width, 4 * key_dim * num_heads, dtype=dtype, rngs=rngs)
        if grid:
            self.biases = nnx.Param(jnp.zeros((num_heads, grid[0] * grid[1])))
        # Scale 0: at the start every residual branch is silent.
        self.out = LinearNorm(2 * key_dim * num_heads, width, scale=0.0, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], key_log_weight: Float[Array, "B T"] | None, training: bool
    ) -> tuple[Float[Array, "B T D"], QueryKey]:
        qkv = rearrange(self.qkv(x, training), "b t (h c) -> b t h c", h=self.num_heads)
        query, key, value = jnp.split(qkv, (self.key_dim, 2 * self.key_dim), axis=-1)
        bias = None if self.grid is None else _biases(self.biases[...], self.grid, x.shape[1], stride=1)
        mixed = _attend(query, key, value, bias, key_log_weight)
        return self.out(ACTIVATIONS[self.activation](mixed), training), QueryKey(query, key)


class ShrinkAttention(nnx.Module):
    """Attention of every second patch in both directions, and of the class token, to all tokens.

    Its values have four times the channels of its keys.
    """

    def __init__(
        self,
        width: int,
        out: int,
        key_dim: int,
        *,
        grid: tuple[int, int],
        biased: bool,
        activation: str,
        dtype,
        rngs: nnx.Rngs,
    ):
        self.num_heads, self.key_dim, self.grid, self.biased = width // key_dim, key_dim, grid, biased
        self.activation = activation
        self.key_value = LinearNorm(width, 5 * key_dim * self.num_heads, dtype=dtype, rngs=rngs)
        self.query = LinearNorm(width, key_dim * self.num_heads, dtype=dtype, rngs=rngs)
        if biased:
            self.biases = nnx.Param(jnp.zeros((self.num_heads, grid[0] * grid[1])))
        self.out = LinearNorm(4 * key_dim * self.num_heads, out, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], key_log_weight: Float[Array, "B T"] | None, training: bool
    ) -> tuple[Float[Array, "B S E"], QueryKey]:
        num_special = x.shape[1] - self.grid[0] * self.grid[1]
        some = jnp.concatenate([x[:, :num_special], subsample(x[:, num_special:], self.grid)], axis=1)
        query = rearrange(self.query(some, training), "b t (h c) -> b t h c", h=self.num_heads)
        key_value = rearrange(self.key_value(x, training), "b t (h c) -> b t h c", h=self.num_heads)
        key, value = jnp.split(key_value, (self.key_dim,), axis=-1)
        bias = _biases(self.biases[...], self.grid, x.shape[1], stride=_STRIDE) if self.biased else None
        mixed = _attend(query, key, value, bias, key_log_weight)
        return self.out(ACTIVATIONS[self.activation](mixed), training), QueryKey(query, key)


class FeedForward(nnx.Module):
    """Two linear layers with batch normalisation, the activation between."""

    def __init__(self, width: int, *, activation: str, dtype, rngs: nnx.Rngs):
        self.activation = activation
        self.up = LinearNorm(width, 2 * width, dtype=dtype, rngs=rngs)
        self.down = LinearNorm(2 * width, width, scale=0.0, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], training: bool) -> Float[Array, "B T D"]:
        return self.down(ACTIVATIONS[self.activation](self.up(x, training)), training)


class Block(nnx.Module):
    """Attention and feed-forward network as two half-steps, both residual; with `rngs` in training mode."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        key_dim: int,
        *,
        grid: tuple[int, int] | None,
        drop_path: float,
        **common: Any,
    ):
        """common: activation, dtype and rngs of the layers."""
        self.attention = Attention(width, num_heads, key_dim, grid=grid, **common)
        self.mlp = FeedForward(width, **common)
        self.drop_path = drop_path

    def attend(
        self,
        x: Float[Array, "B T D"],
        tokens: Tokens,
        key_log_weight: Float[Array, "B T"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "B T D"], QueryKey]:
        """x plus attention. key_log_weight is added to the logits of each key before the softmax; tokens is not read."""
        y, qk = self.attention(x, key_log_weight, rngs is not None)
        return x + drop_path(y, self.drop_path, rngs), qk

    def feed_forward(self, x: Float[Array, "B T D"], rngs: nnx.Rngs | None = None) -> Float[Array, "B T D"]:
        """x plus the feed-forward network."""
        return x + drop_path(self.mlp(x, rngs is not None), self.drop_path, rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        tokens: Tokens,
        key_log_weight: Float[Array, "B T"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "B T D"], QueryKey]:
        x, qk = self.attend(x, tokens, key_log_weight, rngs)
        return self.feed_forward(x, rngs), qk


class Shrink(nnx.Module):
    """The block between two stages, which takes the complete raster and leaves every second row and column of it.

    Its attention is not residual, since tokens and width change; its feed-forward network is.
    """

    stride = _STRIDE  # how a reducer tells it from a block that leaves the raster as it is

    def __init__(
        self,
        width: int,
        out: int,
        key_dim: int,
        *,
        grid: tuple[int, int],
        num_positions: int,
        drop_path: float,
        **common: Any,
    ):
        """num_positions: rows of a position embedding that is added to its input; 0: none, but attention biases.

        common: activation, dtype and rngs of the layers.
        """
        self.grid, self.num_positions, self.drop_path = grid, num_positions, drop_path
        if num_positions:
            self.position_embedding = token_embedding(common["rngs"], num_positions, width)
        self.attention = ShrinkAttention(width, out, key_dim, grid=grid, biased=not num_positions, **common)
        self.mlp = FeedForward(out, **common)

    def subsample(self, rows: Shaped[Array, "B N *rest"]) -> Shaped[Array, "B M *rest"]:
        """What belongs to the patches that become tokens of the smaller raster, of what belongs to all."""
        return subsample(rows, self.grid)

    def attend(
        self,
        x: Float[Array, "B T D"],
        tokens: Tokens,
        key_log_weight: Float[Array, "B T"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "B S E"], QueryKey]:
        """The tokens of the smaller raster, behind the special ones. The query has S rows, the key T. tokens is not read."""
        if self.num_positions:
            x = x + self.position_embedding[...].astype(x.dtype)
        return self.attention(x, key_log_weight, rngs is not None)

    def feed_forward(self, x: Float[Array, "B S E"], rngs: nnx.Rngs | None = None) -> Float[Array, "B S E"]:
        """x plus the feed-forward network."""
        return x + drop_path(self.mlp(x, rngs is not None), self.drop_path, rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        tokens: Tokens,
        key_log_weight: Float[Array, "B T"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "B S E"], QueryKey]:
        x, qk = self.attend(x, tokens, key_log_weight, rngs)
        return self.feed_forward(x, rngs), qk


def smaller(grid: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns after a shrink block."""
    return -(-grid[0] // _STRIDE), -(-grid[1] // _STRIDE)


def subsample(rows: Shaped[Array, "B N *rest"], grid: tuple[int, int]) -> Shaped[Array, "B M *rest"]:
    """Every second row and column of a raster, from the first."""
    raster = rows.reshape(rows.shape[0], *grid, *rows.shape[2:])[:, ::_STRIDE, ::_STRIDE]
    return raster.reshape(rows.shape[0], -1, *rows.shape[2:])


def _biases(biases: Float[Array, "H N"], grid: tuple[int, int], num_tokens: int, stride: int) -> Float[Array, "H T S"]:
    """The bias of each pair of query and key."""
    if num_tokens != grid[0] * grid[1]:
        raise InputError(f"attention biases need the complete raster of {grid[0]}x{grid[1]} tokens, not {num_tokens}")
    return biases[:, _distances(grid, stride)]


@functools.cache
def _distances(grid: tuple[int, int], stride: int) -> Int[np.ndarray, "T S"]:
    """For queries at every stride-th row and column, which entry of the biases belongs to each key.

    An entry is a distance of rows and one of columns, without sign, and lies where in the raster the patch at that
    distance from the first one lies.
    """
    row, column = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    asks = (row % stride == 0) & (column % stride == 0)
    rows, columns = (np.abs(at[asks][:, None] - at[None]) for at in (row, column))
    return rows * grid[1] + columns


def _attend(
    query: Float[Array, "B T H C"],
    key: Float[Array, "B S H C"],
    value: Float[Array, "B S H V"],
    bias: Float[Array, "H T S"] | None,
    key_log_weight: Float[Array, "B S"] | None,
) -> Float[Array, "B T HV"]:
    """softmax(query key^T / sqrt(C) + bias + key_log_weight) value, heads concatenated; the softmax in float32."""
    logits = attention_logits(query, key)
    value = rearrange(value, "b s h v -> b h s v")
    if bias is not None:
        logits = logits + bias[None].astype(logits.dtype)
    if key_log_weight is not None:
        logits = logits + key_log_weight[:, None, None, :].astype(logits.dtype)
    mixed = jnp.einsum("bhts,bhsv->bhtv", jax.nn.softmax(logits, axis=-1).astype(value.dtype), value)
    return rearrange(mixed, "b h t v -> b t (h v)")
