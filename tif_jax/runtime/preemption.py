"""The signals that end a program: SIGTERM of a job scheduler or a preempted machine, SIGHUP, and Ctrl-C (SIGINT).

Work that has something to save asks a flag (`stop_flag`) and ends where it can be taken up again. Everything else has
nothing to save, since results are written whole or not at all: the program just ends, at once.

A thread does so, and no exception in the main thread: that is deaf while it compiles, and raised in the middle of an import,
of Python's garbage collection or of XLA, exceptions came out as traces and once as a crash.
"""

import ctypes
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from tif_jax.errors import Preempted
from tif_jax.runtime import log_file

_SECONDS_TO_STOP = 20.0  # after everything is saved
_SECONDS_OF_ONE_CTRL_C = 0.3  # shells and wrappers hand the terminal's signal on to those who have it already
ALL_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]

Handler = Callable[[int], object]


@dataclasses.dataclass
class _Handling:
    """What there is to know while signals are handled."""

    end: Callable[[int], None] | None  # ends the process with a status; None: Preempted is raised in its stead
    name: str = "tif"  # of the program, for what is printed
    stop: threading.Event = dataclasses.field(default_factory=threading.Event)
    over: threading.Event = dataclasses.field(default_factory=threading.Event)  # nothing is left to be stopped
    beside: list[Handler] = dataclasses.field(default_factory=list)  # handlers of others
    received: int = 0  # the signal; 0: none yet
    at: float = 0.0  # when
    askers: int = 0  # how many `stop_flag` are open

    def heed(self, number: int) -> None:
        now = time.monotonic()
        if self.received or self.over.is_set():
            if number == signal.SIGINT and now - self.at > _SECONDS_OF_ONE_CTRL_C:
                self._say("ended at once by Ctrl-C; what is finished is intact")
                log_file.end(130)
                os._exit(130)
            return
        self.received, self.at = number, now
        self.stop.set()
        for handler in self.beside:
            handler(signal.SIGTERM)
        if not self.askers:
            self.finish()

    def finish(self) -> None:
        name = "Ctrl-C" if self.received == signal.SIGINT else signal.Signals(self.received).name
        message = f"stopped by {name}; run the same command again to go on"
        if self.end is None:
            raise Preempted(message)
        self._say(message)
        self.end(self.status())

    def finish_late(self) -> None:
        """Ends the process unless all is over by then: threads of a write may never end."""
        if self.end is not None and not self.over.wait(_SECONDS_TO_STOP):
            self.finish()

    def status(self) -> int:
        return 130 if self.received == signal.SIGINT else 75

    def _say(self, text: str) -> None:
        log_file.note(f"{self.name}: {text}")
        with suppress(OSError):
            new_line = "\n" if os.isatty(2) else ""  # below a bar, or behind the terminal's ^C
            os.write(2, f"{new_line}{self.name}: {text}\n".encode())


_handling: _Handling | None = None


@contextmanager
def handled(
    end: Callable[[int], None] | None = None, signals: Sequence[signal.Signals] = ALL_SIGNALS
) -> Iterator[_Handling]:
    """Makes the signals end the work, as this module says; afterwards they mean what they did before.

    end: ends the process with a status; it is called in a thread. Without it the signals raise Preempted in the main thread.
    Ignored ones stay ignored (nohup). A second Ctrl-C ends the process at once, with status 130. Within another `handled`,
    and outside the main thread, where Python allows no handlers, nothing changes.
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
            before[number] = signal.signal(number, _handler(handling)), in_c
    ears = os.pipe() if end is not None else None
    if ears:
        os.set_blocking(ears[1], False)
        others = signal.set_wakeup_fd(ears[1], warn_on_full_buffer=False)
        threading.Thread(target=_listen, args=(ears[0], handling), daemon=True).start()
    try:
        yield handling
    finally:
        _handling = None
        handling.over.set()
        if ears:
            signal.set_wakeup_fd(others)
            os.close(ears[1])
        for number, (in_python, in_c) in before.items():
            signal.signal(number, in_python)
            libc.sigaction(number, in_c, None)


@contextmanager
def stop_flag(is_end: bool = False) -> Iterator[threading.Event]:
    """An event that a signal sets. Inside it does nothing else: who asks has something to save, and then raises Preempted.

    is_end: a signal is how this work is done, as a server's: nothing is left to be taken up again.
    Where nobody asked in time, the work ends with the block. Where the program is not ours (nothing is `handled`), this is
    about SIGTERM alone; outside the main thread the event is never set.
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
            if is_end:
                handling.received = 0
            if handling.received and not handling.askers:
                threading.Thread(target=handling.finish_late, daemon=True).start()
        if handling.received and not handling.askers:
            handling.finish()


def take_back(number: int = signal.SIGTERM) -> None:
    """To be called after a library has put a handler in C in place of ours: from now on ours calls that one, too."""
    if _handling is None or threading.current_thread() is not threading.main_thread():
        return
    libc, in_c, own = ctypes.CDLL(None), ctypes.create_string_buffer(512), ctypes.create_string_buffer(512)
    libc.sigaction(number, None, in_c)
    signal.signal(number, _handler(_handling))
    libc.sigaction(number, None, own)
    theirs, ours = (ctypes.c_void_p.from_buffer(action).value for action in (in_c, own))  # its first field
    if theirs and theirs != ours:
        _handling.beside.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(theirs))


def _handler(handling: _Handling) -> Callable[[int, object], None]:
    """For `signal.signal`. Where a thread listens, it is enough that the signal does not do what it would by itself."""
    return lambda number, _frame: None if handling.end else handling.heed(number)


def _listen(ear: int, handling: _Handling) -> None:
    while number := os.read(ear, 1):
        if number[0] in ALL_SIGNALS:
            handling.heed(number[0])
    os.close(ear)
