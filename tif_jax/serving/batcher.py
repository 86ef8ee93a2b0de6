"""Items that come one by one, answered in batches: a queue, and a thread that works through it."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Generic, NamedTuple, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class _Waiting(NamedTuple):
    item: Any
    future: Future
    since: float


class Batcher(Generic[Item, Answer]):
    """Answers items in batches of what waits.

    answer: what items of one batch get, in their order; at most max(sizes) of them. It runs in one thread of its own.
    sizes: of batches for which `answer` is fast, with the seconds that each takes; what is between two takes as long as the
      larger. Of those that wait so many are taken as gives the most answers a second.
    patience: seconds that an item waits for others to share its batch, if the largest size is not full before.
    """

    def __init__(self, answer: Callable[[Sequence[Item]], Sequence[Answer]], sizes: dict[int, float], patience: float):
        self._answer, self._sizes, self._patience = answer, dict(sorted(sizes.items())), patience
        self._waiting: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._open = True
        self._thread = threading.Thread(target=self._work, name="batches", daemon=True)
        self._thread.start()

    def put(self, item: Item) -> "Future[Answer]":
        """What comes of it. One that is cancelled before its batch begins costs nothing."""
        future: Future[Answer] = Future()
        with self._changed:
            if not self._open:
                raise RuntimeError("the batcher is closed")
            self._waiting.append(_Waiting(item, future, time.monotonic()))
            self._changed.notify()
            return future

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def close(self) -> None:
        """Takes nothing more, and returns when all that waited is answered."""
        with self._changed:
            self._open = False
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while batch := self._next():
            batch = [one for one in batch if one.future.set_running_or_notify_cancel()]
            if not batch:
                continue
            try:
                answers = self._answer([one.item for one in batch])
            except Exception as error:  # of this batch alone: the next one may well be answered
                for one in batch:
                    one.future.set_exception(error)
                continue
            for one, answer in zip(batch, answers, strict=True):
                one.future.set_result(answer)

    def _next(self) -> list[_Waiting]:
        """The next batch, in the order of arrival; empty when all is done."""
        most = max(self._sizes)
        with self._changed:
            while len(self._waiting) < most and self._open:
                if not self._waiting:
                    self._changed.wait()
                elif (left := self._waiting[0].since + self._patience - time.monotonic()) > 0:
                    self._changed.wait(left)
                else:
                    break
            return [self._waiting.popleft() for _ in range(self._number(len(self._waiting)))]

    def _number(self, waiting: int) -> int:
        """How many of so many are best taken: with the most answers a second."""
        return min(waiting, max(self._sizes, key=lambda size: min(size, waiting) / self._sizes[size]))
