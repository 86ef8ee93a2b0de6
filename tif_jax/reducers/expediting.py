"""Expediting (Liang et al., "Expediting Large-Scale Vision Transformer for Dense Prediction without Fine-tuning", 2022).

After some blocks the patches are clustered, the other blocks run on the clusters, and behind them every patch is put
together again from the clusters that it was most like. Nothing is learned, and every patch comes out.

Legend: B images, N patch tokens, P patches of the raster, M clusters, K clusters that a patch is put together from, D width.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from tif_jax.errors import InputError
from tif_jax.layers import widened
from tif_jax.reducers import _schedule as schedule
from tif_jax.reducers.full import Full
from tif_jax.tokens import Spread, Tokens, check_keep_ratio, join, merged, mixed, num_kept, split, take

_ITERATIONS = 5  # of soft k-means: the authors'
_REACH = 2  # cells: a patch sees the clusters of 5 x 5 cells around its own, the authors' window


@dataclass(frozen=True)
class Expediting:
    """From block `site` on, keep_ratio of the patch tokens as clusters; all of them again behind the last block.

    site: how many blocks run on all patches, the paper's alpha; None is a third of them: 4 of 12. clusters: instead of
    keep_ratio, rows and columns of clusters. inverse_temperature: of all softmaxes over squared distances of tokens, the
    authors' `temperature`. num_neighbors: of how many clusters a patch is put together.
    """

    keep_ratio: float = 0.5
    site: int | None = None
    clusters: tuple[int, ...] | None = None
    inverse_temperature: float = 0.5
    num_neighbors: int = 20

    def __post_init__(self):
        check_keep_ratio(self.keep_ratio)
        schedule.check_site(self.site)
        if self.clusters is not None and (len(self.clusters) != 2 or min(self.clusters) < 1):
            raise InputError(f"clusters is {self.clusters}; it is two numbers, rows and columns of clusters, from 1")
        if not 0 < self.inverse_temperature < math.inf:
            raise InputError(f"inverse_temperature is {self.inverse_temperature}; it is a finite number above 0")
        if self.num_neighbors < 1:
            raise InputError(f"num_neighbors is {self.num_neighbors}; it is a number of clusters, from 1")

    def __call__(self, blocks, x, tokens, rngs=None):
        site, columns = schedule.site_of(self.site, len(blocks)), self._columns(tokens)
        source, num_special = tokens.source, tokens.num_special
        if sum(columns) >= tokens.position.shape[1]:
            return Full()(blocks, x, tokens, rngs)[0], {"source": source}

        x, _ = Full()(blocks[:site], x, tokens, rngs)
        special, patches = split(x, num_special)
        clusters, position = soft_kmeans(
            patches, tokens.position, cells(tokens.position, tokens.grid, columns), self.inverse_temperature
        )
        mixture = nearest(patches, clusters, self.inverse_temperature, self.num_neighbors)
        x, _ = Full()(blocks[site:], join(special, clusters), clustered(tokens, mixture, position), rngs)
        special, clusters = split(x, num_special)
        return join(special, mixed(clusters, mixture)), {"source": source}

    def _columns(self, tokens: Tokens) -> tuple[int, ...]:
        """How many clusters there are in each row of clusters."""
        if self.clusters is None:
            return columns_of(tokens.grid, num_kept(self.keep_ratio, tokens.position.shape[1]))
        rows, columns = self.clusters
        if rows > tokens.grid[0] or columns > tokens.grid[1]:
            raise InputError(
                f"clusters is {self.clusters}; of {tokens.grid[0]} x {tokens.grid[1]} patches come at most as many clusters"
            )
        return (columns,) * rows


def columns_of(grid: tuple[int, int], num_clusters: int) -> tuple[int, ...]:
    """That many clusters in rows, so that cells are about as high as wide: how many there are in each row.

    The authors have as many in each; here rows differ by one, so that there can be any number of clusters.
    """
    height, width = grid
    rows = min(
        height, num_clusters, max(math.ceil(num_clusters / width), round((num_clusters * height / width) ** 0.5))
    )
    ends = [num_clusters * row // rows for row in range(rows + 1)]
    return tuple(end - start for start, end in pairwise(ends))


class Cells(NamedTuple):
    """Which patch tokens belong to the clusters, by their places in the raster."""

    # The token lies in the cell that the cluster begins with: adaptive average pooling's bins.
    inside: Bool[Array, "B N M"]
    near: Bool[Array, "B N M"]  # the token's own cell and the cluster's are at most `_REACH` apart


def cells(position: Float[Array, "B N 2"], grid: tuple[int, int], columns: tuple[int, ...]) -> Cells:
    """The raster cut into len(columns) rows of cells, row r into columns[r]. Cells may overlap: patches are not divided."""
    per_row = np.repeat(columns, columns)
    row = np.repeat(np.arange(len(columns)), columns)
    column = np.concatenate([np.arange(number) for number in columns])
    inside, near = [], []
    for axis, (index, number) in enumerate([(row, np.full_like(row, len(columns))), (column, per_row)]):
        at, size = position[..., axis, None].astype(jnp.float32), grid[axis]
        first, end = index * size // number, -(-(index + 1) * size // number)
        first, end, index, number = (array.astype(np.float32)[None, None] for array in (first, end, index, number))
        inside.append((at >= first) & (at < end))
        own = jnp.floor((at * number + 0.5) / size)  # the half: XLA may divide by a product with a rounded reciprocal
        near.append(jnp.abs(own - index) <= _REACH)
    return Cells(inside[0] & inside[1], near[0] & near[1])


def soft_kmeans(
    x: Float[Array, "B N D"], position: Float[Array, "B N 2"], cells: Cells, inverse_temperature: float
) -> tuple[Float[Array, "B M D"], Float[Array, "B M 2"]]:
    """The clusters and where in the raster they lie: means of tokens and of their places, with the same weights.

    A token's weights are a softmax of -inverse_temperature * squared distance over the clusters near to it. No gradient
    passes through them. A cluster of which no token knows stays as it is; one whose cell is empty (where a filter dropped
    patches) begins as the mean of the tokens near to it, or of all.
    """
    wide = widened(x.dtype)
    tokens = x.astype(wide)
    begin = cells.inside | (cells.near & ~cells.inside.any(axis=1, keepdims=True))
    weight = (begin | ~begin.any(axis=1, keepdims=True)).astype(wide)
    clusters = jnp.zeros((x.shape[0], cells.near.shape[2], x.shape[2]), wide)
    place = jnp.zeros((*clusters.shape[:2], 2), position.dtype)
    for i in range(1 + _ITERATIONS):
        if i:
            logits = closeness(tokens, clusters, inverse_temperature)
            weight = jax.nn.softmax(jnp.where(cells.near, logits, -jnp.inf), axis=2)
        weight = jax.lax.stop_gradient(weight)
        total = weight.sum(axis=1)[..., None]
        share = weight / jnp.maximum(total, jnp.finfo(wide).tiny).swapaxes(1, 2)
        known = total > 0
        clusters = jnp.where(known, jnp.einsum("bnm,bnd->bmd", share, tokens, precision="highest"), clusters)
        moved = jnp.einsum("bnm,bnp->bmp", share.astype(position.dtype), position, precision="highest")
        place = jnp.where(known, moved, place)
    return clusters.astype(x.dtype), place


def closeness(
    x: Float[Array, "B N D"], clusters: Float[Array, "B M D"], inverse_temperature: float
) -> Float[Array, "B N M"]:
    """-inverse_temperature * squared distance, plus what is the same for all clusters: for a softmax over these."""
    wide = widened(x.dtype)
    clusters = clusters.astype(wide)
    products = jnp.einsum("bnd,bmd->bnm", x.astype(wide), clusters, precision="highest")
    return inverse_temperature * (2 * products - jnp.square(clusters).sum(axis=2)[:, None])


def nearest(
    x: Float[Array, "B N D"], clusters: Float[Array, "B M D"], inverse_temperature: float, number: int
) -> Spread:
    """Each token as a mixture of the clusters nearest to it, the nearest first; weights sum to 1."""
    logits, rows = jax.lax.top_k(closeness(x, clusters, inverse_temperature), min(number, clusters.shape[1]))
    return Spread(rows.astype(jnp.int32), jax.nn.softmax(logits, axis=2))


def clustered(tokens: Tokens, mixture: Spread, position: Float[Array, "B M 2"]) -> Tokens:
    """What the rows are when they are clusters: of every patch that is not gone the mixture, and its nearest cluster."""
    at = jnp.maximum(tokens.source, 0)
    spread = Spread(take(mixture.rows, at), take(mixture.weight, at))
    return merged(tokens, mixture.rows[..., 0], position)._replace(spread=spread)
