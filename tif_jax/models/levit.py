"""LeViT (Graham et al., "LeViT: a Vision Transformer in ConvNet's Clothing for Faster Inference", 2021), and the variant of
it that Evo-LeViT (Xu et al. 2021) is built on.

A pyramid: a convolutional stem, then stages of blocks; a shrink block before each stage but the first halves the raster.

Legend: B images, Y X height and width, T tokens, S tokens left, N patch tokens, D width in, E width out, L classes.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from tif_jax.errors import InputError
from tif_jax.layers import BatchNorm, at_least_float32
from tif_jax.models.levit_blocks import ACTIVATIONS, Block, Shrink, smaller
from tif_jax.models.model import FULL, Model, check_images, dtype_named, height_and_width, token_embedding
from tif_jax.reducers import Aux, Reducer

PATCH_SIZE = 16  # pixels that the stem's four convolutions of stride 2 make one token of


class ConvNorm(nnx.Module):
    """A 3x3 convolution of stride 2, then batch normalisation."""

    def __init__(self, width: int, out: int, *, dtype, rngs: nnx.Rngs):
        self.conv = nnx.Conv(width, out, (3, 3), 2, padding=1, use_bias=False, dtype=dtype, rngs=rngs)
        self.norm = BatchNorm(out)

    def __call__(self, x: Float[Array, "B Y X D"], training: bool) -> Float[Array, "B _ _ E"]:
        return self.norm(self.conv(x), training)


class Stem(nnx.Module):
    """Four convolutions with the activation between: one token of `width` for 16x16 pixels."""

    def __init__(self, width: int, *, activation: str, dtype, rngs: nnx.Rngs):
        self.activation = activation
        widths = (3, width // 8, width // 4, width // 2, width)
        layers = [ConvNorm(widths[i], widths[i + 1], dtype=dtype, rngs=rngs) for i in range(4)]
        self.layer_0, self.layer_1, self.layer_2, self.layer_3 = layers

    def __call__(self, images: Float[Array, "B Y X 3"], training: bool) -> Float[Array, "B N D"]:
        x = self.layer_0(images, training)
        for layer in (self.layer_1, self.layer_2, self.layer_3):
            x = layer(ACTIVATIONS[self.activation](x), training)
        return rearrange(x, "b y x d -> b (y x) d")


class Head(nnx.Module):
    """Batch normalisation, then a linear layer: class logits, at least float32."""

    def __init__(self, width: int, num_classes: int, *, dtype, rngs: nnx.Rngs):
        self.norm = BatchNorm(width)
        normal = nnx.initializers.truncated_normal(0.02)
        self.linear = nnx.Linear(width, num_classes, kernel_init=normal, dtype=dtype, rngs=rngs)
        self.out_features = num_classes

    def __call__(self, features: Float[Array, "B D"], training: bool) -> Float[Array, "B L"]:
        return at_least_float32(self.linear(self.norm(features, training)))


class LeViT(Model):
    """LeViT: `embed`, `encode` with a reducer, `predict`. Parameters are float32 for every dtype.

    widths, depths, num_heads: one entry for each stage. key_dim: channels of a key, the same in all heads.
    positions: 'relative' (LeViT: attention biases, which need the complete raster in every block) or 'absolute'
      (Evo-LeViT: position embeddings before the first block and before each shrink block).
    class_token: Evo-LeViT's; it ranks patches, the prediction is made of the patches' mean. Needs positions 'absolute'.
    distillation_head: a second head, whose mean with the first one is the prediction.
    class_head: as many heads on the class token. Their logits, in aux, are trained and predict nothing.
    activation: 'hard_swish' (the paper's) or 'silu' (timm's levit_256d, levit_512 and levit_512d).

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
        activation: str = "hard_swish",
        drop_path: float = 0.0,
        dtype: str = "float32",
        reducer: Reducer = FULL,
        rngs: nnx.Rngs,
    ):
        self.image_size = height, columns = height_and_width(image_size)
        _check(height, columns, widths, depths, num_heads, key_dim, positions, class_token, class_head, activation)
        _check_reducer(reducer, class_token)
        if not num_classes:
            raise InputError("num_classes is 0; a LeViT has a head: give 1 or more")
        self.dtype = dtype_named(dtype)
        self.patch_size, self.grid = PATCH_SIZE, (height // PATCH_SIZE, columns // PATCH_SIZE)
        self.num_special, self.absolute, self.reducer = int(class_token), positions == "absolute", reducer
        self.has_distillation, self.has_class_head = distillation_head, class_head
        common: dict[str, Any] = dict(dtype=self.dtype, rngs=rngs)
        self.stem = Stem(widths[0], activation=activation, **common)
        if class_token:
            self.class_token = token_embedding(rngs, 1, widths[0])
        if self.absolute:
            self.position_embedding = token_embedding(rngs, self.num_special + math.prod(self.grid), widths[0])
        blocks = self._pyramid(
            widths, depths, num_heads, key_dim=key_dim, drop_path=drop_path, activation=activation, **common
        )
        for i, block in enumerate(blocks):
            setattr(self, f"block_{i}", block)
        self.depth = len(blocks)
        head = partial(Head, widths[-1], num_classes, **common)
        self.head = head()
        if distillation_head:
            self.distillation_head = head()
        if class_head:
            self.class_head = head()
            if distillation_head:
                self.class_distillation_head = head()

    def _pyramid(self, widths, depths, num_heads, **common: Any) -> list[Block | Shrink]:
        """The stages' blocks, and before each stage but the first a shrink block."""
        grid, blocks = self.grid, list[Block | Shrink]()
        for stage, (width, depth, heads) in enumerate(zip(widths, depths, num_heads, strict=True)):
            if stage:
                num_positions = (self.num_special + math.prod(grid)) * self.absolute
                blocks.append(Shrink(widths[stage - 1], width, grid=grid, num_positions=num_positions, **common))
                grid = smaller(grid)
            blocks += [Block(width, heads, grid=None if self.absolute else grid, **common) for _ in range(depth)]
        return blocks

    def embed(
        self, images: Float[Array | np.ndarray, "B Y X 3"], rngs: nnx.Rngs | None = None
    ) -> Float[Array, "B T D"]:
        """Tokens before the first block: the class token, if there is one, then the patches in raster order."""
        check_images(self, images)
        x = self.stem(jnp.asarray(images).astype(self.dtype), rngs is not None)
        if self.num_special:
            token = self.class_token[...].astype(self.dtype)
            x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], *token.shape[1:])), x], axis=1)
        return x + self.position_embedding[...].astype(self.dtype) if self.absolute else x

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


def _check(height, columns, widths, depths, num_heads, key_dim, positions, class_token, class_head, activation) -> None:
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
    if activation not in ACTIVATIONS:
        raise InputError(f"activation is {activation!r}; allowed: {', '.join(map(repr, ACTIVATIONS))}")
    if class_token and positions == "relative":
        raise InputError("class_token=True needs positions='absolute': attention biases are for patches alone")
    if class_head and not class_token:
        raise InputError("class_head=True needs class_token=True")


def _check_reducer(reducer: Reducer, class_token: bool) -> None:
    """Raises InputError for a reducer that can not walk over this pyramid."""
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
