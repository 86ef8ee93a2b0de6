"""SIGTERM, which a preempted machine or a job scheduler sends, as a flag: work ends where it can be taken up again."""

import ctypes
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def sigterm_flag() -> Iterator[threading.Event]:
    """An event that SIGTERM sets. Outside the main thread, where Python allows no handlers, it is never set."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    # What Python does not know it can not put back: in a run of several processes JAX has a handler in C.
    libc, before = ctypes.CDLL(None), ctypes.create_string_buffer(512)
    libc.sigaction(signal.SIGTERM, None, before)
    previous = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, previous)
        libc.sigaction(signal.SIGTERM, before, None)
