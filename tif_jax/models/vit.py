"""The Vision Transformer (Dosovitskiy et al. 2021; Touvron et al. 2021, 2022).

Legend: B images, Y X height and width, T tokens, S tokens left, N patch tokens, D width, F features,
L classes.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from tif_jax import tasks
from tif_jax.errors import InputError
from tif_jax.layers import Linear, at_least_float32
from tif_jax.models.grids import FILLS, Watch, in_the_end, to_grid
from tif_jax.models.heads import build_decoder
from tif_jax.models.model import FULL, Model, check_images, dtype_named, token_embedding
from tif_jax.models.pooling import POOLS, AttentionPooling, weighted_mean
from tif_jax.models.rotary import rotary_positions
from tif_jax.models.special_alone import SpecialAlone
from tif_jax.models.vit_blocks import GELUS, Block
from tif_jax.models.vit_fields import check_dense, check_heads, check_names, checked_size, chosen_blocks
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
      task: 'classification', or what is predicted for every pixel: 'depth' (metres, between 0 and max_depth) or
        'segmentation' (logits of num_classes classes). Then in place of a pool and a head there are
        decoder: 'dpt' (`heads.DptDecoder`, of decoder_width channels) or 'linear' (`heads.LinearDecoder`), which reads the
        features of decoder_blocks after `norm` (None: the last of each quarter), on the raster whatever the reducer did;
        fill: what stands for a dropped patch there (`grids.to_grid`).
      lean_last_block: with pool 'class', a call of the model computes no patch in the last block, since no head reads one;
        `encode` does. False: a call does, too, as in published costs.
      remat: for the gradient, what lies inside the half-steps of blocks is computed again instead of kept.

    Raises InputError for fields that do not fit together.
    """

    position_embedding: nnx.Param  # where absolute_positions
    decoder_blocks: tuple[int, ...] = ()  # of a dense task

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
        task: str = "classification",
        decoder: str = "dpt",
        decoder_width: int = 64,
        decoder_blocks: tuple[int, ...] | None = None,
        max_depth: float = 10.0,
        fill: str = "position",
        drop_path: float = 0.0,
        lean_last_block: bool = True,
        remat: bool = False,
        dtype: str = "float32",
        reducer: Reducer = FULL,
        rngs: nnx.Rngs,
    ):
        self.image_size = height, columns = checked_size(image_size, patch_size, width, num_heads)
        check_names(pool=(pool, POOLS), gelu=(gelu, GELUS), task=(task, tasks.TASKS), fill=(fill, FILLS))
        self.dtype, self.task, self.fill, self.max_depth = dtype_named(dtype), task, fill, max_depth
        self.grid, self.patch_size, self.pool = (height // patch_size, columns // patch_size), patch_size, pool
        self.depth, self.reducer, self.absolute, self.lean = depth, reducer, absolute_positions, lean_last_block
        self.patch_embedding = Linear(3 * patch_size**2, width, use_bias=not pre_norm, dtype=self.dtype, rngs=rngs)
        self._add_embeddings(width, class_token, distillation_token, num_registers, special_positions, rngs)
        inner, sizes = (attention_inner_norm, mlp_inner_norm), (width, num_heads, mlp_dim or 4 * width)
        options: dict[str, Any] = dict(qkv_bias=qkv_bias, qk_norm=qk_norm, layer_scale=layer_scale, inner_norms=inner)
        options |= dict(rotary=rotary_positions(rotary, width // num_heads, self.grid, rotary_grid, rotary_temperature))
        options |= dict(swiglu=swiglu, remat=remat)
        common: dict[str, Any] = dict(gelu=gelu, norm_eps=norm_eps, dtype=self.dtype, rngs=rngs)
        norm = partial(nnx.LayerNorm, width, epsilon=norm_eps, dtype=self.dtype, use_fast_variance=False, rngs=rngs)
        self._add_blocks(sizes, drop_path, norm if pre_norm else None, options | common)
        if task == "classification":
            self._add_heads(num_classes, width, class_head, norm, partial(AttentionPooling, *sizes, **common))
        else:
            self._add_decoder(decoder, width, decoder_width, decoder_blocks, num_classes, class_head, norm)

    def _add_embeddings(self, width, class_token, distillation_token, num_registers, special_positions, rngs) -> None:
        """Of positions, and the special tokens, by how many there are of each."""
        self.has_distillation, num_class = distillation_token, class_token + distillation_token
        self.num_special, self.num_positioned = num_class + num_registers, num_class * special_positions * self.absolute
        numbers = {"position_embedding": (self.num_positioned + math.prod(self.grid)) * self.absolute}
        numbers |= {"class_token": int(class_token), "distillation_token": int(distillation_token)}
        for name, number in (numbers | {"register_tokens": num_registers}).items():
            if number:
                setattr(self, name, token_embedding(rngs, number, width))

    def _add_blocks(self, sizes: tuple[int, int, int], drop_path: float, pre_norm: Any, options) -> None:
        """And the norm that stands before the first, if there is one. sizes: width, heads, mlp_dim."""
        width, num_heads, mlp_dim = sizes
        if pre_norm:
            self.pre_norm = pre_norm()
        for i, rate in enumerate(drop_path * i / max(1, self.depth - 1) for i in range(self.depth)):
            setattr(self, f"block_{i}", Block(width, num_heads, mlp_dim, drop_path=rate, **options))

    def _add_decoder(self, name, width: int, channels: int, blocks, num_classes: int, class_head: bool, norm) -> None:
        check_dense(self.task, num_classes, class_head or self.has_distillation)
        self.decoder_blocks = chosen_blocks(blocks, self.depth)
        self.norm = norm()
        sizes = width, channels, len(self.decoder_blocks), num_classes or 1
        self.decoder = build_decoder(name, *sizes, dtype=self.dtype, rngs=norm.keywords["rngs"])

    def _add_heads(self, num_classes: int, width: int, class_head: bool, norm: Any, pooling: Any) -> None:
        check_heads(num_classes, self.pool, hasattr(self, "class_token"), class_head, self.has_distillation)
        normal, num_features = nnx.initializers.truncated_normal(0.02), width * (1 + (self.pool == "class_and_mean"))
        given = dict(kernel_init=normal, dtype=self.dtype, rngs=norm.keywords["rngs"])
        head = partial(nnx.Linear, num_features, num_classes, **given)
        if self.pool == "attention":
            self.attention_pool = pooling()
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

    @property
    def num_classes(self) -> int:
        """Outputs of the head, or classes of a pixel; 0 without a head, and of depth."""
        return self.decoder.num_outputs if self.task == "segmentation" else super().num_classes

    @property
    def blocks_of_prediction(self) -> Sequence[Any]:
        """The blocks; of the last one only the special tokens that heads read, where no head reads patches."""
        *blocks, last = self.blocks
        lean = self.lean and self.task == "classification" and self.pool == "class"
        return [*blocks, SpecialAlone(last, 1 + self.has_distillation) if lean else last]

    def encode(
        self,
        x: Float[Array, "B T D"],
        rngs: nnx.Rngs | None = None,
        *,
        blocks: Sequence[Any] | None = None,
        reducer: Reducer | None = None,
    ) -> tuple[Float[Array, "B S D"], Aux]:
        """As `Model.encode`; for a dense task aux has the features that the decoder reads, too: `blocks/I`."""
        if not self.decoder_blocks:
            return super().encode(x, rngs, blocks=blocks, reducer=reducer)
        watch = Watch(self.blocks if blocks is None else blocks)
        left, aux = super().encode(x, rngs, blocks=watch.blocks, reducer=reducer)
        patches = x[:, self.num_special :]
        grids = watch.grids(self.decoder_blocks, left, aux, self.tokens(x.shape[0]), self.fill, patches)
        return left, {**aux, **{f"blocks/{i}": grid for i, grid in grids.items()}}

    def predict(
        self,
        x: Float[Array, "B S D"],
        aux: Aux,
        patch_weight: Float[Array, "B N"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "B *prediction"], Aux]:
        """Class logits, or what the decoder makes of aux['blocks/...'], float32.

        patch_weight: each patch token's share where patches are pooled (the oracle's gates).

        Where a reducer masks patches instead of removing them, aux['mask'] is their share. In attention pooling a token
        that stands for aux['size'] patches counts as often (ToMe's proportional attention); in a mean, once.
        """
        if self.task != "classification":
            return self._decoded(aux)
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

    def to_grid(
        self, x: Float[Array, "B S D"], aux: Aux, embedded: Float[Array, "B T D"] | None = None
    ) -> Float[Array, "B rows columns D"]:
        """Every patch of the raster as `encode` left it (`grids.to_grid`), whatever the reducer. x, aux: what that returned.

        embedded: what `embed` returned, where the field `fill` is 'embedding'.
        """
        patches = None if embedded is None else embedded[:, self.num_special :]
        return to_grid(x, in_the_end(x, aux, self.tokens(x.shape[0])), self.fill, patches)

    def _decoded(self, aux: Aux) -> tuple[Float[Array, "B *prediction"], Aux]:
        """Depth in metres or class logits of every pixel, and aux without the features."""
        features = [self.norm(aux[f"blocks/{i}"]) for i in self.decoder_blocks]
        rest = {name: value for name, value in aux.items() if not name.startswith("blocks/")}
        found = self.decoder(features, self.image_size)
        # The 1: where a fresh decoder says nothing yet, depth is 2.7 m of 10, about that of a room.
        return (self.max_depth * jax.nn.sigmoid(found[..., 0] - 1) if self.task == "depth" else found), rest

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
