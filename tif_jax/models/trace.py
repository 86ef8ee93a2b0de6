"""Where every patch is on its way through the blocks, whatever the reducer: which token holds it, or that none does.

Legend: B images, Y X height and width, N patch tokens, T tokens, S tokens in a block, M marks, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from tif_jax.layers import true_float32
from tif_jax.models.around import Around
from tif_jax.models.model import Model
from tif_jax.models.vit import plain_vit
from tif_jax.reducers import Aux


class Trace(NamedTuple):
    """What `trace` finds.

    sources: for each block that ran, the patch token in it that holds each patch of the raster; -1 where none does: the
      patch was dropped, or passes the block by. Patches held by one token were merged.
    counts: for each block that ran the number of its patch tokens.
    """

    prediction: Float[Array, "B *prediction"]  # what a call of the model gives first
    aux: Aux
    sources: list[Int[Array, "B N"]]
    counts: tuple[int, ...]


def trace(model: Model, images: Float[Array | np.ndarray, "B Y X 3"]) -> Trace:
    """The way of every patch through the model under its reducer. A block's tokens are those that its feed-forward gets.

    The reducer is asked nothing: every patch carries a mark through the walk, as a derivative with respect to it. Blocks
    pass marks on row by row, so that they move only as the reducer moves rows, and a merged token has those of all its
    patches. Raises InputError for a LeViT, whose shrink blocks move rows themselves.
    """
    graphdef, params = nnx.split(plain_vit(model, "trace"))
    prediction, aux, sources, counts = _trace(graphdef, params, jnp.asarray(images))
    return Trace(prediction, aux, sources, tuple(map(int, counts)))


@partial(jax.jit, static_argnums=0)
def _trace(graphdef: Any, params: Any, images: Float[Array, "B Y X 3"]):
    model = nnx.merge(graphdef, params)
    with true_float32(model.dtype):
        x, tokens = model.embed(images), model.tokens(images.shape[0])
        num_special, num_patches = tokens.num_special, tokens.index.shape[1]

        def walk(marked: Float[Array, "B S D"] | None):
            seen = _Seen(marked)
            return seen, model.encode(x, blocks=[_Marked(block, seen) for block in model.blocks])

        # Marks begin at the first block, where the rows are known: before it patches stay or go, and an adapter may tell
        # each of all the others.
        entering = walk(None)[0].first
        unmarked = jnp.zeros((x.shape[0], num_special + entering.index.shape[1], x.shape[2]), x.dtype)

        def from_first_block(marked: Float[Array, "B S D"]):
            seen, left = walk(marked)
            return seen.inside, left

        shares, left = _followed(from_first_block, unmarked, entering.index, num_special, num_patches)
        prediction, aux = model.predict(*left)
    sources = [_sources(share[..., :num_patches]) for share in shares]
    return prediction, aux, sources, [share.shape[1] for share in shares]


def _followed(
    function: Callable[[Float[Array, "B S D"]], tuple[list[Float[Array, "B _ D"]], Any]],
    x: Float[Array, "B S D"],
    index: Int[Array, "B N"],
    num_special: int,
    num_marks: int,
) -> tuple[list[Float[Array, "B _ M"]], Any]:
    """How much of each mark the patch rows of the function's arrays have, where row r of x has mark index[b, r]; its rest.

    Marks are one-hot in the channels, as many at once as there are.
    """
    width = x.shape[2]
    num_rounds = -(-num_marks // width)
    marks = rearrange(jax.nn.one_hot(index, num_rounds * width, dtype=x.dtype), "b n (r d) -> r b n d", d=width)
    marks = jnp.pad(marks, ((0, 0), (0, 0), (num_special, 0), (0, 0)))

    def one_round(marks: Float[Array, "B S D"]):
        _, found, rest = jax.jvp(function, (x,), (marks,), has_aux=True)
        return found, rest

    found, rest = jax.vmap(one_round, out_axes=(0, None))(marks)
    return [rearrange(array[:, :, num_special:], "r b s d -> b s (r d)") for array in found], rest


def _sources(shares: Float[Array, "B S N"]) -> Int[Array, "B N"]:
    """The row that has most of each patch, or -1."""
    shares = jnp.abs(shares)
    return jnp.where(shares.max(axis=1) > 0, shares.argmax(axis=1), -1).astype(jnp.int32)


@dataclass
class _Seen:
    """What blocks saw: what the first tokens to enter one were, and tokens inside of each, between the half-steps.

    marked: zeros that the first tokens to enter are made to depend on, instead of what they come from.
    """

    marked: Float[Array, "B S D"] | None
    first: Any = None
    inside: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class _Marked(Around):
    """A block that passes marks on, row by row, and nothing else of the derivative."""

    seen: _Seen

    def attend(self, x, tokens, *args, **kwargs):
        if self.seen.first is None:
            self.seen.first = tokens
            if self.seen.marked is not None:
                x = jax.lax.stop_gradient(x) + self.seen.marked
        y, qk = jax.lax.stop_gradient(self.block.attend(x, tokens, *args, **kwargs))
        return _with_marks(y, x), qk

    def feed_forward(self, x, *args, **kwargs):
        self.seen.inside.append(x)
        return _with_marks(jax.lax.stop_gradient(self.block.feed_forward(x, *args, **kwargs)), x)


def _with_marks(y: Float[Array, "B T D"], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """y with the derivative of x."""
    return y + (x - jax.lax.stop_gradient(x))
