"""How many tokens a budget leaves: of multiply-adds, or of time on this device (`speed`)."""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Key

from tif_jax import checked
from tif_jax.errors import InputError
from tif_jax.models.cost import gmac

SOLVED = ("num_merged", "keep_ratio")  # the options that a budget is solved for: the first that a reducer has
# The options that say how much a reducer reduces: one stands instead of another.
AMOUNTS = (*SOLVED, "num_kept", "clusters", "budget")
_THOUSANDTHS = 1000  # keep_ratio is solved for in these
_SPEED = re.compile(
    r"\s*(?P<number>\d+(\.\d*)?|\.\d+)\s*(?P<unit>images/s|x)(\s+at\s+(?P<batch_size>[1-9]\d{0,5}))?\s*"
)
_BATCH_SIZE = 32  # where a speed does not say one


class Speed(NamedTuple):
    """A budget of time: images/s, or (is_relative) times as many as all tokens get, in batches of a size."""

    number: float
    is_relative: bool
    batch_size: int = _BATCH_SIZE

    def __str__(self) -> str:
        at = "" if self.batch_size == _BATCH_SIZE else f" at {self.batch_size}"
        return f"{self.number:g}{'x' if self.is_relative else ' images/s'}{at}"

    @property
    def label(self) -> str:
        """Without spaces and slashes, for names of folders."""
        at = "" if self.batch_size == _BATCH_SIZE else f"@{self.batch_size}"
        return f"{self.number:g}{'x' if self.is_relative else 'ips'}{at}"


def label_of(budget: float | Speed) -> str:
    """Without spaces and slashes, for names of files."""
    return budget.label if isinstance(budget, Speed) else f"{budget:g}"


def read_budget(budget: Any, where: str = "budget") -> float | Speed:
    """GMAC, or a speed: '120 images/s', '1.5x' (times the speed of all tokens), '1.5x at 256' (in batches of 256).

    Raises InputError for anything else.
    """
    if isinstance(budget, Speed):
        return budget
    if isinstance(budget, str) and (match := _SPEED.fullmatch(budget)) and float(match["number"]) > 0:
        return Speed(float(match["number"]), match["unit"] == "x", int(match["batch_size"] or _BATCH_SIZE))
    try:
        number = float(budget) if isinstance(budget, str) else budget
        return checked.value_of(float, number, where, checked.Range(above=0))
    except (ValueError, InputError):
        raise InputError(
            f"{where} is {checked.shown(budget)}; it is a number of GMAC, above 0, or a speed: '120 images/s', '1.5x', "
            "'1.5x at 256' (a batch size)"
        ) from None


class Amounts:
    """What a reducer can be given for `name`, keep_ratio or num_merged: `values`, ascending in cost."""

    def __init__(self, build: Callable[..., Any], known: Collection[str], options: Mapping[str, Any]):
        """build(key, **options, keep_ratio=...): the model under a reducer that takes the options `known`.

        Raises InputError for a reducer without such an option, and where an amount is given.
        """
        name = next((name for name in SOLVED if name in known), None)
        if name is None:
            raise InputError("budget is given, but this reducer has neither keep_ratio nor num_merged to solve for")
        if given := sorted(key for key in AMOUNTS if options.get(key) is not None):
            raise InputError(f"budget and {', '.join(given)} are given; a budget is instead of them")
        self.name, self._build, self._options = name, build, options
        self._gmac: dict[int, float] = {}
        if name == "keep_ratio":
            self.values: list[float | int] = [i / _THOUSANDTHS for i in range(1, _THOUSANDTHS + 1)]
        else:  # the mean over the blocks, in fractions that come to one token more in one block
            unreduced = self._with(0)
            depth, half = len(unreduced.blocks), unreduced.tokens(1).index.shape[1] // 2
            self.values = [i / depth for i in range(half * depth, -1, -1)]

    def built(self, i: int) -> Any:
        """The model with the amount values[i], without its weights: shapes stand in their place."""
        return self._with(self.values[i])

    def gmac(self, i: int) -> float:
        """What the model with values[i] costs."""
        if i not in self._gmac:
            self._gmac[i] = gmac(self.built(i))
        return self._gmac[i]

    def within(self, gmac: float) -> int:
        """The last position whose cost is within so many GMAC; -1 if there is none.

        Each cost is a model to trace, half a second. So the next one looked at is where a straight line between the nearest
        known ones meets the budget; where the same end moves twice, the other counts half (the Illinois method).
        """
        low, high = 0, len(self.values) - 1
        below, above = gmac - self.gmac(low), self.gmac(high) - gmac
        if below < 0 or above <= 0:
            return -1 if below < 0 else high
        moved = ""
        while high - low > 1:  # values[low] is within the budget, values[high] is not
            middle = min(max(low + round((high - low) * below / (below + above)), low + 1), high - 1)
            rest = gmac - self.gmac(middle)
            if rest >= 0:
                low, below, above, moved = middle, rest, above / 2 if moved == "low" else above, "low"
            else:
                high, above, below, moved = middle, -rest, below / 2 if moved == "high" else below, "high"
        return low

    def _with(self, amount: float | int) -> Any:
        def of_key(key: Key[Array, ""]) -> Any:
            return self._build(key, **self._options, **{self.name: amount})

        return nnx.eval_shape(of_key, jax.random.key(0))


def within_budget(budget: float, amounts: Amounts) -> dict[str, float | int]:
    """The keep_ratio, in thousandths, or mean num_merged with which one prediction costs as near to `budget` GMAC as is
    within it.

    Costs are counted (`cost`), in seconds. Raises InputError if there is none.
    """
    found = amounts.within(budget)
    if found < 0:
        raise InputError(f"budget is {budget} GMAC; the least that this reducer can do is {amounts.gmac(0):.4f}")
    return {amounts.name: amounts.values[found]}
