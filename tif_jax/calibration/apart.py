"""A model whose blocks are run one by one, with any number of tokens going in each: schedules can be tried without compiling
a program for each.

All blocks share one compiled program for each pair of numbers: tokens that arrive, tokens that go. What a schedule has in
common with the one held (`hold`) up to some block is not computed again.

Legend: B images of a batch, I images, Y X height and width, N patch tokens, L outputs.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32

from tif_jax.layers import true_float32
from tif_jax.models import Model
from tif_jax.models.cost import multiply_adds
from tif_jax.reducers._steps import Stepwise, aux_of
from tif_jax.tokens import Tokens

Schedule = tuple[int, ...]  # how many patch tokens go in each block


class State(NamedTuple):
    """Between two blocks. The rest of `Tokens` is the same for all blocks and images."""

    x: Array
    index: Array
    position: Array
    source: Array
    size: Array | None


class Apart:
    """A model without its reducer, on some images, with `reducer` walking its blocks.

    model: a ViT. images: batches as `model` takes them; the last one may be smaller. Holds what arrives at each block:
    4 bytes x images x tokens x width x depth.
    """

    def __init__(self, model: Model, reducer: Stepwise, batches: Sequence[Float[np.ndarray, "B Y X 3"]]):
        self.reducer, self.depth = reducer, len(model.blocks)
        self.graphdef, self.params = nnx.split(model)
        self.blocks = [nnx.split(block) for block in model.blocks]
        self.plain = model.tokens(1)
        self.num_patches = self.plain.position.shape[1]
        # Nobody reads what merges in a last block of which patches are not read.
        self.num_free = self.depth - (getattr(model, 'blocks_of_prediction', [0])[-1] is not model.blocks[-1])
        self.embedded = [_embed(self.graphdef, self.params, batch) for batch in batches]
        self.held: dict[Schedule, list[State]] = {}
        self.counted: dict[tuple[bool, int, int], float] = {}
        self.whole = self.logits((0,) * self.depth)

    def divergence(self, schedule: Schedule) -> Float32[np.ndarray, " I"]:
        """Of each image, how far the prediction is from the unreduced model's: `divergence`."""
        return divergence(self.whole, self.logits(schedule))

    def logits(self, schedule: Schedule) -> Float32[np.ndarray, "I L"]:
        last, number = self.depth - 1, schedule[-1]
        graph = partial(_finish, self.graphdef, self.reducer, number, self.params)
        return np.concatenate([np.asarray(graph(state)) for state in self._before(schedule, last)])

    def hold(self, schedule: Schedule) -> None:
        """Keeps what arrives at every block under this schedule, in place of any other."""
        states, kept = self._before(schedule, 0), {}
        for i in range(self.depth):
            kept[schedule[:i]] = states
            states = self._before(schedule, i + 1, kept) if i + 1 < self.depth else states
        self.held = kept

    def gmac(self, schedule: Schedule) -> float:
        """1e9 multiply-adds of the blocks, similarities included, for one image."""
        arriving = self.num_patches - np.concatenate([[0], np.cumsum(schedule)[:-1]])
        return sum(self._gmac(i == self.depth - 1, int(n), r) for i, (n, r) in enumerate(zip(arriving, schedule)))

    def _gmac(self, is_last: bool, arriving: int, number: int) -> float:
        if (key := (is_last, arriving, number)) not in self.counted:
            self.counted[key] = self._count(*key) / 1e9
        return self.counted[key]

    def _count(self, is_last: bool, arriving: int, number: int) -> int:
        one = jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype), self._state(self.embedded[0]))
        cut = lambda a: jax.ShapeDtypeStruct((1, a.shape[1] - self.num_patches + arriving, *a.shape[2:]), a.dtype)  # noqa: E731
        size = jax.ShapeDtypeStruct((1, arriving), jnp.float32) if arriving < self.num_patches else None
        state = one._replace(x=cut(one.x), position=cut(one.position), size=size)
        if is_last:
            return multiply_adds(partial(_finish, self.graphdef, self.reducer, number), self.params, state)
        graphdef, params = self.blocks[0]
        return multiply_adds(partial(_through, graphdef, self.reducer, number, self._fixed), params, state)

    def _before(self, schedule: Schedule, block: int, held: dict[Schedule, list[State]] | None = None) -> list[State]:
        """What arrives at the block, of each batch."""
        held = self.held if held is None else held
        begin = max((len(known) for known in held if len(known) <= block and known == schedule[: len(known)]), default=None)
        states = [self._state(x) for x in self.embedded] if begin is None else held[schedule[:begin]]
        for i in range(begin or 0, block):
            graphdef, params = self.blocks[i]
            through = partial(_through, graphdef, self.reducer, schedule[i], self._fixed, params)
            states = [through(state) for state in states]
        return states

    def _state(self, x: Array) -> State:
        rows = [jnp.repeat(a, len(x), axis=0) for a in (self.plain.index, self.plain.position, self.plain.source)]
        return State(x, *rows, None)

    @property
    def _fixed(self) -> tuple[int, tuple[int, int], bool]:
        return self.plain.num_special, self.plain.grid, self.plain.has_class


def divergence(
    whole: Float32[np.ndarray, "I L"], reduced: Float32[np.ndarray, "I L"]
) -> Float32[np.ndarray, " I"]:
    """KL(whole || reduced) of the softmax of each image's logits, in nats, from 0."""
    of_whole, of_reduced = (np.asarray(jax.nn.log_softmax(a.astype(np.float64), axis=-1)) for a in (whole, reduced))
    return np.maximum((np.exp(of_whole) * (of_whole - of_reduced)).sum(axis=-1), 0).astype(np.float32)


@partial(jax.jit, static_argnums=0)
def _embed(graphdef: Any, params: Any, images: Array) -> Array:
    model = nnx.merge(graphdef, params)
    with true_float32(model.dtype):
        return model.embed(images)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _through(graphdef: Any, reducer: Stepwise, number: int, fixed: tuple, params: Any, state: State) -> State:
    """A state through one block."""
    num_special, grid, has_class = fixed
    tokens = Tokens(num_special, grid, state.index, has_class, state.position, state.source)
    with true_float32(state.x.dtype):
        x, tokens, size = reducer.step(nnx.merge(graphdef, params), state.x, tokens, state.size, number)
    return State(x, tokens.index, tokens.position, tokens.source, size)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _finish(graphdef: Any, reducer: Stepwise, number: int, params: Any, state: State) -> Float32[Array, "B L"]:
    """The logits of a state that arrives at the last block."""
    model = nnx.merge(graphdef, params)
    tokens = model.tokens(1)._replace(index=state.index, position=state.position, source=state.source)
    with true_float32(model.dtype):
        block = getattr(model, 'blocks_of_prediction', model.blocks)[-1]
        x, tokens, size = reducer.step(block, state.x, tokens, state.size, number)
        return model.predict(x, aux_of(reducer, tokens, size))[0].astype(jnp.float32)
