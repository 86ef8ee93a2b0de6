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
_SECONDS = 0.1  # of one turn in a round, at least
_ARRIVING = (1.0, 0.75, 0.5, 0.25, 0.1)  # of all patches
_GOING = (0.0, 0.06, 0.2)  # of those that arrive


def seconds_of(apart: Apart, model: Any, batch_size: int) -> Callable[[Schedule], float]:
    """Seconds of a batch, measured on this device, as a function of the schedule. model: the whole, with no token merged.

    A block's time is fitted to n, n^2, n - r and, where any go, a constant and n r, for n tokens that arrive and r that go;
    what is no block's is the rest of the model's time.
    """
    pairs = [(round(apart.num_patches * a), round(apart.num_patches * a * g)) for a in _ARRIVING for g in _GOING]
    pairs = [pair for pair in dict.fromkeys(pairs) if pair[0] and pair[1] <= apart.reducer.most(pair[0])]
    turns = {pair: partial(_time, apart.one_block(*pair, batch_size)) for pair in pairs}
    whole = _forward(model, batch_size)
    found = timing.in_rounds({**turns, None: partial(_time, whole)}, _ROUNDS)
    times = {pair: statistics.median(values) for pair, values in found.items()}
    weights = np.linalg.lstsq(np.stack([_terms(*pair) for pair in pairs]), np.array([times[p] for p in pairs]))[0]

    def of_blocks(schedule: Schedule) -> float:
        left, total = apart.num_patches, 0.0
        for number in schedule:
            total += float(_terms(left, number) @ weights)
            left -= number
        return total

    rest = times[None] - of_blocks((0,) * apart.depth)
    return lambda schedule: of_blocks(schedule) + rest


def measured(models: dict[str, Any], batch_size: int) -> dict[str, float]:
    """Seconds of a batch of whole models, medians of interleaved rounds."""
    found = timing.in_rounds({name: partial(_time, _forward(m, batch_size)) for name, m in models.items()}, _ROUNDS)
    return {name: statistics.median(values) for name, values in found.items()}


def _terms(arriving: int, going: int) -> Float[np.ndarray, " F"]:
    return np.array([1.0, arriving, arriving**2, arriving - going, float(going > 0), float(arriving * going)])


def _forward(model: Any, batch_size: int) -> Callable[[], Any]:
    program, arguments = compile_forward(
        model, random_images(model, batch_size), make_mesh(batch_size, this_process_only=True)
    )
    jax.block_until_ready(program(*arguments))
    return partial(program, *arguments)


def _time(run: Callable[[], Any]) -> float:
    def once() -> int:
        jax.block_until_ready(run())
        return 1

    return 1 / timing.rate(once, _SECONDS)
