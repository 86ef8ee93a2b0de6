"""How long a batch takes under a schedule, from the times of single blocks: no program per schedule is compiled for it."""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from tif_jax.calibration.apart import Apart, Schedule
from tif_jax.models.compiled import compile_forward, random_images
from tif_jax.runtime import timing
from tif_jax.runtime.mesh import make_mesh

_ROUNDS = 5
_SECONDS = 0.1  # of one turn in a round, at least; of whole models, few of which are measured:
_SECONDS_OF_WHOLE = 1.0
_ARRIVING = (1.0, 0.75, 0.5, 0.25, 0.1)  # of all patches
_GOING = (0.0, 0.06, 0.2)  # of those that arrive
_IN_FRONT = (0.0, 0.25, 0.75)  # of all patches


def seconds_of(apart: Apart, model: Any, batch_size: int) -> Callable[[Schedule], float]:
    """Seconds of a batch, measured on this device, as a function of the schedule. model: the whole, with no token merged.

    A block's time is fitted to n, n^2, n - r and, where any go, a constant and n r, for n tokens that arrive and r that go. A
    last block in which no token can go is cheaper (`models/special_alone.py`), and fitted to n by itself, with what predicts.
    What is in front of the first block is fitted to a constant and r, less the time of a program in which none goes; where
    none goes, it is not there. The rest of the model's time, of embedding, is the same for all.
    """
    numbers = [round(apart.num_patches * share) for share in _ARRIVING]
    pairs = [(n, round(n * share)) for n in numbers for share in _GOING]
    pairs = [pair for pair in dict.fromkeys(pairs) if pair[0] and pair[1] <= apart.reducer.most(pair[0])]
    in_front = [round(apart.num_patches * share) for share in _IN_FRONT] if apart.num_in_front else []
    turns: dict[Any, Callable[[], float]] = {pair: partial(_time, apart.one_block(*pair, batch_size)) for pair in pairs}
    has_lean = apart.num_free < apart.num_places
    if has_lean:
        turns |= {n: partial(_time, apart.last_block(n, batch_size)) for n in numbers if n}
    turns |= {("front", r): partial(_time, apart.what_is_in_front(r, batch_size)) for r in in_front}
    turns[None] = partial(_time, _forward(model, batch_size), _SECONDS_OF_WHOLE)
    found = timing.in_rounds(turns, _ROUNDS)
    times = {turn: statistics.median(values) for turn, values in found.items()}
    weights = _fitted([_terms(*pair) for pair in pairs], [times[pair] for pair in pairs])
    last = np.zeros(2)
    if has_lean:
        last = _fitted([[1.0, n] for n in numbers if n], [times[n] for n in numbers if n])

    front = np.zeros(2)
    if in_front:
        idle = times["front", 0]
        front = _fitted([[1.0, r] for r in in_front[1:]], [max(times["front", r] - idle, 0.0) for r in in_front[1:]])

    def known(schedule: Schedule) -> float:
        gone = sum(schedule[: apart.num_in_front])
        left, total = apart.num_patches - gone, float(front @ [1.0, gone]) if gone else 0.0
        for number in schedule[apart.num_in_front : apart.num_free]:
            total += float(_terms(left, number) @ weights)
            left -= number
        return total + float(last @ [1.0, left])

    rest = times[None] - known((0,) * apart.num_places)
    return lambda schedule: known(schedule) + rest


def _fitted(terms: list[Any], times: list[float]) -> Float[np.ndarray, " F"]:
    return np.linalg.lstsq(np.array(terms), np.array(times))[0]


def measured(models: dict[str, Any], batch_size: int) -> dict[str, Float[np.ndarray, " R"]]:
    """Seconds of a batch of whole models in each of several interleaved rounds."""
    turns = {name: partial(_time, _forward(m, batch_size), _SECONDS_OF_WHOLE) for name, m in models.items()}
    return {name: np.array(values) for name, values in timing.in_rounds(turns, _ROUNDS).items()}


def _terms(arriving: int, going: int) -> Float[np.ndarray, " F"]:
    return np.array([1.0, arriving, arriving**2, arriving - going, float(going > 0), float(arriving * going)])


def _forward(model: Any, batch_size: int) -> Callable[[], Any]:
    program, arguments = compile_forward(
        model, random_images(model, batch_size), make_mesh(batch_size, this_process_only=True)
    )
    jax.block_until_ready(program(*arguments))
    return partial(program, *arguments)


def _time(run: Callable[[], Any], seconds: float = _SECONDS) -> float:
    def once() -> int:
        jax.block_until_ready(run())
        return 1

    return 1 / timing.rate(once, seconds)
