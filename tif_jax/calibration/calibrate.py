"""From some images without labels to a schedule: `calibrate`.

Legend: I images, Y X height and width.
"""

import logging
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from tif_jax.calibration.apart import Apart, Schedule
from tif_jax.calibration.search import Problem, search
from tif_jax.calibration.seconds import measured, seconds_of
from tif_jax.errors import InputError
from tif_jax.models import Model, require_head
from tif_jax.models.budget import Speed
from tif_jax.models.cost import cost
from tif_jax.reducers._steps import stepwise_of

logger = logging.getLogger(__name__)

BATCH_SIZE = 32
_STEPS = 16, 6  # the first moves are of a sixteenth of all patches, the last of 6 tokens: the least lies flat
_HELD_OUT = 4  # every fourth batch
_FEW = 4  # every fourth of the other batches is enough to begin with
_NEAR = 0.98  # of the wished speed


class Calibrated(NamedTuple):
    """A schedule and what it does: distance (`Apart.distance`), mean over images, and the share whose class is the
    unreduced one's."""

    num_merged: Schedule
    gmac: float
    searched: dict[str, float]  # on the images of the search: distance, agreement
    held_out: dict[str, float]  # on those kept out of it
    images_per_second: dict[str, float] | None  # 'full' and 'reduced', where the budget was a speed


class Models(NamedTuple):
    """The weights with all tokens, and under the reducer that is calibrated."""

    full: Model
    with_schedule: Callable[[Schedule], Model]  # the model under the reducer


Search = Callable[[Callable[[Schedule], float], float], Schedule]  # (cost, budget) -> schedule


def calibrate(models: Models, images: Float32[np.ndarray, "I Y X 3"], budget: float | Speed) -> Calibrated:
    """The number of tokens merged in each block with which logits move least within a budget.

    images: as the model takes them, 64 at least; a quarter is kept out of the search. Weights stay as they are. Raises
    InputError for models of another task, reducers that are not `Stepwise`, too few images, and budgets out of reach.
    """
    require_head(models.full, "a calibration")
    nothing = (0,) * len(models.full.blocks)
    model = models.with_schedule(nothing)
    if stepwise_of(model.reducer) is None:
        raise InputError("a calibration needs a reducer that takes a number of tokens for each block (num_merged)")
    batches = _batches(images)
    searched = [batch for i, batch in enumerate(batches) if i % _HELD_OUT < _HELD_OUT - 1]
    apart = Apart(model, searched)
    search_within = _search(apart, Apart(model, searched[::_FEW]))
    if isinstance(budget, Speed):
        schedule, speeds = _by_speed(models, apart, search_within, budget)
    else:
        rest = cost(model).gmac - apart.gmac(nothing)
        schedule, speeds = search_within(lambda schedule: apart.gmac(schedule) + rest, budget), None
    held_out = Apart(model, batches[_HELD_OUT - 1 :: _HELD_OUT])
    return Calibrated(
        schedule, cost(models.with_schedule(schedule)).gmac, _judged(apart, schedule),
        _judged(held_out, schedule), speeds,
    )  # fmt: skip


def _search(apart: Apart, few: Apart) -> Search:
    """The search, as a function of what a schedule costs and of the budget."""
    step = max(1, apart.num_patches // _STEPS[0])

    def within(cost: Callable[[Schedule], float], budget: float) -> Schedule:
        problem, coarse = (
            Problem(
                on.distance, cost, on.hold, apart.reducer.most, apart.num_patches, apart.depth, apart.num_free, budget
            )
            for on in (apart, few)
        )
        return search(problem, coarse, step, _STEPS[1])

    return within


def _by_speed(models: Models, apart: Apart, search_within: Search, wished: Speed) -> tuple[Schedule, dict[str, float]]:
    """The schedule found with seconds as the cost; where the whole model proves slower than its blocks said, once more."""
    size = wished.batch_size
    seconds = seconds_of(apart, models.with_schedule((0,) * apart.depth), size)
    whole = measured({"full": models.full}, size)["full"]
    budget = whole / wished.number if wished.is_relative else size / wished.number
    for _ in range(2):
        schedule = search_within(seconds, budget)
        times = measured({"full": models.full, "reduced": models.with_schedule(schedule)}, size)
        goal = times["full"] / wished.number if wished.is_relative else size / wished.number
        rates = {name: size / time for name, time in times.items()}
        logger.info("calibrate: %.4g images/s, with all tokens %.4g", rates["reduced"], rates["full"])
        if times["reduced"] <= goal / _NEAR:
            break
        budget *= goal / times["reduced"]
    return schedule, rates


def _batches(images: Float32[np.ndarray, "I Y X 3"]) -> list[Float32[np.ndarray, "B Y X 3"]]:
    """Full batches of images in random order."""
    size = min(BATCH_SIZE, len(images) // _HELD_OUT)
    if size < 1 or len(images) < 2 * BATCH_SIZE:
        raise InputError(
            f"{len(images)} images are too few to calibrate with; give {2 * BATCH_SIZE} or more, better 500"
        )
    order = np.random.default_rng(0).permutation(len(images))
    return [images[order[i : i + size]] for i in range(0, len(images) - size + 1, size)]


def _judged(apart: Apart, schedule: Schedule) -> dict[str, float]:
    agreement = (apart.logits(schedule).argmax(axis=1) == apart.whole.argmax(axis=1)).mean()
    return {"distance": float(apart.distance(schedule).mean()), "agreement": float(agreement)}
