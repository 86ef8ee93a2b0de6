"""A model whose blocks are run one by one, with any number of tokens going in each: schedules can be tried without compiling
a program for each.

All blocks share one compiled program for each pair of numbers: tokens that arrive, tokens that go. What a schedule has in
common with the one held (`hold`) up to some place is not computed again.

Legend: B images of a batch, I images, Y X height and width, N patch tokens, L outputs.
"""

import copy
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial, wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32

from tif_jax.layers import true_float32
from tif_jax.models import Model
from tif_jax.models.cost import multiply_adds
from tif_jax.reducers._steps import Fronted, Stepwise, aux_of, kept_in_front, stepwise_of
from tif_jax.runtime.mesh import make_mesh, replicate, shard
from tif_jax.tokens import Tokens, num_kept

# A process may have about 65,000 pieces of memory mapped (Linux, vm.max_map_count), and a compiled block has about 90.
_MOST_PROGRAMS = 400

# How many patch tokens go at each place: in each block; where that is searched, too, in front of the first one before.
Schedule = tuple[int, ...]


class State(NamedTuple):
    """Between two places. The rest of `Tokens` is the same for all blocks and images."""

    x: Array
    raster: Array  # `Tokens.index`
    position: Array
    source: Array
    size: Array | None


class Apart:
    """A classifier on some images, its blocks walked by its reducer, or by what that leaves them to (`stepwise_of`).

    batches: of images as it takes them; each other batch size compiles all programs once more. searches_front: whether a
    schedule begins with how many go in front of the first block, else the reducer says that. Holds what arrives at each
    place: at most 4 bytes x images x tokens x width x depth. `whole`: logits (I, L) of the model without its reducer;
    `num_patches`: how many patch tokens arrive at the first place.
    """

    def __init__(
        self, model: Model, batches: Iterable[Float[np.ndarray | Array, "B Y X 3"]], searches_front: bool = False
    ):
        reducer = stepwise_of(model.reducer)
        assert reducer is not None
        self.reducer, self.front = reducer, model.reducer if isinstance(model.reducer, Fronted) else None
        self.graphdef, self.params = nnx.split(model)
        self.blocks = [nnx.split(block) for block in model.blocks]
        self.num_in_front = int(searches_front)
        self.num_places = self.num_in_front + len(model.blocks)
        self.plain = model.tokens(1)
        # Nobody reads what merges in a last block of which patches are not read.
        self.num_free = self.num_places - (model.blocks_of_prediction[-1] is not model.blocks[-1])
        self.held: dict[Schedule, list[State]] = {}
        self.counted: dict[tuple[str, int, int], float] = {}
        self.arriving = [self._state(_embed(self.graphdef, self.params, batch)) for batch in batches]
        self.num_patches = self.plain.index.shape[1]
        self.whole = self.logits((0,) * self.num_places)
        if self.front is not None and not searches_front:
            gone = self.num_patches - kept_in_front(self.front, self.plain)
            self.arriving = [_front(self.graphdef, gone, True, self.params, state) for state in self.arriving]
            self.num_patches -= gone

    def distance(self, schedule: Schedule) -> Float32[np.ndarray, " I"]:
        """Of each image: how far its logits move, root mean square over classes, in nats; what all move by is left out.

        The search lowers this, and neither KL nor total variation: of those a few undecided images have the most, while
        here every image has a say. On 384 photographs it tells two schedules apart by twice as many standard errors, and
        those that it prefers are the better ones by KL, too, on other photographs.
        """
        moved = self.logits(schedule) - self.whole
        return moved.std(axis=1)

    def logits(self, schedule: Schedule) -> Float32[np.ndarray, "I L"]:
        last = self.num_places - 1
        graph = partial(_finish, self.graphdef, self.reducer, schedule[last], True, self.params)
        return np.concatenate([np.asarray(graph(state)) for state in self._before(schedule, last)])

    def hold(self, schedule: Schedule) -> None:
        """Keeps what arrives at every place under this schedule, in place of any other."""
        states, kept = self._before(schedule, 0), {}
        for i in range(self.num_places):
            kept[schedule[:i]] = states
            states = self._before(schedule, i + 1, kept) if i + 1 < self.num_places else states
        self.held = kept

    def follows(self, schedule: Schedule) -> bool:
        """Whether the reducer would do as the schedule says: some leave a block alone, whatever they are given."""
        of_blocks, left = schedule[self.num_in_front :], self.num_patches - sum(schedule[: self.num_in_front])
        own = copy.copy(self.reducer)
        object.__setattr__(own, "num_merged", of_blocks)  # of a frozen dataclass, too
        return tuple(own.per_block(len(of_blocks), left)) == of_blocks

    def left_at(self, place: int, number: int, rounded_up: bool) -> int:
        """The number of patch tokens nearest to `number`, above it or below, that a place can leave: in front `round_to`
        says that."""
        if place >= self.num_in_front:
            return number
        assert self.front is not None
        round_to = self.front.round_to
        above = num_kept(number / self.num_patches, self.num_patches, self.plain.num_special, round_to)
        if rounded_up or above == number:
            return above
        special = self.plain.num_special
        return max((number + special) // round_to * round_to - special, min(above, round_to - special % round_to))

    def most(self, place: int, arriving: int) -> int:
        """How many of the patch tokens that arrive at a place can go there."""
        return arriving - 1 if place < self.num_in_front else self.reducer.most(arriving)

    def gmac(self, schedule: Schedule) -> float:
        """1e9 multiply-adds of the blocks, similarities included, and of what is in front of them, for one image."""
        left, total = self.num_patches, 0.0
        for place, number in enumerate(schedule):
            kind = "front" if place < self.num_in_front else "last" if place == self.num_places - 1 else "block"
            total += self._gmac(kind, left, number)
            left -= number
        return total

    def _gmac(self, kind: str, arriving: int, number: int) -> float:
        if (key := (kind, arriving, number)) not in self.counted:
            self.counted[key] = self._count(*key) / 1e9
        return self.counted[key]

    def _count(self, kind: str, arriving: int, number: int) -> int:
        state = jax.eval_shape(lambda: self._arriving(arriving, 1))
        if kind == "front":
            return multiply_adds(partial(_front, self.graphdef, number, True), self.params, state)
        if kind == "last":
            return multiply_adds(partial(_finish, self.graphdef, self.reducer, number, True), self.params, state)
        graphdef, params = self.blocks[0]
        return multiply_adds(partial(_through, graphdef, self.reducer, number, self._fixed, True), params, state)

    def what_is_in_front(self, number: int, batch_size: int) -> Callable[[], Any]:
        """What is in front of the first block, compiled, on a batch of which `number` patch tokens go: to be timed.

        It lies on as many devices as the whole model does when that is timed, and computes as precisely, which is less than
        where logits are compared.
        """
        return self._placed(partial(_front, self.graphdef, number, False), self.params, self.num_patches, batch_size)

    def one_block(self, arriving: int, number: int, batch_size: int) -> Callable[[], Any]:
        """A block, compiled, on a batch of `arriving` patch tokens of which `number` go, likewise."""
        graphdef, params = self.blocks[0]
        return self._placed(
            partial(_through, graphdef, self.reducer, number, self._fixed, False), params, arriving, batch_size
        )

    def last_block(self, arriving: int, batch_size: int) -> Callable[[], Any]:
        """The last block and what predicts, where none goes, likewise."""
        return self._placed(partial(_finish, self.graphdef, self.reducer, 0, False), self.params, arriving, batch_size)

    def _placed(self, program: Callable[..., Any], params: Any, arriving: int, batch_size: int) -> Callable[[], Any]:
        mesh, state = make_mesh(batch_size, this_process_only=True), self._arriving(arriving, batch_size)
        given = {name: leaf for name, leaf in state._asdict().items() if leaf is not None}
        run = partial(program, replicate(params, mesh), state._replace(**shard(given, mesh)))
        jax.block_until_ready(run())
        return run

    def _arriving(self, number: int, num_images: int) -> State:
        """A state of so many patch tokens, which are noise."""
        x = self.arriving[0].x
        shape = (num_images, self.plain.num_special + number, x.shape[2])
        state = self._state(jax.random.normal(jax.random.key(0), shape, x.dtype))
        size = jnp.ones((num_images, number)) if number < self.num_patches else None
        return state._replace(position=state.position[:, :number], size=size)

    def _before(self, schedule: Schedule, place: int, held: dict[Schedule, list[State]] | None = None) -> list[State]:
        """What arrives at the place, of each batch."""
        held = self.held if held is None else held
        begin = max(
            (len(known) for known in held if len(known) <= place and known == schedule[: len(known)]), default=None
        )
        states = self.arriving if begin is None else held[schedule[:begin]]
        for i in range(begin or 0, place):
            program = self._program(i, schedule[i])
            states = [program(state) for state in states]
        return states

    def _program(self, place: int, number: int) -> Callable[[State], State]:
        if place < self.num_in_front:
            return partial(_front, self.graphdef, number, True, self.params)
        graphdef, params = self.blocks[place - self.num_in_front]
        return partial(_through, graphdef, self.reducer, number, self._fixed, True, params)

    def _state(self, x: Array) -> State:
        index, position, source = (
            jnp.repeat(a, len(x), axis=0) for a in (self.plain.index, self.plain.position, self.plain.source)
        )
        return State(x, index, position, source, None)

    @property
    def _fixed(self) -> tuple[int, tuple[int, int], bool]:
        return self.plain.num_special, self.plain.grid, self.plain.has_class


_jitted: list[Any] = []


def _forgetting(function: Any) -> Callable[..., Any]:
    """The jitted function; all of these let go of what they have compiled before that is too much."""
    _jitted.append(function)

    @wraps(function)
    def call(*given: Any) -> Any:
        if sum(each._cache_size() for each in _jitted) >= _MOST_PROGRAMS:
            for each in _jitted:
                each.clear_cache()
        return function(*given)

    return call


@partial(jax.jit, static_argnums=0)
def _embed(graphdef: Any, params: Any, images: Array) -> Array:
    model = nnx.merge(graphdef, params)
    with true_float32(model.dtype):
        return model.embed(images)


@_forgetting
@partial(jax.jit, static_argnums=(0, 1, 2))
def _front(graphdef: Any, number: int, precise: bool, params: Any, state: State) -> State:
    """What arrives at the first block where `number` patch tokens go before it. precise: by `true_float32`."""
    model = nnx.merge(graphdef, params)
    tokens = model.tokens(1)._replace(index=state.raster, position=state.position, source=state.source)
    with true_float32(model.dtype) if precise else nullcontext():
        x, tokens, _ = model.reducer.before_blocks(state.x, tokens, state.raster.shape[1] - number)
    return State(x, tokens.index, tokens.position, tokens.source, None)


@_forgetting
@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _through(
    graphdef: Any, reducer: Stepwise, number: int, fixed: tuple, precise: bool, params: Any, state: State
) -> State:
    """A state through one block. precise: by `true_float32`."""
    num_special, grid, has_class = fixed
    tokens = Tokens(num_special, grid, state.raster, has_class, state.position, state.source)
    with true_float32(state.x.dtype) if precise else nullcontext():
        x, tokens, size = reducer.step(nnx.merge(graphdef, params), state.x, tokens, state.size, number)
    return State(x, tokens.index, tokens.position, tokens.source, size)


@_forgetting
@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _finish(
    graphdef: Any, reducer: Stepwise, number: int, precise: bool, params: Any, state: State
) -> Float32[Array, "B L"]:
    """The logits of a state that arrives at the last block. precise: by `true_float32`."""
    model = nnx.merge(graphdef, params)
    tokens = model.tokens(1)._replace(index=state.raster, position=state.position, source=state.source)
    with true_float32(model.dtype) if precise else nullcontext():
        block = model.blocks_of_prediction[-1]
        x, tokens, size = reducer.step(block, state.x, tokens, state.size, number)
        return model.predict(x, aux_of(reducer, tokens, size))[0].astype(jnp.float32)
