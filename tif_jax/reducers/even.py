"""Patches evenly spread over the raster, the same ones of every image, which are not looked at.

Legend: B images, T tokens, N patch tokens.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from tif_jax.reducers._steps import walk_fronted
from tif_jax.reducers.full import Full
from tif_jax.tokens import Tokens, check_keep_ratio, keep_rows, top_k

_PLASTIC = 1.32471795724474602596  # the root of x^3 = x + 1


class Even(nnx.Module):
    """Keeps round(keep_ratio * N) patches, as evenly spread as that many can be; round_to as of tif.

    then: the reducer that the patches left go through, as in dict(name="tome", num_merged=8); None: all of them go through
    every block. `tif calibrate` finds both amounts.
    """

    def __init__(
        self, keep_ratio: float = 0.5, then: dict | None = None, round_to: int = 1, *, build: Callable[..., Any]
    ):
        check_keep_ratio(keep_ratio, round_to)
        self.keep_ratio, self.round_to = keep_ratio, round_to
        self.then = Full() if then is None else build(**then)

    def before_blocks(
        self, x: Float[Array, "B T D"], tokens: Tokens, number: int
    ) -> tuple[Float[Array, "B S D"], Tokens, None]:
        if number < tokens.index.shape[1]:
            order = jnp.asarray(spread(tokens.grid))
            x, tokens = keep_rows(x, tokens, top_k(order[tokens.index], number))
        return x, tokens, None

    def __call__(self, blocks, x, tokens, rngs=None):
        x, aux, _ = walk_fronted(self, blocks, x, tokens, rngs)
        return x, aux


def spread(grid: tuple[int, int]) -> Float[np.ndarray, " N"]:
    """For each patch of the raster a number below 1: those with the highest are evenly spread, however many are taken.

    Row and column times the steps of the R2 sequence, less whole numbers, which Roberts (2018) proposes for dithering.
    """
    row, column = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    return ((row / _PLASTIC + column / _PLASTIC**2) % 1).astype(np.float32)
