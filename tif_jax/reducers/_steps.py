"""Reducers that do the same in every block, with a number of tokens of its own for each: what they have in common.

Such a reducer is `Stepwise`. Its blocks can be run apart, which is how a schedule is found for it (`tif_jax/calibration`).
"""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float

from tif_jax.reducers.full import Full
from tif_jax.tokens import Tokens, gates_to_log_weight, num_kept

Sizes = Float[Array, "B N"] | None  # how many patches each patch token stands for; None while that is one each


@runtime_checkable
class Stepwise(Protocol):
    """`num_merged` may be a tuple of a number for each block; `proportional`: attention counts a token by its size."""

    @property
    def num_merged(self) -> int | float | tuple[int, ...]: ...

    @property
    def proportional(self) -> bool: ...

    def per_block(self, depth: int, num_patches: int) -> tuple[int, ...]:
        """How many of num_patches patch tokens go in each of `depth` blocks."""
        ...

    def most(self, num_patches: int) -> int:
        """How many of num_patches patch tokens can go in one block."""
        ...

    def step(
        self, block: Any, x: Float[Array, "B T D"], tokens: Tokens, size: Sizes, number: int, rngs: Any = None
    ) -> tuple[Float[Array, "B S D"], Tokens, Sizes]:
        """x through one block in which `number` patch tokens go."""
        ...


@runtime_checkable
class Fronted(Protocol):
    """Keeps some patch tokens before the first block, and leaves the blocks to `then`."""

    keep_ratio: float
    round_to: int
    then: Any

    def before_blocks(
        self, x: Float[Array, "B T D"], tokens: Tokens, number: int
    ) -> tuple[Float[Array, "B S D"], Tokens, Any]:
        """x and tokens as `number` patch tokens go into the first block, and what it knows of all of them."""
        ...


def kept_in_front(reducer: Fronted, tokens: Tokens) -> int:
    """How many of these patch tokens its keep_ratio leaves."""
    return num_kept(reducer.keep_ratio, tokens.index.shape[1], tokens.num_special, reducer.round_to)


def walk_fronted(reducer: Fronted, blocks, x, tokens: Tokens, rngs=None) -> tuple[Array, dict[str, Array], Any]:
    """x through what is in front of the blocks and through these, aux, and what `before_blocks` knows."""
    x, tokens, known = reducer.before_blocks(x, tokens, kept_in_front(reducer, tokens))
    x, aux = reducer.then(blocks, x, tokens, rngs)
    if isinstance(reducer.then, Full):
        aux["kept"] = tokens.index
    return x, {"source": tokens.source, **aux}, known


def stepwise_of(reducer: Any) -> Stepwise | None:
    """What takes a number of tokens for each block: the reducer, or what follows it; None if neither does."""
    reducer = reducer.then if isinstance(reducer, Fronted) else reducer
    return reducer if isinstance(reducer, Stepwise) else None


def walk(reducer: Stepwise, blocks, x, tokens: Tokens, rngs=None):
    """x through all blocks, as a reducer is called."""
    size = None
    for block, number in zip(blocks, reducer.per_block(len(blocks), tokens.position.shape[1]), strict=True):
        x, tokens, size = reducer.step(block, x, tokens, size, number, rngs)
    return x, aux_of(reducer, tokens, size)


def aux_of(reducer: Stepwise, tokens: Tokens, size: Sizes) -> dict[str, Array]:
    """What such a reducer says beside x."""
    return {"source": tokens.source} | ({} if size is None or not reducer.proportional else {"size": size})


def limited(numbers: tuple[int, ...], reducer: Stepwise, num_patches: int) -> tuple[int, ...]:
    """The numbers wanted in each block, each at most what can go there."""
    found = []
    for number in numbers:
        found.append(min(number, reducer.most(num_patches)))
        num_patches -= found[-1]
    return tuple(found)


def log_sizes(size: Sizes, tokens: Tokens, proportional: bool) -> Float[Array, "B T"] | None:
    """What proportional attention adds to the logits of each key; None: nothing, as while every size is 1."""
    return gates_to_log_weight(size, tokens.num_special) if proportional and size is not None else None
