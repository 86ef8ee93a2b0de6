"""Features on the raster of patches, whatever a reducer has made of the tokens.

Legend: B images, Y X height and width, P patches of the raster, T tokens, N patch tokens, M rows that a patch is a mixture
of, D width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tif_jax.errors import InputError
from tif_jax.layers import widened
from tif_jax.models.around import Around
from tif_jax.reducers import Aux
from tif_jax.tokens import BESIDE, GONE, Tokens, mixed, on_raster, split, take

FILLS = ("position", "embedding")


def to_grid(
    x: Float[Array, "B T D"],
    tokens: Tokens,
    fill: str = "position",
    embedded: Float[Array, "B P D"] | None = None,
) -> Float[Array, "B rows columns D"]:
    """Every patch as the tokens x have it: kept ones in their place, merged ones all as their token is.

    A patch that was dropped is what the patch is that is nearest to it among those that were not: nearest on the raster
    (fill 'position'), or most alike (cosine) before the first block (fill 'embedding', for which `embedded` are all patches
    then). Ties go to the first in raster order. Where a patch has a row of its own, that row is copied. Raises InputError
    where `embedded` is asked for and missing.
    """
    if fill == "embedding" and embedded is None:
        raise InputError("fill is 'embedding', and the embedded patches are not given; give what `embed` returned")
    patches, source = split(x, tokens.num_special)[1], tokens.source
    held_by = _holders(source, tokens.grid, embedded if fill == "embedding" else None)
    if tokens.spread is None and tokens.offset is None:
        found = take(patches, take(source, held_by))
    else:
        if tokens.spread is None:
            found = on_raster(tokens, patches)
        else:
            found = jnp.where(source[..., None] >= 0, mixed(patches, tokens.spread), 0)
        found = take(found if tokens.offset is None else found + tokens.offset.astype(x.dtype), held_by)
    return found.reshape(x.shape[0], *tokens.grid, x.shape[2])


def _holders(
    source: Int[Array, "B P"], grid: tuple[int, int], embedded: Float[Array, "B P D"] | None
) -> Int[Array, "B P"]:
    """For each patch the one whose features stand for it: itself, unless it is gone."""
    held = source != GONE
    itself = jnp.arange(source.shape[1], dtype=jnp.int32)[None]
    return jnp.where(held, itself, nearest(held[:, None], grid, embedded))


def nearest(
    among: Bool[Array, "B Q P"], grid: tuple[int, int], embedded: Float[Array, "B P D"] | None
) -> Int[Array, "B P"]:
    """For each patch the nearest of those that it may be: on the raster, or with `embedded` the most alike (cosine).

    among: which these are, for each patch a row, or one row for all; if there are none, what is found means nothing. Ties go
    to the first in raster order. No gradient.
    """
    if embedded is None:
        # A distance and a patch in one number: their minimum is the nearest, the first of equally near ones.
        far = np.iinfo(np.int32).max
        return jnp.where(among, jnp.asarray(_distances(grid))[None], far).min(axis=2) % among.shape[2]
    unit = jax.lax.stop_gradient(embedded).astype(widened(embedded.dtype))
    unit = unit * jax.lax.rsqrt(jnp.maximum(jnp.square(unit).sum(axis=2, keepdims=True), 1e-24))
    alike = jnp.einsum("bpd,bqd->bpq", unit, unit)
    return jnp.where(among, alike, -jnp.inf).argmax(axis=2).astype(jnp.int32)


def _distances(grid: tuple[int, int]) -> Int[np.ndarray, "P P"]:
    """Squared distances on the raster times P, plus the number of the patch in whose column it stands."""
    places = np.stack(np.divmod(np.arange(grid[0] * grid[1], dtype=np.int64), grid[1]), axis=-1)
    squared = np.square(places[:, None] - places[None]).sum(axis=-1)
    return (squared * len(places) + np.arange(len(places))).astype(np.int32)


@dataclass(frozen=True)
class _Watched(Around):
    """A block of which is noted what goes in and what comes out, by its number."""

    number: int
    going_in: dict[int, Tokens]
    coming_out: dict[int, tuple[Any, Tokens]]

    def attend(self, x, tokens, *args, **kwargs):
        left = self.coming_out.get(self.number - 1)
        if left is not None and left[0].shape[1] != left[1].num_special + left[1].position.shape[1]:
            self.coming_out[self.number - 1] = x, tokens
        self.going_in[self.number] = tokens
        return self.block.attend(x, tokens, *args, **kwargs)

    def feed_forward(self, x, *args, **kwargs):
        y = self.block.feed_forward(x, *args, **kwargs)
        self.coming_out[self.number] = y, self.going_in[self.number]
        return y


class Watch:
    """Blocks that note what comes out of them while a reducer walks; afterwards `grids` has it on the raster.

    Where a reducer changes the rows between the half-steps of a block, that is what comes into the next one. What is noted
    and not read, the compiler deletes.
    """

    def __init__(self, blocks: Sequence[Any]):
        self._seen: dict[int, tuple[Any, Tokens]] = {}
        going_in: dict[int, Tokens] = {}
        self.blocks = [_Watched(block, i, going_in, self._seen) for i, block in enumerate(blocks)]

    def grids(
        self,
        chosen: Sequence[int],
        x: Float[Array, "B T D"],
        aux: Aux,
        tokens: Tokens,
        fill: str,
        embedded: Float[Array, "B P D"],
    ) -> dict[int, Float[Array, "B rows columns D"]]:
        """Of the chosen blocks, by number. x, aux: what the reducer returned, tokens: what it was given.

        Raises InputError for a reducer that does not say where patches are, or passes a chosen block by.
        """
        found = {**self._seen, len(self.blocks) - 1: (x, in_the_end(x, aux, tokens))}
        if missing := [i for i in chosen if i not in found]:
            raise InputError(f"the reducer passes block {missing[0]} by, whose features the decoder reads")
        return {i: to_grid(*found[i], fill, embedded) for i in chosen}


def grid_features(
    model: Any, images: Float[Array | np.ndarray, "B Y X 3"], blocks: Sequence[int], fill: str = "position"
) -> list[Float[Array, "B rows columns D"]]:
    """What comes out of these blocks of a ViT, on the raster of patches whatever its reducer: for a decoder of your own.

    Before any norm. blocks: numbers from 0. fill: what stands for a patch that was dropped (`to_grid`). Raises InputError for
    blocks that there are not, and for a LeViT.
    """
    if getattr(model, "decoder_blocks", None) is None:
        raise InputError(f"features on the raster need a ViT; a {type(model).__name__} has fewer rows in later blocks")
    if not set(blocks) <= {*range(model.depth)} or fill not in FILLS:
        raise InputError(
            f"blocks are {tuple(blocks)} and fill is {fill!r}; the model has blocks 0..{model.depth - 1}, and fill is one of "
            f"{', '.join(map(repr, FILLS))}"
        )
    x, tokens, watch = model.embed(images), model.tokens(len(images)), Watch(model.blocks)
    left, aux = model.reducer(watch.blocks, x, tokens)
    grids = watch.grids(blocks, left, aux, tokens, fill, x[:, model.num_special :])
    return [grids[i] for i in blocks]


def in_the_end(x: Float[Array, "B T D"], aux: Mapping[str, Any], tokens: Tokens) -> Tokens:
    """What the rows are that a reducer returned."""
    source = aux.get("source", tokens.source)
    if "source" not in aux and x.shape[1] != tokens.num_special + source.shape[1]:
        raise InputError(
            f"a dense head asks where every patch is: the reducer returned {x.shape[1] - tokens.num_special} patch tokens "
            f"for {source.shape[1]} patches and no aux['source']; return tokens.source"
        )
    source = jnp.where(source == BESIDE, GONE, source)  # in the end nothing comes back any more
    return tokens._replace(source=source, offset=None, spread=None)
