"""Position embeddings for another patch raster.

Legend: T and S tokens, D width.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float

from tif_jax.errors import InputError
from tif_jax.models.levit import PATCH_SIZE
from tif_jax.models.levit_blocks import smaller


def resize_positions(params: dict[str, Any], old_grid: tuple[int, int], new_grid: tuple[int, int]) -> dict[str, Any]:
    """A model's parameters for another patch raster (rows, columns). Raises InputError if it has attention biases."""
    flat = traverse_util.flatten_dict(params, sep="/")
    if any(path.endswith("attention/biases") for path in flat):
        raise other_size(old_grid)
    if "position_embedding" not in flat:  # rotary positions alone
        return params
    num_special = flat["position_embedding"].shape[1] - math.prod(old_grid)
    shrinks = [re.fullmatch(r"block_(\d+)/position_embedding", path) for path in flat]
    inner = sorted((int(match[1]), match[0]) for match in shrinks if match)
    for path in ["position_embedding", *(path for _, path in inner)]:
        flat[path] = resize_position_embedding(flat[path], old_grid, new_grid, num_special)
        if path != "position_embedding":
            old_grid, new_grid = smaller(old_grid), smaller(new_grid)
    return traverse_util.unflatten_dict(flat, sep="/")


def other_size(grid: Sequence[int]) -> InputError:
    """What is wrong with another size, for a LeViT with attention biases."""
    return InputError(
        f"the attention biases are for {grid[0]}x{grid[1]} patches and are not resized; leave image_size at "
        f"{grid[0] * PATCH_SIZE}x{grid[1] * PATCH_SIZE}"
    )


def resize_position_embedding(
    embedding: Float[np.ndarray | Array, "1 T D"], old_grid: Sequence[int], new_grid: Sequence[int], num_special: int
) -> Float[np.ndarray, "1 S D"]:
    """The position embedding of another patch raster (rows, columns); the first num_special rows stay.

    Bicubic with antialiasing, as timm's `resample_abs_pos_embed` does it.
    """
    special, patches = embedding[:, :num_special], embedding[0, num_special:]
    width = embedding.shape[-1]
    resized = jax.image.resize(jnp.asarray(patches).reshape(*old_grid, width), (*new_grid, width), "bicubic")
    return np.concatenate([special, np.asarray(resized).reshape(1, -1, width)], axis=1)
