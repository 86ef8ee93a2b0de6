"""LeViT (Graham et al., "LeViT: a Vision Transformer in ConvNet's Clothing for Faster Inference", 2021) as three steps
and one reducer, and the variant of it that Evo-LeViT (Xu et al. 2021) is built on.

A pyramid: a convolutional stem, then stages of blocks; a shrink block before each stage but the first halves the raster.

Legend: B images, Y X height and width, T tokens in, S tokens out or keys, N patch tokens, M patch tokens after a shrink,
D width in, E width out, H heads, C channels of a head's keys, V channels of its values, L classes.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from tif_jax.errors import InputError
from tif_jax.layers import BatchNorm, Linear, at_least_float32, drop_path, widened
from tif_jax.models.vit import DTYPES, FULL
from tif_jax.reducers import Aux, Reducer
from tif_jax.tokens import QueryKey, Tokens, row_numbers

PATCH_SIZE = 16  # pixels that the stem's four convolutions of stride 2 make one token of
_STRIDE = 2  # of a shrink block


class LinearNorm(nnx.Module):
    """A linear layer without bias, then batch normalisation whose scale starts at `scale`."""

    def __init__(self, width: int, out: int, *, scale: float = 1.0, dtype, rngs: nnx.Rngs):
        self.linear = Linear(width, out, use_bias=False, dtype=dtype, rngs=rngs)
        self.norm = BatchNorm(out, scale=scale)

    def __call__(self, x: Float[Array, "B T D"], training: bool) -> Float[Array, "B T E"]:
        return self.norm(self.linear(x), training)


class ConvNorm(nnx.Module):
    """A 3x3 convolution of stride 2, then batch normalisation."""

    def __init__(self, width: int, out: int, *, dtype, rngs: nnx.Rngs):
        self.conv = nnx.Conv(width, out, (3, 3), 2, padding=1, use_bias=False, dtype=dtype, rngs=rngs)
        self.norm = BatchNorm(out)

    def __call__(self, x: Float[Array, "B Y X D"], training: bool) -> Float[Array, "B _ _ E"]:
        return self.norm(self.conv(x), training)


class Stem(nnx.Module):
    """Four convolutions with Hardswish between: one token of `width` for 16x16 pixels."""

    def __init__(self, width: int, *, dtype, rngs: nnx.Rngs):
        widths = (3, width // 8, width // 4, width // 2, width)
        layers = [ConvNorm(widths[i], widths[i + 1], dtype=dtype, rngs=rngs) for i in range(4)]
        self.layer_0, self.layer_1, self.layer_2, self.layer_3 = layers

    def __call__(self, images: Float[Array, "B Y X 3"], training: bool) -> Float[Array, "B N D"]:
        x = self.layer_0(images, training)
        for layer in (self.layer_1, self.layer_2, self.layer_3):
            x = layer(jax.nn.hard_swish(x), training)
        return rearrange(x, "b y x d -> b (y x) d")


class Attention(nnx.Module):
    """Multi-head attention whose values have twice the channels of its keys; Hardswish before the output layer.

    grid: the raster for which there are biases, one per head and distance between rows and columns; None: no biases.
    """

    def __init__(
        self, width: int, num_heads: int, key_dim: int, *, grid: tuple[int, int] | None, dtype, rngs: nnx.Rngs
    ):
        self.num_heads, self.key_dim, self.grid = num_heads, key_dim, grid
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
        return self.out(jax.nn.hard_swish(mixed), training), QueryKey(query, key)


class ShrinkAttention(nnx.Module):
    """Attention of every second patch in both directions, and of the class token, to all tokens.

    Its values have four times the channels of its keys.
    """

    def __init__(
        self, width: int, out: int, key_dim: int, *, grid: tuple[int, int], biased: bool, dtype, rngs: nnx.Rngs
    ):
        self.num_heads, self.key_dim, self.grid, self.biased = width // key_dim, key_dim, grid, biased
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
        return self.out(jax.nn.hard_swish(mixed), training), QueryKey(query, key)


class FeedForward(nnx.Module):
    """Two linear layers with batch normalisation, Hardswish between."""

    def __init__(self, width: int, *, dtype, rngs: nnx.Rngs):
        self.up = LinearNorm(width, 2 * width, dtype=dtype, rngs=rngs)
        self.down = LinearNorm(2 * width, width, scale=0.0, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], training: bool) -> Float[Array, "B T D"]:
        return self.down(jax.nn.hard_swish(self.up(x, training)), training)


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
        dtype,
        rngs: nnx.Rngs,
    ):
        self.attention = Attention(width, num_heads, key_dim, grid=grid, dtype=dtype, rngs=rngs)
        self.mlp = FeedForward(width, dtype=dtype, rngs=rngs)
        self.drop_path = drop_path

    def attend(
        self, x: Float[Array, "B T D"], key_log_weight: Float[Array, "B T"] | None = None, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "B T D"], QueryKey]:
        """x plus attention. key_log_weight is added to the logits of each key before the softmax."""
        y, qk = self.attention(x, key_log_weight, rngs is not None)
        return x + drop_path(y, self.drop_path, rngs), qk

    def feed_forward(self, x: Float[Array, "B T D"], rngs: nnx.Rngs | None = None) -> Float[Array, "B T D"]:
        """x plus the feed-forward network."""
        return x + drop_path(self.mlp(x, rngs is not None), self.drop_path, rngs)

    def __call__(
        self, x: Float[Array, "B T D"], key_log_weight: Float[Array, "B T"] | None = None, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "B T D"], QueryKey]:
        x, qk = self.attend(x, key_log_weight, rngs)
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
        dtype,
        rngs: nnx.Rngs,
    ):
        """num_positions: rows of a position embedding that is added to its input; 0: none, but attention biases."""
        self.grid, self.num_positions, self.drop_path = grid, num_positions, drop_path
        if num_positions:
            self.position_embedding = _embedding(rngs, num_positions, width)
        self.attention = ShrinkAttention(
            width, out, key_dim, grid=grid, biased=not num_positions, dtype=dtype, rngs=rngs
        )
        self.mlp = FeedForward(out, dtype=dtype, rngs=rngs)

    def subsample(self, rows: Shaped[Array, "B N *rest"]) -> Shaped[Array, "B M *rest"]:
        """What belongs to the patches that become tokens of the smaller raster, of what belongs to all."""
        return subsample(rows, self.grid)

    def attend(
        self, x: Float[Array, "B T D"], key_log_weight: Float[Array, "B T"] | None = None, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "B S E"], QueryKey]:
        """The tokens of the smaller raster, behind the special ones. The query has S rows, the key T."""
        if self.num_positions:
            x = x + self.position_embedding[...].astype(x.dtype)
        return self.attention(x, key_log_weight, rngs is not None)

    def feed_forward(self, x: Float[Array, "B S E"], rngs: nnx.Rngs | None = None) -> Float[Array, "B S E"]:
        """x plus the feed-forward network."""
        return x + drop_path(self.mlp(x, rngs is not None), self.drop_path, rngs)

    def __call__(
        self, x: Float[Array, "B T D"], key_log_weight: Float[Array, "B T"] | None = None, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "B S E"], QueryKey]:
        x, qk = self.attend(x, key_log_weight, rngs)
        return self.feed_forward(x, rngs), qk


class Head(nnx.Module):
    """Batch normalisation, then a linear layer: class logits, at least float32."""

    def __init__(self, width: int, num_classes: int, *, dtype, rngs: nnx.Rngs):
        self.norm = BatchNorm(width)
        normal = nnx.initializers.truncated_normal(0.02)
        self.linear = nnx.Linear(width, num_classes, kernel_init=normal, dtype=dtype, rngs=rngs)
        self.out_features = num_classes

    def __call__(self, features: Float[Array, "B D"], training: bool) -> Float[Array, "B L"]:
        return at_least_float32(self.linear(self.norm(features, training)))


class LeViT(nnx.Module):
    """LeViT: `embed`, `encode` with a reducer, `predict`. Parameters are float32 for every dtype.

    widths, depths, num_heads: one entry for each stage. key_dim: channels of a key, the same in all heads.
    positions: 'relative' (LeViT: attention biases, which need the complete raster in every block) or 'absolute'
      (Evo-LeViT: position embeddings before the first block and before each shrink block).
    class_token: Evo-LeViT's; it ranks patches, the prediction is made of the patches' mean. Needs positions 'absolute'.
    distillation_head: a second head, whose mean with the first one is the prediction.
    class_head: as many heads on the class token. Their logits, in aux, are trained and predict nothing.

    With `rngs` batch statistics take the place of the running ones and update them (training); without, a call is
    deterministic and changes nothing. aux has the logits of each head, if there are several, as `logits/...`.
    Raises InputError for fields that do not fit together.
    """

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 224,
        widths: Sequence[int] = (128, 256, 384),
        depths: Sequence[int] = (2, 3, 4),
        num_heads: Sequence[int] = (4, 6, 8),
        key_dim: int = 16,
        num_classes: int = 1000,
        positions: str = "relative",
        class_token: bool = False,
        distillation_head: bool = True,
        class_head: bool = False,
        drop_path: float = 0.0,
        dtype: str = "float32",
        reducer: Reducer = FULL,
        rngs: nnx.Rngs,
    ):
        height, columns = (image_size, image_size) if isinstance(image_size, int) else image_size
        _check(height, columns, widths, depths, num_heads, key_dim, positions, class_token, class_head, dtype)
        if not getattr(reducer, "walks_pyramids", False):
            raise InputError(
                f"{type(reducer).__name__} can not reduce a LeViT, whose shrink blocks need the complete raster; "
                "use reducer 'full', or 'evo_levit' with a model evo_levit_..."
            )
        if reducer != FULL and not class_token:
            raise InputError(
                f"{type(reducer).__name__} needs a LeViT with class_token=True and positions='absolute': "
                "use a model evo_levit_..."
            )
        self.image_size, self.patch_size = (height, columns), PATCH_SIZE
        self.grid = grid = (height // PATCH_SIZE, columns // PATCH_SIZE)
        self.dtype = DTYPES[dtype]
        self.num_special = int(class_token)
        self.absolute = positions == "absolute"
        self.has_distillation, self.has_class_head = distillation_head, class_head

        def num_positions(grid):
            return (self.num_special + grid[0] * grid[1]) * self.absolute

        self.stem = Stem(widths[0], dtype=self.dtype, rngs=rngs)
        if class_token:
            self.class_token = _embedding(rngs, 1, widths[0])
        if self.absolute:
            self.position_embedding = _embedding(rngs, num_positions(grid), widths[0])
        blocks: list[Block | Shrink] = []
        common = dict(key_dim=key_dim, drop_path=drop_path, dtype=self.dtype, rngs=rngs)
        for stage, (width, depth, heads) in enumerate(zip(widths, depths, num_heads, strict=True)):
            if stage:
                blocks.append(Shrink(widths[stage - 1], width, grid=grid, num_positions=num_positions(grid), **common))
                grid = smaller(grid)
            blocks += [Block(width, heads, grid=None if self.absolute else grid, **common) for _ in range(depth)]
        for i, block in enumerate(blocks):
            setattr(self, f"block_{i}", block)
        self.depth = len(blocks)
        head = functools.partial(Head, widths[-1], num_classes, dtype=self.dtype, rngs=rngs)
        self.head = head()
        if distillation_head:
            self.distillation_head = head()
        if class_head:
            self.class_head = head()
            if distillation_head:
                self.class_distillation_head = head()
        self.reducer = reducer

    @property
    def blocks(self) -> Sequence[Block | Shrink]:
        return [getattr(self, f"block_{i}") for i in range(self.depth)]

    def embed(
        self, images: Float[Array | np.ndarray, "B Y X 3"], rngs: nnx.Rngs | None = None
    ) -> Float[Array, "B T D"]:
        """Tokens before the first block: the class token, if there is one, then the patches in raster order."""
        if images.shape[1:] != (*self.image_size, 3):
            raise InputError(
                f"images have shape {images.shape}; this model takes (B, {self.image_size[0]}, {self.image_size[1]}, 3)"
            )
        x = self.stem(jnp.asarray(images).astype(self.dtype), rngs is not None)
        if self.num_special:
            token = self.class_token[...].astype(self.dtype)
            x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], *token.shape[1:])), x], axis=1)
        return x + self.position_embedding[...].astype(self.dtype) if self.absolute else x

    def encode(self, x: Float[Array, "B T D"], rngs: nnx.Rngs | None = None) -> tuple[Float[Array, "B S E"], Aux]:
        """The tokens after the last block, as the reducer left them."""
        return self.reducer(self.blocks, x, self.tokens(x.shape[0]), rngs)

    def predict(
        self,
        x: Float[Array, "B S E"],
        aux: Aux,
        patch_weight: Float[Array, "B N"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "B L"], Aux]:
        """Class logits, float32. patch_weight: each patch token's share in the mean that is classified."""
        patches = at_least_float32(x[:, self.num_special :])
        weight = jnp.ones(patches.shape[:2], patches.dtype) if patch_weight is None else patch_weight
        pooled = jnp.einsum("bnd,bn->bd", patches, weight) / weight.sum(axis=1, keepdims=True)
        features, training = pooled.astype(self.dtype), rngs is not None
        logits = self.head(features, training)
        heads = {"logits/main": logits}
        if self.has_distillation:
            heads["logits/distillation"] = self.distillation_head(features, training)
            logits = (logits + heads["logits/distillation"]) / 2
        if self.has_class_head:
            heads["logits/class"] = self.class_head(x[:, 0], training)
            if self.has_distillation:
                heads["logits/class_distillation"] = self.class_distillation_head(x[:, 0], training)
        return logits, {**aux, **heads} if len(heads) > 1 else aux

    def __call__(
        self, images: Float[Array | np.ndarray, "B Y X 3"], rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "B L"], Aux]:
        """Class logits and the reducer's side channel. Deterministic unless `rngs` is given (training)."""
        x, aux = self.encode(self.embed(images, rngs), rngs)
        return self.predict(x, aux, rngs=rngs)

    def tokens(self, num_images: int) -> Tokens:
        """What the rows of `embed`'s output are."""
        index = row_numbers(num_images, self.grid[0] * self.grid[1])
        return Tokens(self.num_special, self.grid, index, has_class=self.num_special > 0)


def smaller(grid: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns after a shrink block."""
    return -(-grid[0] // _STRIDE), -(-grid[1] // _STRIDE)


def subsample(rows: Shaped[Array, "B N *rest"], grid: tuple[int, int]) -> Shaped[Array, "B M *rest"]:
    """Every second row and column of a raster, from the first."""
    raster = rows.reshape(rows.shape[0], *grid, *rows.shape[2:])[:, ::_STRIDE, ::_STRIDE]
    return raster.reshape(rows.shape[0], -1, *rows.shape[2:])


def _embedding(rngs: nnx.Rngs, num_tokens: int, width: int) -> nnx.Param:
    return nnx.Param(nnx.initializers.truncated_normal(0.02)(rngs.params(), (1, num_tokens, width), jnp.float32))


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
    query, key, value = (rearrange(x, "b t h c -> b h t c") for x in (query, key, value))
    logits = jnp.einsum("bhtc,bhsc->bhts", query, key, preferred_element_type=widened(query.dtype))
    logits = logits / query.shape[-1] ** 0.5
    if bias is not None:
        logits = logits + bias[None].astype(logits.dtype)
    if key_log_weight is not None:
        logits = logits + key_log_weight[:, None, None, :].astype(logits.dtype)
    mixed = jnp.einsum("bhts,bhsv->bhtv", jax.nn.softmax(logits, axis=-1).astype(value.dtype), value)
    return rearrange(mixed, "b h t v -> b t (h v)")


def _check(height, columns, widths, depths, num_heads, key_dim, positions, class_token, class_head, dtype) -> None:
    """Raises InputError for fields that do not fit together."""
    if height % PATCH_SIZE or columns % PATCH_SIZE:
        raise InputError(f"image_size {height}x{columns} is not a multiple of {PATCH_SIZE} in both directions")
    if not len(widths) == len(depths) == len(num_heads) > 0:
        raise InputError(
            f"widths {tuple(widths)}, depths {tuple(depths)} and num_heads {tuple(num_heads)} need one entry per stage"
        )
    if min(depths) < 1:
        raise InputError(f"depths is {tuple(depths)}; every stage needs a block")
    if widths[0] % 8:
        raise InputError(f"the first width is {widths[0]}; the stem needs a multiple of 8")
    if bad := [width for width in widths[:-1] if width % key_dim]:
        raise InputError(
            f"width {bad[0]} is not a multiple of key_dim {key_dim}, which the shrink block after it needs"
        )
    if positions not in ("relative", "absolute"):
        raise InputError(f"positions is {positions!r}; allowed: 'relative', 'absolute'")
    if class_token and positions == "relative":
        raise InputError("class_token=True needs positions='absolute': attention biases are for patches alone")
    if class_head and not class_token:
        raise InputError("class_head=True needs class_token=True")
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; allowed: {', '.join(map(repr, DTYPES))}")
