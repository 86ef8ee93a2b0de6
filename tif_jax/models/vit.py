"""The Vision Transformer (Dosovitskiy et al. 2021; Touvron et al. 2021, 2022).

Legend: B images, Y X height and width, T tokens, S tokens left, N patch tokens, D width, L classes.
"""

import math
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from tif_jax.errors import InputError
from tif_jax.layers import Linear, at_least_float32
from tif_jax.models.model import FULL, Model, check_images, dtype_named, height_and_width, token_embedding
from tif_jax.models.vit_blocks import Block
from tif_jax.reducers import Aux, Reducer


class ViT(Model):
    """Vision Transformer: `embed`, `encode` with a reducer, `predict`. Parameters are float32 for every dtype.

    Fields beyond the obvious, with the checkpoints that need them:
      pool: 'class' (the class token), 'mean' (of the patch tokens left, then the norm: timm's fc_norm) or 'normed_mean' (the
        norm of each patch token left, then their mean: SigLIP, I-JEPA; timm's fc_norm=False).
      class_head: with a mean, a further norm and head on the class token. Its logits, aux['logits/class'], are trained
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
        self.image_size = height, columns = height_and_width(image_size)
        _check(height, columns, patch_size, width, num_heads, pool, class_token, class_head, gelu)
        self.dtype = dtype_named(dtype)
        self.grid = (height // patch_size, columns // patch_size)
        self.patch_size, self.pool, self.depth, self.reducer = patch_size, pool, depth, reducer
        self.has_distillation = distillation_token
        num_class = int(class_token) + int(distillation_token)
        self.num_positioned, self.num_special = num_class * special_positions, num_class + num_registers
        embedding = partial(token_embedding, rngs, width=width)
        self.patch_embedding = Linear(3 * patch_size**2, width, dtype=self.dtype, rngs=rngs)
        self.position_embedding = embedding(self.num_positioned + math.prod(self.grid))
        if class_token:
            self.class_token = embedding(1)
        if distillation_token:
            self.distillation_token = embedding(1)
        if num_registers:
            self.register_tokens = embedding(num_registers)
        options: dict[str, Any] = dict(qkv_bias=qkv_bias, qk_norm=qk_norm, layer_scale=layer_scale, gelu=gelu)
        options |= dict(norm_eps=norm_eps, remat=remat, dtype=self.dtype, rngs=rngs)
        for i in range(depth):
            rate = drop_path * i / max(1, depth - 1)
            setattr(self, f"block_{i}", Block(width, num_heads, mlp_dim or 4 * width, drop_path=rate, **options))
        norm = partial(nnx.LayerNorm, width, epsilon=norm_eps, dtype=self.dtype, use_fast_variance=False, rngs=rngs)
        normal = nnx.initializers.truncated_normal(0.02)
        head = partial(nnx.Linear, width, num_classes, kernel_init=normal, dtype=self.dtype, rngs=rngs)
        self.norm, self.head = norm(), head()
        if distillation_token:
            self.distillation_head = head()
        if class_head:
            self.class_norm, self.class_head = norm(), head()

    def embed(
        self, images: Float[Array | np.ndarray, "B Y X 3"], rngs: nnx.Rngs | None = None
    ) -> Float[Array, "B T D"]:
        """Tokens before the first block: class, distillation and register tokens, then the patches in raster order."""
        check_images(self, images)
        p = self.patch_size
        patches = rearrange(jnp.asarray(images), "b (y p) (x q) c -> b (y x) (p q c)", p=p, q=p).astype(self.dtype)
        patches = self.patch_embedding(patches) + self.patch_positions()
        special = [
            jnp.broadcast_to(token.astype(self.dtype), (images.shape[0], *token.shape[1:]))
            for token in self._special_tokens()
        ]
        return jnp.concatenate([*special, patches], axis=1)

    def predict(
        self,
        x: Float[Array, "B S D"],
        aux: Aux,
        patch_weight: Float[Array, "B N"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "B L"], Aux]:
        """Class logits, float32. patch_weight: each patch token's share in the mean, if one is pooled (the oracle's gates).

        Where a reducer masks patches instead of removing them, aux['mask'] is their share.
        """
        if patch_weight is None:
            patch_weight = aux.get("mask")
        if self.pool == "class":
            features = self.norm(x[:, 0])
        else:
            patches = x[:, self.num_special :]
            patches = at_least_float32(self.norm(patches) if self.pool == "normed_mean" else patches)
            weight = jnp.ones(patches.shape[:2], patches.dtype) if patch_weight is None else patch_weight
            total = weight.sum(axis=1, keepdims=True)  # 0 where a mask left nothing: the features are then 0
            pooled = jnp.einsum("bnd,bn->bd", patches, weight) / jnp.where(total > 0, total, 1)
            features = pooled.astype(self.dtype)
            if self.pool == "mean":
                features = self.norm(features)
        logits = at_least_float32(self.head(features))
        if hasattr(self, "class_head"):
            aux = {**aux, "logits/main": logits}
            aux["logits/class"] = at_least_float32(self.class_head(self.class_norm(x[:, 0])))
        if self.has_distillation:
            distilled = at_least_float32(self.distillation_head(self.norm(x[:, 1])))
            aux = {**aux, "logits/main": logits, "logits/distillation": distilled}
            logits = (logits + distilled) / 2
        return logits, aux

    def patch_positions(self) -> Float[Array, "1 N D"]:
        """Position embedding of the patch tokens: what `content` masking leaves of a token."""
        return self.position_embedding[...][:, self.num_positioned :].astype(self.dtype)

    def _special_tokens(self) -> list[Float[Array, "1 _ D"]]:
        names = [name for name in ("class_token", "distillation_token") if hasattr(self, name)]
        special = [getattr(self, name)[...] for name in names]
        if self.num_positioned:
            special = [token + self.position_embedding[...][:, i : i + 1] for i, token in enumerate(special)]
        return special + ([self.register_tokens[...]] if hasattr(self, "register_tokens") else [])


def plain_vit(model: Model, what: str) -> ViT:
    """The model, if it is a ViT. Raises InputError for others, which can not do `what`."""
    if not isinstance(model, ViT):
        raise InputError(f"{what} needs a ViT; a {type(model).__name__} has no token for each patch in every block")
    return model


def _check(height, columns, patch_size, width, num_heads, pool, class_token, class_head, gelu) -> None:
    """Raises InputError for fields that do not fit together."""
    if height % patch_size or columns % patch_size:
        raise InputError(
            f"image_size {height}x{columns} is not a multiple of patch_size {patch_size} in both directions"
        )
    if width % num_heads:
        raise InputError(f"width {width} is not a multiple of num_heads {num_heads}")
    if pool not in ("class", "mean", "normed_mean"):
        raise InputError(f"pool is {pool!r}; allowed: 'class', 'mean', 'normed_mean'")
    if pool == "class" and not class_token:
        raise InputError("pool 'class' needs class_token=True")
    if class_head and not (class_token and pool != "class"):
        raise InputError(
            "class_head needs class_token=True and pool 'mean' or 'normed_mean'; otherwise the class token has the head"
        )
    if gelu not in ("exact", "tanh"):
        raise InputError(f"gelu is {gelu!r}; allowed: 'exact', 'tanh'")
