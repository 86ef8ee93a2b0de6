"""The search for a schedule: how many tokens go at each place so that a cost is met at the least distance.

Places are the blocks and, if it is searched, what is in front of the first. A schedule is moved by how many tokens a place
leaves: fewer there means that no later one leaves more, and more there that no earlier one leaves less. Greedy first: from
nothing reduced, again and again `step` tokens fewer where that adds the least distance for each unit of cost saved. Then
other numbers at the first place, with those of all others in proportion to what they are. Then exchange: fewer behind one
place, more behind another, as long as that helps by more than a standard error, in smaller and smaller steps. Last, single
tokens use up what is left of the cost, unless that hurts. Schedules are tried on images; nothing is differentiated.
"""

import logging
from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from tif_jax.errors import InputError

logger = logging.getLogger(__name__)

Schedule = tuple[int, ...]
_CHOICES = 3  # places tried on each side of an exchange


class Problem(NamedTuple):
    """A cost (GMAC of an image, or seconds of a batch) must not be above `budget`; distance is to be small."""

    distance: Callable[[Schedule], Float[np.ndarray, " I"]]  # of a schedule, for each image
    cost: Callable[[Schedule], float]
    hold: Callable[[Schedule], None]  # told of every schedule from which the next ones will differ a little
    most: Callable[[int, int], int]  # at a place, of so many patch tokens, how many can go
    num_patches: int
    num_places: int
    num_free: int  # places, from the first, at which tokens may go
    budget: float
    follows: Callable[[Schedule], bool] = lambda schedule: True  # whether a model would do as the schedule says
    # (place, number, up) -> the number next to it, above or below, that can be left there
    left_at: Callable[[int, int, bool], int] = lambda place, number, up: number


class Descent:
    """Greedy, from nothing reduced: again and again `step` tokens fewer where that adds the least distance for each unit of
    cost saved. Budgets are points on one way down, which several of them share; `problem.budget` is not read.
    """

    def __init__(self, problem: Problem, step: int):
        self.step, self._cost = step, problem.cost
        self._going = _descending(problem, step)
        self._gone: list[Schedule] = []

    def within(self, budget: float) -> Schedule:
        """The first schedule on the way down whose cost is within it. Raises InputError if there is none."""
        for schedule in self._gone:
            if self._cost(schedule) <= budget:
                return schedule
        for schedule in self._going:
            self._gone.append(schedule)
            if self._cost(schedule) <= budget:
                return schedule
        least = self._cost(self._gone[-1])
        raise InputError(f"budget {budget:.4g} can not be met: with as few tokens as can be it takes {least:.4g}")


def search(problem: Problem, few: Problem, descent: Descent, least: int) -> Schedule:
    """The schedule found.

    few: the same problem on a part of the images, for the descent and for what is worth a try, which all would only slow.
    least: tokens moved at once in the end. Raises InputError for a budget that can not be met.
    """
    step = descent.step
    schedule = _with_other_first(few, descent.within(problem.budget), step, least)
    problem.hold(schedule)
    few.hold(schedule)
    while step >= least:
        schedule = _exchanged(problem, few, schedule, step)
        step //= 2
    filled = _filled(problem, schedule, range(problem.num_free), 1)
    is_worse = _is_less(problem.distance(schedule), problem.distance(filled))
    return schedule if is_worse else filled


def _descending(problem: Problem, step: int) -> Iterator[Schedule]:
    """All schedules on the way down, of multiples of `step`: so there are few numbers of tokens to compile for."""
    schedule: Schedule = (0,) * problem.num_places
    now = 0.0  # distance, mean over images
    prices: dict[int, tuple[float, float, bool]] = {}  # price, distance, whether it is of this schedule
    while True:
        yield schedule
        problem.hold(schedule)  # since it was held, others were
        cost = problem.cost(schedule)
        candidates = _candidates(problem, schedule, -step)
        candidates = {i: other for i, other in candidates.items() if problem.cost(other) < cost}
        if not candidates:
            return
        # The more is gone the dearer it gets: earlier prices are asked again only where they are the lowest.
        prices = {i: (price, found, False) for i, (price, found, _) in prices.items()}
        while True:
            place = min(candidates, key=lambda i: prices[i][0] if i in prices else -1.0)
            if place in prices and prices[place][2]:
                break
            found = float(problem.distance(candidates[place]).mean())
            prices[place] = ((found - now) / (cost - problem.cost(candidates[place])), found, True)
        schedule, now = candidates[place], prices[place][1]
        _tell(problem, schedule, now)


def _with_other_first(few: Problem, schedule: Schedule, step: int, unit: int) -> Schedule:
    """Of the schedule, and those within the budget that have a multiple of twice `step` at the first place, or the nearest
    number that can be left there, and in the others as many in proportion, in multiples of `unit`, the one of least distance.

    To let go of much before all else can pay where a little does not, and takes from all places that come after: a
    way that leads through steps at one place, and exchanges between two, passes by it.
    """
    few.hold(schedule)
    best, least = schedule, float(few.distance(schedule).mean())
    for number in range(0, few.num_patches, 2 * step):
        first = few.num_patches - few.left_at(0, few.num_patches - number, False)
        other = (first, *[0] * (few.num_places - 1))
        # Asked by itself: where a little elsewhere costs more than it saves, bisection passes by it.
        is_alone = few.cost(other) <= few.budget
        if not is_alone:
            more = [
                (first, *(round(r * share / unit) * unit for r in schedule[1:])) for share in np.arange(0, 2, 1 / 64)
            ]
            enough = bisect_left(more, True, key=lambda s: not _can_be(few, s) or few.cost(s) <= few.budget)
            other = more[min(enough, len(more) - 1)]
        if other == schedule or not _can_be(few, other) or few.cost(other) > few.budget:
            continue
        distance = float(few.distance(other).mean())
        _tell(few, other, distance)
        if distance < least:
            best, least = other, distance
        if is_alone:  # the rest have nothing in the other places, and more than is needed in the first
            break
    return best


class _Prices(NamedTuple):
    """By place, what was found last: distance for each unit of cost saved, and less distance (below 0) for each spent."""

    fewer: dict[int, float]
    more: dict[int, float]


def _exchanged(problem: Problem, few: Problem, schedule: Schedule, step: int) -> Schedule:
    """The schedule after all exchanges of `step` tokens that help."""
    now, prices = problem.distance(schedule), _Prices({}, {})
    while True:
        better = _better(problem, few, schedule, now, step, prices)
        if better is None:  # prices from before may have hidden one
            better = _better(problem, few, schedule, now, step, prices := _Prices({}, {}))
        if better is None:
            return schedule
        schedule, now = better
        problem.hold(schedule)
        few.hold(schedule)
        _tell(problem, schedule, float(now.mean()))


def _better(
    problem: Problem, few: Problem, schedule: Schedule, now: Float[np.ndarray, " I"], step: int, prices: _Prices
) -> tuple[Schedule, Float[np.ndarray, " I"]] | None:
    """A schedule within the budget of less distance: fewer tokens behind one place, more behind another."""
    cost, known = problem.cost(schedule), few.distance(schedule)

    def price(other: Schedule) -> float:
        return float((few.distance(other) - known).mean() / abs(cost - problem.cost(other)))

    fewer, more = (_candidates(problem, schedule, change) for change in (-step, step))
    fewer = {i: other for i, other in fewer.items() if problem.cost(other) < cost}
    more = {i: other for i, other in more.items() if problem.cost(other) > cost}
    takers, givers = _cheapest(fewer, price, prices.fewer), _cheapest(more, price, prices.more)
    both = {(a, b): prices.fewer[a] + prices.more[b] for a in takers for b in givers if a != b}
    for taker, giver in sorted(both, key=lambda pair: both[pair]):
        if both[taker, giver] > 0:
            break
        changed = _filled(problem, fewer[taker], (giver,), step)
        # What does not help a few images is not asked of all, which takes longest.
        if changed == fewer[taker] or few.distance(changed).mean() >= known.mean():
            continue
        if _is_less(found := problem.distance(changed), now):
            return changed, found
    return None


def _cheapest(
    candidates: dict[int, Schedule], price: Callable[[Schedule], float], known: dict[int, float]
) -> list[int]:
    """The few places of the least price. One that is known from before is asked again only if it is among these."""
    asked: set[int] = set()
    while True:
        first = sorted(candidates, key=lambda i: known.get(i, -np.inf))[:_CHOICES]
        if asked.issuperset(first):
            return first
        for i in first:
            if i not in asked:
                known[i] = price(candidates[i])
                asked.add(i)


def _filled(problem: Problem, schedule: Schedule, places: range | tuple[int, ...], step: int) -> Schedule:
    """The schedule with more tokens behind these places, `step` at a time, where they use the most of the budget left."""
    while True:
        more = [other for i, other in _candidates(problem, schedule, step).items() if i in places]
        within = [other for other in more if problem.cost(schedule) < problem.cost(other) <= problem.budget]
        if not within:
            return schedule
        schedule = max(within, key=problem.cost)


def _is_less(these: Float[np.ndarray, " I"], those: Float[np.ndarray, " I"]) -> bool:
    """Whether these are less by more than the standard error of the mean difference: of many that are tried, chance favours
    some."""
    difference = these - those
    return bool(difference.mean() < -difference.std() / np.sqrt(len(difference)) - 1e-12)


def _candidates(problem: Problem, schedule: Schedule, change: int) -> dict[int, Schedule]:
    """For each place the schedule with that many tokens more behind it, or fewer, if there is one."""
    found = {}
    for i in range(problem.num_free):
        left = [problem.num_patches - sum(schedule[: j + 1]) for j in range(problem.num_places)]
        left[i] = problem.left_at(i, min(max(left[i] + change, 1), problem.num_patches), change > 0)
        for j, n in enumerate(left):
            if j < i and change > 0 and n < left[i]:
                left[j] = problem.left_at(j, left[i], True)
            elif j > i:
                left[j] = min(n, left[i])
        left[problem.num_free :] = [left[problem.num_free - 1]] * (problem.num_places - problem.num_free)
        arriving = [problem.num_patches, *left[:-1]]
        other = tuple(before - after for before, after in zip(arriving, left, strict=True))
        if other != schedule and _can_be(problem, other):
            found[i] = other
    return found


def _can_be(problem: Problem, schedule: Schedule) -> bool:
    left = problem.num_patches
    for place, number in enumerate(schedule):
        if number and not 0 < number <= problem.most(place, left):
            return False
        left -= number
    return problem.follows(schedule)


def _tell(problem: Problem, schedule: Schedule, distance: float) -> None:
    listed = " ".join(map(str, schedule))
    logger.info("calibrate: cost %.4g, distance %.4f: %s", problem.cost(schedule), distance, listed)
