"""Times taken side by side, so that a machine whose speed drifts is the same for all."""

import random
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

Name = TypeVar("Name", bound=Hashable)
Found = TypeVar("Found")


def in_rounds(turns: Mapping[Name, Callable[[], Found]], num_rounds: int) -> dict[Name, list[Found]]:
    """What each turn returned in every round. All have their turn in each round, in random order."""
    found: dict[Name, list[Found]] = {name: [] for name in turns}
    order, draw = list(turns), random.Random(0)
    for _ in range(num_rounds):
        draw.shuffle(order)
        for name in order:
            found[name].append(turns[name]())
    return found


def rate(run: Callable[[], int], seconds: float, least: int = 2) -> float:
    """Units per second of calls one after the other, for so many seconds and `least` calls; a call returns its units."""
    num_calls = num_units = 0
    began = time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds or num_calls < least:
        num_units += run()
        num_calls += 1
    return num_units / elapsed
