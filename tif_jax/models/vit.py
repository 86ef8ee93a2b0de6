"""The Vision Transformer (Dosovitskiy et al. 2021; Touvron et al. 2021, 2022) as three steps and one reducer.

The ViT knows no token-reduction method: `encode` hands its blocks to `self.reducer`, which owns how tokens travel
through them.

Legend: B images, Y X height and width, T tokens, S tokens left, N patch tokens, D width, H heads, C channels of a head,
L classes.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from tif_jax.errors import InputError
from tif_jax.layers import Linear, at_least_float32, drop_path, gelu
from tif_jax.reducers import Aux, Full, Reducer
from tif_jax.tokens import QueryKey, Tokens, attention_logits, row_numbers

FULL = Full()
_SMOOTHING = 1e-6  # of the softmax with masked keys, DynamicViT's
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float64": jnp.float64}  # float64: for checks, needs x64


class Attention(nnx.Module):
    """Multi-head self-attention; `qk_norm` normalises queries and keys per head (Dehghani et al. 2023)."""

    def __init__(
        self, width: int, num_heads: int, *, qkv_bias: bool, qk_norm: bool, norm_eps: float, dtype, rngs: nnx.Rngs
    ):
        self.num_heads = num_heads
        linear = partial(Linear, kernel_init=nnx.initializers.truncated_normal(0.02), dtype=dtype, rngs=rngs)
        self.qkv = linear(width, 3 * width, use_bias=qkv_bias)
        self.out = linear(width, width)
        if qk_norm:
            norm = partial(
                nnx.LayerNorm, width // num_heads, epsilon=norm_eps, dtype=dtype, use_fast_variance=False, rngs=rngs
            )
            self.query_norm, self.key_norm = norm(), norm()
        self.qk_norm = qk_norm

    def __call__(
        self,
        x: Float[Array, "B T D"],
        key_log_weight: Float[Array, "B T"] | None = None,
        key_weight: Float[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], QueryKey]:
        query, key, value = self.project(x)
        mixed = _attend(query, key, value, key_log_weight, key_weight)
        return self.out(rearrange(mixed, "b h t c -> b t (h c)")), QueryKey(query, key)

    def project(
        self, x: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B T H C"], Float[Array, "B T H C"], Float[Array, "B T H C"]]:
        """Queries, keys and values, after q/k norm."""
        query, key, value = rearrange(self.qkv(x), "b t (three h c) -> three b t h c", three=3, h=self.num_heads)
        if self.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        return query, key, value


def _attend(
    query: Float[Array, "B T H C"],
    key: Float[Array, "B T H C"],
    value: Float[Array, "B T H C"],
    key_log_weight: Float[Array, "B T"] | None,
    key_weight: Float[Array, "B T"] | None,
) -> Float[Array, "B H T C"]:
    """softmax(query key^T / sqrt(C) + key_log_weight) value, the softmax in float32 for bfloat16 too.

    Heads are made a batch axis first: on a CPU 1.5 times as fast as jax.nn.dot_product_attention, which keeps them third.
    """
    logits = attention_logits(query, key)
    value = rearrange(value, "b t h c -> b h t c")
    if key_log_weight is not None:
        logits = logits + key_log_weight[:, None, None, :].astype(logits.dtype)
    weights = jax.nn.softmax(logits, axis=-1) if key_weight is None else _masked_softmax(logits, key_weight)
    return jnp.einsum("bhts,bhsc->bhtc", weights.astype(value.dtype), value)


def _masked_softmax(logits: Float[Array, "B H T T"], key_weight: Float[Array, "B T"]) -> Float[Array, "B H T T"]:
    """Softmax over the keys in which exp(logit) counts key_weight times, a token's own always once; rows sum to 1.

    The smoothing bounds the gradient where all keys of weight 1 have exponentials that underflow.
    """
    num_tokens = logits.shape[-1]
    own = jnp.eye(num_tokens, dtype=logits.dtype)[None, None]
    weight = key_weight[:, None, None].astype(logits.dtype) * (1 - own) + own
    exponential = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))) * weight
    return (exponential + _SMOOTHING / num_tokens) / (exponential.sum(axis=-1, keepdims=True) + _SMOOTHING)


class FeedForward(nnx.Module):
    """Two linear layers with GELU between: 'exact' (erf: timm, DeiT) or 'tanh' (big_vision, SigLIP)."""

    def __init__(self, width: int, mlp_dim: int, *, gelu: str, dtype, rngs: nnx.Rngs):
        linear = partial(Linear, kernel_init=nnx.initializers.truncated_normal(0.02), dtype=dtype, rngs=rngs)
        self.up, self.down = linear(width, mlp_dim), linear(mlp_dim, width)
        self.gelu = gelu

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down(gelu(self.up(x), approximate=self.gelu == "tanh"))


class Block(nnx.Module):
    """A pre-norm Transformer block as two half-steps, so that a reducer can act between them."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_dim: int,
        *,
        qkv_bias: bool,
        qk_norm: bool,
        layer_scale: float | None,
        drop_path: float,
        gelu: str,
        norm_eps: float,
        remat: bool,
        dtype,
        rngs: nnx.Rngs,
    ):
        norm = partial(nnx.LayerNorm, width, epsilon=norm_eps, dtype=dtype, use_fast_variance=False, rngs=rngs)
        self.attention_norm = norm()
        self.attention = Attention(
            width, num_heads, qkv_bias=qkv_bias, qk_norm=qk_norm, norm_eps=norm_eps, dtype=dtype, rngs=rngs
        )
        self.feed_forward_norm = norm()
        self.mlp = FeedForward(width, mlp_dim, gelu=gelu, dtype=dtype, rngs=rngs)
        if layer_scale is not None:
            self.attention_scale = nnx.Param(jnp.full((width,), layer_scale))
            self.feed_forward_scale = nnx.Param(jnp.full((width,), layer_scale))
        self.layer_scale = layer_scale
        self.drop_path = drop_path
        self.remat = remat

    def attend(
        self,
        x: Float[Array, "B T D"],
        key_log_weight: Float[Array, "B T"] | None = None,
        rngs: nnx.Rngs | None = None,
        key_weight: Float[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], QueryKey]:
        """x plus attention. key_log_weight is added to the logits of each key before the softmax.

        key_weight, in [0, 1], is a soft mask: it multiplies each key's exponential for every query but the key's own, so
        that a masked token still attends to itself. Unlike a logarithm, it has a gradient where it is 0.
        """

        def branch(x, key_log_weight, key_weight):
            y, qk = self.attention(self.attention_norm(x), key_log_weight, key_weight)
            return self.scale_attention(y), qk

        y, qk = self._kept(branch)(x, key_log_weight, key_weight)
        return x + drop_path(y, self.drop_path, rngs), qk

    def _kept(self, branch):
        """The branch, of whose inside a gradient keeps nothing if `remat`."""
        return jax.checkpoint(branch) if self.remat else branch

    def scale_attention(self, y: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """LayerScale of the attention branch, where there is one."""
        return y if self.layer_scale is None else _scale(y, self.attention_scale[...])

    def feed_forward(self, x: Float[Array, "B T D"], rngs: nnx.Rngs | None = None) -> Float[Array, "B T D"]:
        """x plus the feed-forward network."""

        def branch(x):
            y = self.mlp(self.feed_forward_norm(x))
            return y if self.layer_scale is None else _scale(y, self.feed_forward_scale[...])

        return x + drop_path(self._kept(branch)(x), self.drop_path, rngs)

    def __call__(
        self, x: Float[Array, "B T D"], key_log_weight: Float[Array, "B T"] | None = None, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "B T D"], QueryKey]:
        x, qk = self.attend(x, key_log_weight, rngs)
        return self.feed_forward(x, rngs), qk


class ViT(nnx.Module):
    """Vision Transformer: `embed`, `encode` with a reducer, `predict`. Parameters are float32 for every dtype.

    Fields beyond the obvious, with the checkpoints that need them:
      pool: 'class' (the class token) or 'mean' (over the patch tokens left, then a norm of its own: timm's fc_norm).
      class_head: with pool 'mean', a further norm and head on the class token. Its logits, aux['logits/class'], are trained
        and predict nothing (Evo-ViT: they teach the class token where to look).
      distillation_token: a second head's token (DeiT distilled): the prediction is the mean of both heads.
      num_registers: register tokens (Darcet et al. 2024), after the class token; they have no position embedding.
      special_positions: whether class and distillation token have one (DeiT: yes; DeiT III: no).
      layer_scale: initial value of LayerScale (DeiT III, DINOv2), or None.
      remat: for the gradient, what lies inside the half-steps of blocks is computed again instead of kept.

    Raises InputError for fields that do not fit together.
    """

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        width: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_dim: int | None = None,
        num_classes: int = 1000,
        pool: str = "class",
        class_token: bool = True,
        class_head: bool = False,
        distillation_token: bool = False,
        num_registers: int = 0,
        special_positions: bool = True,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        layer_scale: float | None = None,
        gelu: str = "exact",
        norm_eps: float = 1e-6,
        drop_path: float = 0.0,
        remat: bool = False,
        dtype: str = "float32",
        reducer: Reducer = FULL,
        rngs: nnx.Rngs,
    ):
        height, columns = (image_size, image_size) if isinstance(image_size, int) else image_size
        if height % patch_size or columns % patch_size:
            raise InputError(
                f"image_size {height}x{columns} is not a multiple of patch_size {patch_size} in both directions"
            )
        if width % num_heads:
            raise InputError(f"width {width} is not a multiple of num_heads {num_heads}")
        if pool not in ("class", "mean"):
            raise InputError(f"pool is {pool!r}; allowed: 'class', 'mean'")
        if pool == "class" and not class_token:
            raise InputError("pool 'class' needs class_token=True")
        if class_head and not (class_token and pool == "mean"):
            raise InputError(
                "class_head needs class_token=True and pool 'mean'; otherwise the class token has the head"
            )
        if gelu not in ("exact", "tanh"):
            raise InputError(f"gelu is {gelu!r}; allowed: 'exact', 'tanh'")
        if dtype not in DTYPES:
            raise InputError(f"dtype is {dtype!r}; allowed: {', '.join(map(repr, DTYPES))}")
        self.image_size = (height, columns)
        self.patch_size = patch_size
        self.grid = (height // patch_size, columns // patch_size)
        self.pool = pool
        self.dtype = DTYPES[dtype]
        self.depth = depth
        self.num_positioned = (int(class_token) + int(distillation_token)) * special_positions
        self.num_special = int(class_token) + int(distillation_token) + num_registers

        normal = nnx.initializers.truncated_normal(0.02)

        def param(*shape):
            return nnx.Param(normal(rngs.params(), shape, jnp.float32))

        norm = partial(nnx.LayerNorm, width, epsilon=norm_eps, dtype=self.dtype, use_fast_variance=False, rngs=rngs)
        self.patch_embedding = Linear(3 * patch_size**2, width, dtype=self.dtype, rngs=rngs)
        self.position_embedding = param(1, self.num_positioned + self.grid[0] * self.grid[1], width)
        if class_token:
            self.class_token = param(1, 1, width)
        if distillation_token:
            self.distillation_token = param(1, 1, width)
        if num_registers:
            self.register_tokens = param(1, num_registers, width)
        for i in range(depth):
            block = Block(
                width,
                num_heads,
                mlp_dim or 4 * width,
                qkv_bias=qkv_bias,
                qk_norm=qk_norm,
                layer_scale=layer_scale,
                drop_path=drop_path * i / max(1, depth - 1),
                gelu=gelu,
                norm_eps=norm_eps,
                remat=remat,
                dtype=self.dtype,
                rngs=rngs,
            )
            setattr(self, f"block_{i}", block)
        self.norm = norm()
        self.head = nnx.Linear(width, num_classes, kernel_init=normal, dtype=self.dtype, rngs=rngs)
        if distillation_token:
            self.distillation_head = nnx.Linear(width, num_classes, kernel_init=normal, dtype=self.dtype, rngs=rngs)
        if class_head:
            self.class_norm = norm()
            self.class_head = nnx.Linear(width, num_classes, kernel_init=normal, dtype=self.dtype, rngs=rngs)
        self.has_distillation = distillation_token
        self.reducer = reducer

    @property
    def blocks(self) -> Sequence[Block]:
        return [getattr(self, f"block_{i}") for i in range(self.depth)]

    def embed(
        self, images: Float[Array | np.ndarray, "B Y X 3"], rngs: nnx.Rngs | None = None
    ) -> Float[Array, "B T D"]:
        """Tokens before the first block: class, distillation and register tokens, then the patches in raster order."""
        if images.shape[1:] != (*self.image_size, 3):
            raise InputError(
                f"images have shape {images.shape}; this model takes (B, {self.image_size[0]}, {self.image_size[1]}, 3)"
            )
        p = self.patch_size
        patches = rearrange(jnp.asarray(images), "b (y p) (x q) c -> b (y x) (p q c)", p=p, q=p).astype(self.dtype)
        patches = self.patch_embedding(patches) + self.patch_positions()
        special = [
            jnp.broadcast_to(token.astype(self.dtype), (images.shape[0], *token.shape[1:]))
            for token in self._special_tokens()
        ]
        return jnp.concatenate([*special, patches], axis=1)

    def encode(self, x: Float[Array, "B T D"], rngs: nnx.Rngs | None = None) -> tuple[Float[Array, "B S D"], Aux]:
        """The tokens after the last block, as the reducer left them."""
        return self.reducer(self.blocks, x, self.tokens(x.shape[0]), rngs)

    def predict(
        self,
        x: Float[Array, "B S D"],
        aux: Aux,
        patch_weight: Float[Array, "B N"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "B L"], Aux]:
        """Class logits, float32. patch_weight: each patch token's share under mean pooling (the oracle's gates).

        Where a reducer masks patches instead of removing them, aux['mask'] is their share.
        """
        if patch_weight is None:
            patch_weight = aux.get("mask")
        if self.pool == "mean":
            patches = at_least_float32(x[:, self.num_special :])
            weight = jnp.ones(patches.shape[:2], patches.dtype) if patch_weight is None else patch_weight
            total = weight.sum(axis=1, keepdims=True)  # 0 where a mask left nothing: the features are then 0
            pooled = jnp.einsum("bnd,bn->bd", patches, weight) / jnp.where(total > 0, total, 1)
            features = self.norm(pooled.astype(self.dtype))
        else:
            features = self.norm(x[:, 0])
        logits = at_least_float32(self.head(features))
        if hasattr(self, "class_head"):
            aux = {**aux, "logits/main": logits}
            aux["logits/class"] = at_least_float32(self.class_head(self.class_norm(x[:, 0])))
        if self.has_distillation:
            distilled = at_least_float32(self.distillation_head(self.norm(x[:, 1])))
            aux = {**aux, "logits/main": logits, "logits/distillation": distilled}
            logits = (logits + distilled) / 2
        return logits, aux

    def __call__(
        self, images: Float[Array | np.ndarray, "B Y X 3"], rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "B L"], Aux]:
        """Class logits and the reducer's side channel. Deterministic unless `rngs` is given (training)."""
        x, aux = self.encode(self.embed(images, rngs), rngs)
        return self.predict(x, aux, rngs=rngs)

    def tokens(self, num_images: int) -> Tokens:
        """What the rows of `embed`'s output are."""
        index = row_numbers(num_images, self.grid[0] * self.grid[1])
        return Tokens(self.num_special, self.grid, index, has_class=hasattr(self, "class_token"))

    def patch_positions(self) -> Float[Array, "1 N D"]:
        """Position embedding of the patch tokens: what `content` masking leaves of a token."""
        return self.position_embedding[...][:, self.num_positioned :].astype(self.dtype)

    def _special_tokens(self) -> list[Float[Array, "1 _ D"]]:
        names = [name for name in ("class_token", "distillation_token") if hasattr(self, name)]
        special = [getattr(self, name)[...] for name in names]
        if self.num_positioned:
            special = [token + self.position_embedding[...][:, i : i + 1] for i, token in enumerate(special)]
        return special + ([self.register_tokens[...]] if hasattr(self, "register_tokens") else [])


def _scale(y: Float[Array, "... D"], scale: Float[Array, " D"]) -> Float[Array, "... D"]:
    return y * scale.astype(y.dtype).reshape(*(1,) * (y.ndim - 1), -1)
