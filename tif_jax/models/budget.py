"""How many tokens a budget of multiply-adds leaves."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Key

from tif_jax.errors import InputError
from tif_jax.models.cost import cost

SOLVED = ("keep_ratio", "num_merged")  # the options that a budget is solved for
# The options that say how much a reducer reduces: one stands instead of another.
AMOUNTS = (*SOLVED, "num_kept", "clusters", "budget")
_THOUSANDTHS = 1000  # keep_ratio is solved for in these


def within_budget(
    budget: float, build: Callable[..., Any], known: Collection[str], options: Mapping[str, Any]
) -> dict[str, float | int]:
    """The keep_ratio, in thousandths, or mean num_merged with which one prediction costs as near to `budget` GMAC as is
    within it.

    build(key, **options, keep_ratio=...): the model under a reducer that takes the options `known`. Costs are counted
    (`cost`) and the solution found by bisection, in seconds. Raises InputError if there is none.
    """
    name = next((name for name in SOLVED if name in known), None)
    if name is None:
        raise InputError("budget is given, but this reducer has neither keep_ratio nor num_merged to solve for")
    if given := sorted(key for key in AMOUNTS if options.get(key) is not None):
        raise InputError(f"budget and {', '.join(given)} are given; a budget is instead of them")
    if not isinstance(budget, int | float) or not budget > 0:
        raise InputError(f"budget is {budget!r}; it is a number of GMAC, above 0")

    def built(amount: float | int) -> Any:
        def of_key(key: Key[Array, ""]) -> Any:
            return build(key, **options, **{name: amount})

        return nnx.eval_shape(of_key, jax.random.key(0))

    if name == "keep_ratio":
        candidates: list[float | int] = [i / _THOUSANDTHS for i in range(1, _THOUSANDTHS + 1)]  # ascending in cost
    else:  # the mean over the blocks, in fractions that come to one token more in one block
        unreduced = built(0)
        depth, half = len(unreduced.blocks), unreduced.tokens(1).index.shape[1] // 2
        candidates = [i / depth for i in range(half * depth, -1, -1)]
    least = cost(built(candidates[0])).gmac
    if least > budget:
        raise InputError(f"budget is {budget} GMAC; the least that this reducer can do is {least:.4f}")
    low, high = 0, len(candidates)  # candidates[low] is within the budget, candidates[high] is not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(built(candidates[middle])).gmac <= budget else (low, middle)
    return {name: candidates[low]}
