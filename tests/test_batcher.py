"""Batches of what waits: which, in which order, and what becomes of the cancelled and the failing."""

import threading
import time
from concurrent.futures import CancelledError

import pytest

from tif_jax.serving.batcher import Batcher


class Held:
    """Answers twice the items once it is let go; knows its batches."""

    def __init__(self):
        self.batches, self.go = [], threading.Event()

    def __call__(self, items):
        self.batches.append(list(items))
        assert self.go.wait(20)
        if "bad" in items:
            raise ValueError("bad")
        return [2 * item for item in items]


def waited_for(condition):
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came")


def test_what_waits_shares_a_batch_in_the_order_of_arrival():
    answer = Held()
    batcher = Batcher(answer, {1: 1.0, 4: 1.1}, patience=0.0)
    first = batcher.put(0)
    waited_for(lambda: answer.batches)
    others = [batcher.put(i) for i in range(1, 7)]
    assert len(batcher) == 6
    answer.go.set()
    assert [f.result(20) for f in (first, *others)] == [0, 2, 4, 6, 8, 10, 12]
    assert answer.batches == [[0], [1, 2, 3, 4], [5, 6]]
    batcher.close()


def test_sizes_that_give_most_answers_a_second():
    """Five at once in a batch of 8 would take twice the time of 4, and one more alone."""
    answer = Held()
    batcher = Batcher(answer, {1: 1.0, 4: 2.0, 8: 4.0}, patience=0.0)
    batcher.put(0)
    waited_for(lambda: answer.batches)
    found = [batcher.put(i) for i in range(5)]
    answer.go.set()
    assert [f.result(20) for f in found] == [0, 2, 4, 6, 8]
    assert [len(b) for b in answer.batches] == [1, 4, 1]
    batcher.close()


def test_a_batch_waits_for_others_but_not_for_ever():
    answer = Held()
    answer.go.set()
    batcher = Batcher(answer, {2: 1.0}, patience=60.0)
    found = [batcher.put(i) for i in range(2)]
    assert [f.result(20) for f in found] == [0, 2]  # full: nobody waits
    batcher.close()
    batcher = Batcher(answer, {2: 1.0}, patience=0.05)
    assert batcher.put(7).result(20) == 14
    batcher.close()
    assert answer.batches == [[0, 1], [7]]


def test_cancelled_failing_and_closing():
    answer = Held()
    batcher = Batcher(answer, {1: 1.0, 2: 1.1}, patience=0.0)
    first = batcher.put(1)
    waited_for(lambda: answer.batches)
    gone, bad, beside, last = (batcher.put(item) for item in (2, "bad", 3, 4))
    assert gone.cancel()
    answer.go.set()
    closing = threading.Thread(target=batcher.close)
    closing.start()
    closing.join(20)
    assert not closing.is_alive()
    assert first.result() == 2
    with pytest.raises(CancelledError):
        gone.result()
    with pytest.raises(ValueError):
        bad.result()
    assert (beside.result(), last.result()) == (6, 8)
    assert answer.batches == [[1], ["bad"], [3, 4]]
    with pytest.raises(RuntimeError):
        batcher.put(5)
