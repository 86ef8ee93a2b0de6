"""How many tokens a wished speed leaves: measured on this device, with few programs, for each takes seconds to compile."""

import logging
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from tif_jax.errors import InputError
from tif_jax.models.budget import Amounts, Speed
from tif_jax.models.compiled import compile_forward, random_images
from tif_jax.models.cost import cost
from tif_jax.runtime import files, records, timing
from tif_jax.runtime.machine import machine
from tif_jax.runtime.mesh import make_mesh

logger = logging.getLogger(__name__)

_WITHIN = 0.03  # above the wished speed this share is near enough
_MOST_PROBES = 6
_ROUNDS = 5
_SECONDS = 0.2  # of one turn in a round, at least


class Probes:
    """Speeds of a reducer's amounts beside that of all tokens, each measured once."""

    def __init__(self, amounts: Amounts, full: Any, batch_size: int):
        """full: the model with all tokens; like those of `amounts` without weights. Weights have no part in speed."""
        self.amounts, self._full, self.full_gmac = amounts, full, cost(full).gmac
        self._mesh = make_mesh(batch_size, this_process_only=True)
        self._batch_size = batch_size
        self._run_full: Callable[[], float] | None = self._turn(full)
        self._rates: dict[int, dict[str, float]] = {}  # images/s of both, and their ratio
        self.full_rate = statistics.median(timing.in_rounds({0: self._run_full}, _ROUNDS)[0])

    def rate(self, i: int, is_relative: bool) -> float:
        """Images/s of the amount at position i, or times those of all tokens: the median of interleaved rounds."""
        if i not in self._rates:
            self._run_full = self._run_full or self._turn(self._full)
            turns = {"full": self._run_full, "reduced": self._turn(self.amounts.built(i))}
            rounds = timing.in_rounds(turns, _ROUNDS)
            ratios = [reduced / full for reduced, full in zip(rounds["reduced"], rounds["full"], strict=True)]
            self._rates[i] = {"images/s": statistics.median(rounds["reduced"]), "x": statistics.median(ratios)}
        return self._rates[i]["x" if is_relative else "images/s"]

    def known(self, is_relative: bool) -> dict[int, float]:
        """What was measured so far, by position; the last amount reduces nothing and is taken to be as fast as all tokens."""
        known = {len(self.amounts.values) - 1: 1.0 if is_relative else self.full_rate}
        return known | {i: found["x" if is_relative else "images/s"] for i, found in self._rates.items()}

    def release(self) -> None:
        """Lets go of the program of all tokens, and of its weights on the devices; what was measured stays."""
        self._run_full = None

    def _turn(self, model: Any) -> Callable[[], float]:
        model = _with_weights(model)
        program, arguments = compile_forward(model, random_images(model, self._batch_size), self._mesh)
        jax.block_until_ready(program(*arguments))
        return lambda: timing.rate(lambda: len(jax.block_until_ready(program(*arguments))), _SECONDS, least=1)


def within_speed(speed: Speed, described: str, probes: Callable[[], Probes]) -> dict[str, float | int]:
    """The largest amount found with which predictions are as fast as wished, by at most 3 % faster where that can be had.

    described: which model and reducer. What was found is kept where compiled programs are (JAX's compilation cache, if there
    is one), so that the same question has the same answer on this machine. Raises InputError if the reducer is never as fast,
    and in a run of several processes, which would not agree.
    """
    if jax.process_count() > 1:
        raise InputError(
            f"budget is {str(speed)!r}, and each of several processes would measure another: give an amount"
        )
    key = records.digest([described, str(speed), records.versions(), machine(), str(jax.devices())])
    kept = _kept()
    if found := kept.get(key):
        return found
    logger.info("budget %s: all tokens and up to %d amounts are compiled and timed on this device", speed, _MOST_PROBES)
    own = probes()
    i = fastest_enough(
        speed.number,
        own.amounts,
        lambda i: own.rate(i, speed.is_relative),
        guess=own.amounts.within(own.full_gmac * min(1.0, _share(speed, own.full_rate))),
        known=own.known(speed.is_relative),
        wished=str(speed),
    )
    own.release()
    found = {own.amounts.name: own.amounts.values[i]}
    if path := _path():
        files.write(path, records.text({**_kept(), key: found}))
    return found


def fastest_enough(
    number: float, amounts: Any, rate: Callable[[int], float], guess: int, known: dict[int, float], wished: str
) -> int:
    """A position in amounts.values, ascending in cost, with rate(position) >= number, and above that by 3 % at most if
    `_MOST_PROBES` find it: the time between two measured amounts is taken to be linear.

    known: rates by position; guess: where to begin if it is one alone. Raises InputError if there is none.
    """
    last = len(amounts.values) - 1
    measured = dict(known)
    for probe in range(1, _MOST_PROBES + 1):
        enough = [j for j, found in measured.items() if found >= number]
        low = max(enough, default=-1)
        high = min((j for j in measured if j > low), default=last + 1)
        if low >= 0 and (measured[low] <= number * (1 + _WITHIN) or high - low <= 1):
            return low
        if high == 0:
            break
        i = _next(number, measured, low, high) if len(measured) > 1 else _within(guess, low, high)
        measured[i] = rate(i)
        logger.info(
            "budget %s: %s %.4g runs at %.4g (probe %d)", wished, amounts.name, amounts.values[i], measured[i], probe
        )
    if enough := [j for j, found in measured.items() if found >= number]:
        return max(enough)
    best = max(measured, key=lambda j: measured[j])
    raise InputError(
        f"budget is {wished!r}; the fastest that was found for this reducer here is {measured[best]:.4g}, with "
        f"{amounts.name} {amounts.values[best]:.4g}"
    )


def _next(number: float, measured: dict[int, float], low: int, high: int) -> int:
    """The position to measure between low, fast enough, and high, which is not; either may lie outside of what is known."""
    near = sorted(measured, key=lambda j: abs(1 / measured[j] - 1 / number))[:2]
    if low >= 0 and high in measured:
        near = [low, high]
    a, b = near
    slope = (1 / measured[b] - 1 / measured[a]) / (b - a)
    return _within(round(a + (1 / number - 1 / measured[a]) / slope) if slope > 0 else (low + high) // 2, low, high)


def _within(i: int, low: int, high: int) -> int:
    return min(max(i, low + 1), high - 1)


def _share(speed: Speed, full_rate: float) -> float:
    """Of the multiply-adds of all tokens, that the wished speed would leave if time were proportional to them."""
    return 1 / speed.number if speed.is_relative else full_rate / speed.number


def _with_weights(model: Any) -> Any:
    """The model with random weights that no program has to draw."""
    rng = np.random.default_rng(0)
    graphdef, state = nnx.split(model)
    draw = lambda leaf: (0.02 * np.abs(rng.standard_normal(leaf.shape))).astype(leaf.dtype)  # noqa: E731
    return nnx.merge(graphdef, jax.tree.map(draw, state))


def _path() -> Path | None:
    folder = getattr(jax.config, "jax_compilation_cache_dir", None)
    return Path(folder) / "speed_budgets.json" if folder and "://" not in folder else None


def _kept() -> dict[str, Any]:
    """Answers of before. A file that is damaged has none."""
    path = _path()
    try:
        return (records.read(path) if path else None) or {}
    except InputError:
        return {}
