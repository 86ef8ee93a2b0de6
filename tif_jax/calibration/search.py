"""The search for a schedule: how many tokens go in each block so that a cost is met at the least divergence.

Greedy first: from nothing reduced, again and again `step` more tokens in the block where that adds the least divergence for
each unit of cost saved. Then exchange: more in one block, fewer in another, as long as that helps, in smaller and smaller
steps. Last, single tokens use up what is left of the cost. Schedules are tried on the images; nothing is differentiated.
"""

import logging
from collections.abc import Callable
from typing import NamedTuple

from tif_jax.errors import InputError

logger = logging.getLogger(__name__)

Schedule = tuple[int, ...]
_CHOICES = 3  # blocks tried on each side of an exchange


class Problem(NamedTuple):
    """cost must not be above `budget`; divergence is to be small."""

    divergence: Callable[[Schedule], float]  # of a schedule, mean over images
    cost: Callable[[Schedule], float]
    hold: Callable[[Schedule], None]  # told of every schedule from which the next ones will differ a little
    most: Callable[[int], int]  # how many of some patch tokens can go in one block
    num_patches: int
    depth: int
    num_free: int  # blocks, from the first, in which tokens may go
    budget: float


def search(problem: Problem, step: int, least: int) -> Schedule:
    """The schedule found. step: tokens moved at once in the beginning; least: in the end. Raises InputError for a budget
    that can not be met."""
    schedule = _greedy(problem, step)
    while step >= least:
        schedule = _exchanged(problem, schedule, step)
        step //= 2
    return _filled(problem, schedule)


def _greedy(problem: Problem, step: int) -> Schedule:
    """The first schedule within the budget, of multiples of `step`: so there are few numbers of tokens to compile for."""
    schedule: Schedule = (0,) * problem.depth
    now = 0.0
    prices: dict[int, tuple[float, float, bool]] = {}  # price, divergence, whether it is of this schedule
    problem.hold(schedule)
    while (cost := problem.cost(schedule)) > problem.budget:
        while True:
            fitting = [i for i in range(problem.num_free) if _fits(problem, _changed(schedule, i, step))]
            if not fitting:
                raise InputError(
                    f"budget {problem.budget:.4g} can not be met: with as few tokens as can be it takes {cost:.4g}"
                )
            block = min(fitting, key=lambda i: prices[i][0] if i in prices else -1.0)
            if block in prices and prices[block][2]:
                break
            after = _changed(schedule, block, step)
            found = problem.divergence(after)
            prices[block] = ((found - now) / max(cost - problem.cost(after), 1e-9), found, True)
        schedule, now = _changed(schedule, block, step), prices[block][1]
        # The more is gone the dearer it gets: earlier prices are asked again only where they are the lowest.
        prices = {i: (price, found, False) for i, (price, found, _) in prices.items()}
        problem.hold(schedule)
        logger.info("calibrate: cost %.4g, divergence %.4f nats: %s", problem.cost(schedule), now, _listed(schedule))
    return schedule


def _exchanged(problem: Problem, schedule: Schedule, step: int) -> Schedule:
    """The schedule after all exchanges of `step` tokens that help."""
    now = problem.divergence(schedule)
    while (better := _better(problem, schedule, now, step)) is not None:
        schedule, now = better
        problem.hold(schedule)
        logger.info("calibrate: cost %.4g, divergence %.4f nats: %s", problem.cost(schedule), now, _listed(schedule))
    return schedule


def _better(problem: Problem, schedule: Schedule, now: float, step: int) -> tuple[Schedule, float] | None:
    """A schedule within the budget of less divergence, by giving back tokens in one block and taking them in another."""
    cost = problem.cost(schedule)
    up, down = {}, {}  # divergence for each unit of cost saved; divergence avoided for each unit spent
    for i in range(problem.num_free):
        if _fits(problem, more := _changed(schedule, i, step)):
            up[i] = (problem.divergence(more) - now) / max(cost - problem.cost(more), 1e-9)
        if schedule[i]:
            fewer = _changed(schedule, i, -min(step, schedule[i]))
            down[i] = (now - problem.divergence(fewer)) / max(problem.cost(fewer) - cost, 1e-9)
    takers = sorted(up, key=lambda i: up[i])[:_CHOICES]
    givers = sorted(down, key=lambda i: -down[i])[:_CHOICES]
    pairs = sorted(((a, b) for a in takers for b in givers if a != b), key=lambda pair: up[pair[0]] - down[pair[1]])
    for taker, giver in pairs:
        if up[taker] > down[giver]:
            break
        changed = _filled(problem, _changed(schedule, taker, step), giver, step)
        if changed != schedule and _fits(problem, changed) and (found := problem.divergence(changed)) < now:
            return changed, found
    return None


def _filled(problem: Problem, schedule: Schedule, block: int | None = None, step: int = 1) -> Schedule:
    """The schedule with as many tokens given back as the budget allows, `step` at a time in that block; None: one at a time,
    where each costs least."""
    blocks = range(problem.num_free) if block is None else (block,)
    while True:
        fewer = [_changed(schedule, i, -min(step, schedule[i])) for i in blocks if schedule[i]]
        within = [candidate for candidate in fewer if problem.cost(candidate) <= problem.budget]
        if not within:
            return schedule
        schedule = max(within, key=problem.cost)


def _changed(schedule: Schedule, block: int, number: int) -> Schedule:
    return (*schedule[:block], schedule[block] + number, *schedule[block + 1 :])


def _fits(problem: Problem, schedule: Schedule) -> bool:
    left = problem.num_patches
    for number in schedule:
        if number > problem.most(left):
            return False
        left -= number
    return True


def _listed(schedule: Schedule) -> str:
    return " ".join(map(str, schedule))
