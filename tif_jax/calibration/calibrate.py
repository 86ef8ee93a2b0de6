"""From some images without labels to schedules: `Calibration`.

Legend: I images, Y X height and width.
"""

import logging
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from tif_jax.calibration.apart import Apart, Schedule
from tif_jax.calibration.search import Descent, Problem, search
from tif_jax.calibration.seconds import measured, seconds_of
from tif_jax.errors import InputError
from tif_jax.models import Model, require_head
from tif_jax.models.budget import Speed
from tif_jax.models.cost import cost
from tif_jax.reducers._steps import Fronted, stepwise_of

logger = logging.getLogger(__name__)

BATCH_SIZE = 32
_STEPS = 16, 6  # the first moves are of a sixteenth of all patches, the last of 6 tokens: the least lies flat
_HELD_OUT = 4  # every fourth batch
_FEW = 4  # every fourth of the other batches is enough to begin with
_NEAR = 0.98  # of the wished speed
_FAR = 0.95  # of the time allowed: what is faster leaves too few tokens
_SEARCHES = 5  # where the whole model proves slower, or much faster, than its blocks said


class Calibrated(NamedTuple):
    """A schedule and what it does: distance (`Apart.distance`), mean over images, and the share whose class is the
    unreduced one's."""

    schedule: Schedule
    gmac: float
    searched: dict[str, float]  # on the images of the search: distance, agreement
    held_out: dict[str, float]  # on those kept out of it
    images_per_second: dict[str, float] | None  # 'full' and 'reduced', where the budget was a speed


class Models(NamedTuple):
    """The weights with all tokens, and under the reducer that is calibrated."""

    full: Model
    with_schedule: Callable[[Schedule], Model]  # the model under the reducer
    searches_front: bool = False  # whether a schedule begins with how many go in front of the first block


Cost = Callable[[Schedule], float]


class Calibration:
    """Of a model on some images: for any budget, the number of tokens that go at each place with which logits move least.

    images: as the model takes them, 64 at least; a quarter is kept out of the search. Weights stay as they are. Budgets share
    compiled programs and the way down to them. Raises InputError for models of another task, reducers that are not
    `Stepwise`, and too few images.
    """

    def __init__(self, models: Models, images: Float32[np.ndarray, "I Y X 3"]):
        require_head(models.full, "a calibration")
        nothing = (0,) * (models.searches_front + len(models.full.blocks))
        model = models.with_schedule(nothing)
        if stepwise_of(model.reducer) is None:
            raise InputError("a calibration needs a reducer that takes a number of tokens for each block, a `Stepwise`")
        if models.searches_front and not isinstance(model.reducer, Fronted):
            raise InputError(
                "what goes in front is asked for, but the reducer is no `Fronted` (keep_ratio, round_to, then, before_blocks)"
            )
        batches = _batches(images)
        searched = [batch for i, batch in enumerate(batches) if i % _HELD_OUT < _HELD_OUT - 1]
        self._models, self._model = models, model
        self._apart, self._few, self._held_out = (
            Apart(model, some, models.searches_front)
            for some in (searched, searched[::_FEW], batches[_HELD_OUT - 1 :: _HELD_OUT])
        )
        rest = cost(model).gmac - self._apart.gmac(nothing)
        self._gmac: Cost = lambda schedule: self._apart.gmac(schedule) + rest
        self._clocks: dict[int, tuple[Cost, float]] = {}  # of batch sizes: seconds of a schedule, and with all tokens
        self._descents: dict[Cost, Descent] = {}

    def within(self, budget: float | Speed) -> Calibrated:
        """The schedule for a budget. Raises InputError for one out of reach."""
        if isinstance(budget, Speed):
            schedule, speeds = self._by_speed(budget)
        else:
            schedule, speeds = self._search(self._gmac, budget), None
        return Calibrated(
            schedule, cost(self._models.with_schedule(schedule)).gmac, _judged(self._apart, schedule),
            _judged(self._held_out, schedule), speeds,
        )  # fmt: skip

    def _search(self, cost: Cost, budget: float) -> Schedule:
        problem, few = (
            Problem(
                on.distance,
                cost,
                on.hold,
                on.most,
                on.num_patches,
                on.num_places,
                on.num_free,
                budget,
                on.follows,
                on.left_at,
            )
            for on in (self._apart, self._few)
        )
        if cost not in self._descents:
            self._descents[cost] = Descent(few, max(1, self._apart.num_patches // _STEPS[0]))
        return search(problem, few, self._descents[cost], _STEPS[1])

    def _by_speed(self, wished: Speed) -> tuple[Schedule, dict[str, float]]:
        """Found with seconds as the cost; where the whole model proves slower or much faster than its blocks said, again."""
        size, models = wished.batch_size, self._models
        if size not in self._clocks:
            seconds = seconds_of(self._apart, self._model, size)
            self._clocks[size] = seconds, float(np.median(measured({"full": models.full}, size)["full"]))
        seconds, whole = self._clocks[size]
        budget = whole / wished.number if wished.is_relative else size / wished.number
        best: tuple[float, Schedule, dict[str, float]] | None = None  # the slowest that is fast enough, or the fastest
        for _ in range(_SEARCHES):
            try:
                schedule = self._search(seconds, budget)
            except InputError:  # so little time is not enough for any
                if best is None:
                    raise InputError(f"budget {wished} can not be met: so fast is no schedule") from None
                break
            times = measured({"full": models.full, "reduced": models.with_schedule(schedule)}, size)
            # Beside all tokens in the same round: a machine is not equally fast in all.
            allowed = times["full"] / wished.number if wished.is_relative else size / wished.number
            share = float(np.median(times["reduced"] / allowed))
            rates = {name: float(size / np.median(time)) for name, time in times.items()}
            logger.info("calibrate: %.4g images/s, with all tokens %.4g", rates["reduced"], rates["full"])
            is_met = share <= 1 / _NEAR
            worth = share if is_met else -share
            if best is None or worth > best[0]:
                best = worth, schedule, rates
            if is_met and (share >= _FAR or not any(schedule)):
                break
            budget /= share
        assert best is not None
        worth, schedule, rates = best
        if worth < 0:
            logger.warning(
                "budget %s is not met: the schedule is for %.4g images/s, %.3g times those of all tokens; ask for more, or "
                "again on a machine at rest",
                wished, rates["reduced"], rates["reduced"] / rates["full"],
            )  # fmt: skip
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
