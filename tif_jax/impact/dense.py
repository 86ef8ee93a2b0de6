"""What a dense head makes of tokens of which some are masked, or gated.

A patch that is absent from the tokens is filled on the raster like any that was dropped (`models.grids`). A gate w in [0, 1]
does so by degrees: beside what it is in attention, the patch on the raster is

    w * its own feature + (1 - w) * that of its stand-in

where the stand-in is the nearest other patch whose gate is above 1/2: nearest as the model's `fill` says, on the raster or by
embedding. So a gate of 0 is a dropped patch, and there is a derivative at 1: which patch stands in has none.

Legend: B images, T tokens, N patch tokens, P patches of the raster, D width.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tif_jax.layers import widened
from tif_jax.models.grids import nearest, to_grid
from tif_jax.models.vit import ViT
from tif_jax.models.vit_blocks import Block
from tif_jax.reducers import Aux
from tif_jax.tokens import Tokens, gates_to_log_weight, join, split, take


def dense_prediction(
    model: ViT,
    blocks: Sequence[Block],
    x: Float[Array, "B T D"],
    tokens: Tokens,
    embedded: Float[Array, "B P D"],
    gates: Float[Array, "B N"] | None = None,
) -> tuple[Float[Array, "B *prediction"], Aux]:
    """The prediction for every pixel, and its aux, when x goes through `blocks`, the last of which is the model's last.

    embedded: all patches of the images before the first block. gates: of all patches, where x has all.
    """
    log_weight = None if gates is None else gates_to_log_weight(gates, model.num_special)
    asked = None if model.fill == "position" else embedded
    features: Aux = {}
    before = model.depth - len(blocks) - 1  # the block that x came out of
    for i in range(before, model.depth):
        if i > before:
            x, _ = blocks[i - before - 1](x, tokens, log_weight)
        if i in model.decoder_blocks:
            left = x if gates is None else _filled(x, tokens, gates, asked)
            features[f"blocks/{i}"] = to_grid(left, tokens, model.fill, embedded)
    return model.predict(x, features)


def _stand_ins(
    gates: Float[Array, "B N"], grid: tuple[int, int], embedded: Float[Array, "B P D"] | None
) -> Int[Array, "B N"]:
    """For each patch the nearest other whose gate is above 1/2; where there is none, itself."""
    itself = jnp.arange(gates.shape[1], dtype=jnp.int32)
    among = (gates > 0.5)[:, None] & (itself[:, None] != itself[None])[None]
    return jnp.where(among.any(axis=2), nearest(among, grid, embedded), itself[None])


def _filled(
    x: Float[Array, "B T D"], tokens: Tokens, gates: Float[Array, "B N"], embedded: Float[Array, "B P D"] | None
) -> Float[Array, "B T D"]:
    """Every patch as the gates have it on the raster."""
    wide = widened(x.dtype)
    special, patches = split(x, tokens.num_special)
    weight, own = gates[..., None].astype(wide), patches.astype(wide)
    mixed = weight * own + (1 - weight) * take(own, _stand_ins(gates, tokens.grid, embedded))
    return join(special, mixed.astype(x.dtype))
