"""The signals that end a program: SIGTERM of a job scheduler or a preempted machine, SIGHUP, and Ctrl-C (SIGINT).

Work that has something to save asks a flag (`stop_flag`) and ends where it can be taken up again. Everything else just ends:
its results are written whole or not at all. There the signal raises `Preempted` in the main thread, and if that is stuck
where Python runs no handlers, as in a compiler, the process ends without it.
"""

import ctypes
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from tif_jax.errors import Preempted

_SECONDS_TO_STOP = 20.0  # what a launcher waits before SIGKILL is rarely less than 30
_SECONDS_OF_ONE_CTRL_C = 0.3  # shells and wrappers hand the terminal's signal on to those who have it already
ALL_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]


@dataclasses.dataclass
class _Handling:
    """What there is to know while signals are handled."""

    end: Callable[[int], None]  # ends the process with a status
    stop: threading.Event = dataclasses.field(default_factory=threading.Event)
    over: threading.Event = dataclasses.field(default_factory=threading.Event)  # nothing is left to be stopped
    beside: list[Callable[[int], object]] = dataclasses.field(default_factory=list)  # handlers of others
    received: int = 0  # the signal; 0: none yet
    at: float = 0.0  # when
    askers: int = 0  # how many `stop_flag` are open
    raised: bool = False

    def handle(self, number: int, _frame: object) -> None:
        now = time.monotonic()
        if self.received or self.over.is_set():
            if number == signal.SIGINT and now - self.at > _SECONDS_OF_ONE_CTRL_C:
                os.write(2, b"tif: ended at once by Ctrl-C; what is finished is intact\n")
                os._exit(130)
            return
        self.received, self.at = number, now
        self.stop.set()
        for handler in self.beside:
            handler(signal.SIGTERM)
        if not self.askers:
            self.interrupt()

    def interrupt(self) -> None:
        """Raises Preempted, and sees to it that the process ends even if nobody hears of it."""
        self.end_soon()
        self.raised = True
        raise Preempted(self.message())

    def message(self) -> str:
        name = "Ctrl-C" if self.received == signal.SIGINT else signal.Signals(self.received).name
        return f"stopped by {name}; run the same command again to go on"

    def status(self) -> int:
        return 130 if self.received == signal.SIGINT else 75

    def end_soon(self) -> None:
        """Ends the process in a while, unless it is over by then."""
        threading.Thread(target=self._end_late, daemon=True).start()

    def _end_late(self) -> None:
        if not self.over.wait(_SECONDS_TO_STOP):
            os.write(2, f"tif: {self.message()}\n".encode())
            self.end(self.status())


_handling: _Handling | None = None


@contextmanager
def handled(
    end: Callable[[int], None] = os._exit, signals: Sequence[signal.Signals] = ALL_SIGNALS
) -> Iterator[_Handling]:
    """Makes the signals end the work with `Preempted`, as this module says; afterwards they mean what they did before.

    Ignored ones stay ignored (nohup). A second Ctrl-C ends the process at once, with status 130. end: ends the process
    with a status, where the main thread does not hear of a signal. Outside the main thread, where Python allows no
    handlers, nothing changes.
    """
    global _handling
    if _handling is not None or threading.current_thread() is not threading.main_thread():
        yield _handling or _Handling(end)
        return
    handling = _handling = _Handling(end)
    # What Python does not know it can not put back: in a run of several processes JAX has a handler in C.
    libc, before = ctypes.CDLL(None), {}
    for number in signals:
        if signal.getsignal(number) != signal.SIG_IGN:
            in_c = ctypes.create_string_buffer(512)
            libc.sigaction(number, None, in_c)
            before[number] = signal.signal(number, handling.handle), in_c
    try:
        yield handling
    finally:
        _handling = None
        handling.over.set()
        for number, (in_python, in_c) in before.items():
            signal.signal(number, in_python)
            libc.sigaction(number, in_c, None)


@contextmanager
def stop_flag() -> Iterator[threading.Event]:
    """An event that a signal sets. Inside it does nothing else: who asks has something to save, and then raises Preempted.

    Where nobody asked in time, Preempted is raised at the end. Where the program is not ours (nothing is `handled`), this
    is about SIGTERM alone; outside the main thread the event is never set.
    """
    if threading.current_thread() is not threading.main_thread():
        yield threading.Event()
        return
    with handled(signals=[signal.SIGTERM]) as handling:
        handling.askers += 1
        try:
            yield handling.stop
        finally:
            handling.askers -= 1
            if handling.received and not handling.askers:
                handling.end_soon()
        if handling.received and not handling.askers:
            handling.interrupt()


def take_back(number: int = signal.SIGTERM) -> None:
    """To be called after a library has put a handler in C in place of ours: from now on ours calls that one, too."""
    if _handling is None or threading.current_thread() is not threading.main_thread():
        return
    libc, in_c = ctypes.CDLL(None), ctypes.create_string_buffer(512)
    libc.sigaction(number, None, in_c)
    signal.signal(number, _handling.handle)
    own = ctypes.create_string_buffer(512)
    libc.sigaction(number, None, own)
    theirs, ours = (ctypes.c_void_p.from_buffer(action).value for action in (in_c, own))  # its first field
    if theirs and theirs != ours:
        _handling.beside.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(theirs))
