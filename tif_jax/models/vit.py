"""The Vision Transformer (Dosovitskiy et al. 2021; Touvron et al. 2021, 2022).

Legend: B images, Y X height and width, T tokens, S tokens left, N patch tokens, D width, F features,
L classes.
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
from tif_jax.models.pooling import POOLS, AttentionPooling, weighted_mean
from tif_jax.models.rotary import rotary_positions
from tif_jax.models.vit_blocks import GELUS, Block
from tif_jax.reducers import Aux, Reducer


class ViT(Model):
    """Vision Transformer: `embed`, `encode` with a reducer, `predict`. Parameters are float32 for every dtype.

    Fields beyond the obvious, with the checkpoints that need them:
      pool: 'class' (the class token), 'mean' (of the patch tokens left, then the norm: timm's fc_norm), 'normed_mean' (the
        norm of each patch token left, then their mean: I-JEPA, SigLIP's gap; timm's fc_norm=False), 'class_and_mean' (both,
        after the norm, one behind the other: DINOv2's linear classifiers) or 'attention' (`AttentionPooling`: SigLIP).
      num_classes: 0 is a model without a head, whose logits are the pooled features (DINOv2, SigLIP as published).
      pre_norm: a norm before the first block, and patches without a bias (CLIP).
      gelu: of the feed-forward networks, 'exact', 'tanh' (SigLIP) or 'quick' (OpenAI's CLIP).
      class_head: with a mean, a further norm and head on the class token. Its logits, aux['logits/class'], are trained
        and predict nothing (Evo-ViT: they teach the class token where to look).
      distillation_token: a second head's token (DeiT distilled): the prediction is the mean of both heads.
      num_registers: register tokens (Darcet et al. 2024), after the class token; they have no position embedding.
      special_positions: whether class and distillation token have one (DeiT: yes; DeiT III: no).
      absolute_positions: whether patches have a position embedding (DINOv3: no).
      rotary: rotary positions, of a kind of `models/rotary.py` ('eva02', 'dinov3', 'rope_vit'), or None. rotary_grid: rows
        and columns that coordinates are for, whatever the raster (EVA-02: 16). rotary_temperature: None is the kind's own.
      swiglu: SwiGLU, with mlp_dim products, in place of GELU (DINOv2 giant, EVA-02). attention_inner_norm, mlp_inner_norm: a
        norm before the last layer of each (EVA-02).
      layer_scale: initial value of LayerScale (DeiT III, DINOv2), or None.
      remat: for the gradient, what lies inside the half-steps of blocks is computed again instead of kept.

    Raises InputError for fields that do not fit together.
    """

    position_embedding: nnx.Param  # where absolute_positions

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
        pre_norm: bool = False,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        layer_scale: float | None = None,
        gelu: str = "exact",
        swiglu: bool = False,
        attention_inner_norm: bool = False,
        mlp_inner_norm: bool = False,
        rotary: str | None = None,
        rotary_grid: int | tuple[int, int] | None = None,
        rotary_temperature: float | None = None,
        absolute_positions: bool = True,
        norm_eps: float = 1e-6,
        drop_path: float = 0.0,
        remat: bool = False,
        dtype: str = "float32",
        reducer: Reducer = FULL,
        rngs: nnx.Rngs,
    ):
        self.image_size = height, columns = height_and_width(image_size)
        _check(height, columns, patch_size, width, num_heads, pool, class_token, gelu)
        _check_heads(num_classes, pool, class_token, class_head, distillation_token)
        self.dtype = dtype_named(dtype)
        self.grid = (height // patch_size, columns // patch_size)
        self.patch_size, self.pool, self.depth, self.reducer = patch_size, pool, depth, reducer
        self.has_distillation = distillation_token
        num_class, self.absolute = class_token + distillation_token, absolute_positions
        self.num_positioned = num_class * (special_positions and absolute_positions)
        self.num_special = num_class + num_registers
        self.patch_embedding = Linear(3 * patch_size**2, width, use_bias=not pre_norm, dtype=self.dtype, rngs=rngs)
        self._add_embeddings(width, int(class_token), int(distillation_token), num_registers, rngs)
        options: dict[str, Any] = dict(qkv_bias=qkv_bias, qk_norm=qk_norm, layer_scale=layer_scale, gelu=gelu)
        options |= dict(swiglu=swiglu, inner_norms=(attention_inner_norm, mlp_inner_norm))
        options |= dict(rotary=rotary_positions(rotary, width // num_heads, self.grid, rotary_grid, rotary_temperature))
        options |= dict(norm_eps=norm_eps, remat=remat, dtype=self.dtype, rngs=rngs)
        norm = partial(nnx.LayerNorm, width, epsilon=norm_eps, dtype=self.dtype, use_fast_variance=False, rngs=rngs)
        if pre_norm:
            self.pre_norm = norm()
        for i, rate in enumerate(drop_path * i / max(1, depth - 1) for i in range(depth)):
            setattr(self, f"block_{i}", Block(width, num_heads, mlp_dim or 4 * width, drop_path=rate, **options))
        if pool == "attention":
            of_pool = dict(gelu=gelu, norm_eps=norm_eps, dtype=self.dtype, rngs=rngs)
            self.attention_pool = AttentionPooling(width, num_heads, mlp_dim or 4 * width, **of_pool)
        self._add_heads(num_classes, width, class_head, norm, rngs)

    def _add_embeddings(self, width: int, class_token: int, distillation_token: int, num_registers: int, rngs) -> None:
        """Of positions, and the special tokens, by how many there are of each."""
        numbers = {"position_embedding": (self.num_positioned + math.prod(self.grid)) * self.absolute}
        numbers |= {"class_token": class_token, "distillation_token": distillation_token}
        for name, number in (numbers | {"register_tokens": num_registers}).items():
            if number:
                setattr(self, name, token_embedding(rngs, number, width))

    def _add_heads(self, num_classes: int, width: int, class_head: bool, norm: Any, rngs: nnx.Rngs) -> None:
        normal, num_features = nnx.initializers.truncated_normal(0.02), width * (1 + (self.pool == "class_and_mean"))
        head = partial(nnx.Linear, num_features, num_classes, kernel_init=normal, dtype=self.dtype, rngs=rngs)
        self.norm = norm()
        if num_classes:
            self.head = head()
        if num_classes and self.has_distillation:
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
        patches = self.patch_embedding(patches) + self._patch_positions()
        special = [
            jnp.broadcast_to(token.astype(self.dtype), (images.shape[0], *token.shape[1:]))
            for token in self._special_tokens()
        ]
        x = jnp.concatenate([*special, patches], axis=1)
        return self.pre_norm(x) if hasattr(self, "pre_norm") else x

    def predict(
        self,
        x: Float[Array, "B S D"],
        aux: Aux,
        patch_weight: Float[Array, "B N"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "B L"], Aux]:
        """Class logits, float32. patch_weight: each patch token's share where patches are pooled (the oracle's gates).

        Where a reducer masks patches instead of removing them, aux['mask'] is their share. In attention pooling a token
        that stands for aux['size'] patches counts as often (ToMe's proportional attention); in a mean, once.
        """
        if patch_weight is None:
            patch_weight = aux.get("mask", aux.get("size") if self.pool == "attention" else None)
        features = self._pooled(x, patch_weight)
        logits = at_least_float32(self.head(features) if self.num_classes else features)
        if hasattr(self, "class_head"):
            aux = {**aux, "logits/main": logits}
            aux["logits/class"] = at_least_float32(self.class_head(self.class_norm(x[:, 0])))
        if self.has_distillation:
            distilled = self.norm(x[:, 1])
            distilled = at_least_float32(self.distillation_head(distilled) if self.num_classes else distilled)
            aux = {**aux, "logits/main": logits, "logits/distillation": distilled}
            logits = (logits + distilled) / 2
        return logits, aux

    def _pooled(self, x: Float[Array, "B S D"], weight: Float[Array, "B N"] | None) -> Float[Array, "B F"]:
        """The features that the head reads."""
        if self.pool == "class":
            return self.norm(x[:, 0])
        patches = x[:, self.num_special :]
        if self.pool == "mean":
            return self.norm(weighted_mean(patches, weight))
        if self.pool == "attention":
            return self.attention_pool(self.norm(patches), weight)
        mean = weighted_mean(self.norm(patches), weight)
        return mean if self.pool == "normed_mean" else jnp.concatenate([self.norm(x[:, 0]), mean], axis=-1)

    def patch_positions(self) -> Float[Array, "1 N D"]:
        """What `content` masking leaves of the patch tokens: their position embedding, as the first block gets it."""
        positions = self._patch_positions()
        return self.pre_norm(positions) if hasattr(self, "pre_norm") else positions

    def _patch_positions(self) -> Float[Array, "1 N D"]:
        if not self.absolute:
            return jnp.zeros((1, math.prod(self.grid), self.norm.num_features), self.dtype)
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


def _check(height, columns, patch_size, width, num_heads, pool, class_token, gelu) -> None:
    """Raises InputError for fields that do not fit together."""
    if height % patch_size or columns % patch_size:
        raise InputError(
            f"image_size {height}x{columns} is not a multiple of patch_size {patch_size} in both directions"
        )
    if width % num_heads:
        raise InputError(f"width {width} is not a multiple of num_heads {num_heads}")
    if pool not in POOLS:
        raise InputError(f"pool is {pool!r}; allowed: {', '.join(map(repr, POOLS))}")
    if pool.startswith("class") and not class_token:
        raise InputError(f"pool {pool!r} needs class_token=True")
    if gelu not in GELUS:
        raise InputError(f"gelu is {gelu!r}; allowed: {', '.join(map(repr, GELUS))}")


def _check_heads(num_classes, pool, class_token, class_head, distillation_token) -> None:
    """Raises InputError for heads that do not fit the pooling."""
    if class_head and not (class_token and not pool.startswith("class") and num_classes):
        raise InputError(
            "class_head needs class_token=True and pool 'mean', 'normed_mean' or 'attention', and num_classes; otherwise "
            "the class token has the head"
        )
    if distillation_token and pool == "class_and_mean":
        raise InputError(
            "pool 'class_and_mean' does not go with a distillation token, whose head reads the token alone"
        )
