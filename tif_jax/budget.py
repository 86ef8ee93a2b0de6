"""How many tokens a budget of multiply-adds leaves."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
from flax import nnx

from tif_jax.cost import cost
from tif_jax.errors import InputError

AMOUNTS = frozenset({"keep_ratio", "num_merged"})  # the options that say how much a reducer reduces
_THOUSANDTHS = 1000  # keep_ratio is solved for in these


class _Holder(nnx.Module):
    """A reducer need not be something that `nnx.eval_shape` can return; a module that has it is."""

    def __init__(self, reducer: Any):
        self.reducer = reducer


def within_budget(
    budget: float, model: Any, attach: Callable[..., Any], known: Collection[str], options: Mapping[str, Any]
) -> dict[str, float | int]:
    """The largest keep_ratio, or the smallest num_merged, with which one prediction costs at most `budget` GMAC.

    model: the abstract unreduced model. attach(rngs=..., **options): its reducer, which takes the options `known`. Costs
    are counted (`cost`), and found by bisection: a few seconds. Raises InputError if there is no solution.
    """
    name = next((name for name in AMOUNTS if name in known), None)
    if name is None:
        raise InputError("budget is given, but this reducer has neither keep_ratio nor num_merged to solve for")
    if given := sorted({*AMOUNTS, "num_kept"} & {key for key, value in options.items() if value is not None}):
        raise InputError(f"budget and {', '.join(given)} are given; a budget is instead of them")

    def gmac(amount: float | int) -> float:
        build = lambda key: _Holder(attach(rngs=nnx.Rngs(key), **options, **{name: amount}))  # noqa: E731
        del model.reducer  # whether an attribute holds parameters is decided when it is made
        model.reducer = nnx.eval_shape(build, jax.random.key(0)).reducer
        return cost(model).gmac

    if name == "keep_ratio":
        candidates: list[float | int] = [i / _THOUSANDTHS for i in range(1, _THOUSANDTHS + 1)]  # ascending in cost
    else:
        candidates = list(range(model.tokens(1).index.shape[1] // 2, -1, -1))
    least = gmac(candidates[0])
    if least > budget:
        raise InputError(f"budget is {budget} GMAC; the least that this reducer can do is {least:.4f}")
    low, high = 0, len(candidates)  # candidates[low] is within the budget, candidates[high] is not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if gmac(candidates[middle]) <= budget else (low, middle)
    return {name: candidates[low]}
