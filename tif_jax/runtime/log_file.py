"""A workdir's log: what the program says on stderr, with its command line, dates, the process, how it ended, tracebacks.

Lines are only appended, each whole: several processes may write to one file. A log that can not be written ends nothing: its
lines are lost, and whoever has results to write will say what is wrong. The environment is not written.
"""

import logging
import os
import shlex
import sys
import time
from collections import deque
from contextlib import suppress
from pathlib import Path

TIME = "%Y-%m-%d %H:%M:%S%z"
_MOST_BYTES = 4 * 2**20  # then the log begins anew; the one before it stays, as log.1.txt

command = shlex.join(["tif", *sys.argv[1:]])  # `main` may be called with another line


class _Log:
    """A file that is open for appending."""

    def __init__(self, path: Path):
        self.path, self.began = path, time.monotonic()
        self._open()

    def _open(self) -> None:
        self.descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def write(self, text: str) -> None:
        """A line, or one and those that belong to it. It takes no Python lock: a signal may come while one is held."""
        first, *others = text.rstrip().split("\n")
        lines = [f"{time.strftime(TIME)} {os.getpid()} {first}", *(f"    {line}" for line in others)]
        with suppress(OSError):
            os.write(self.descriptor, ("\n".join(lines) + "\n").encode(errors="backslashreplace"))
            if os.fstat(self.descriptor).st_size > _MOST_BYTES:
                is_there = self.path.exists() and os.path.samestat(os.fstat(self.descriptor), self.path.stat())
                before, self.descriptor = self.descriptor, -1
                os.close(before)
                if is_there:  # else another process has begun a new one
                    os.replace(self.path, self.path.with_suffix(f".1{self.path.suffix}"))
                self._open()


_log: _Log | None = None
_early: deque[str] = deque(maxlen=100)  # said before it is known where


class Handler(logging.Handler):
    """Writes records to the log that is open, or keeps them for the one that will be."""

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if _log is None:
            _early.append(text)
        else:
            _log.write(text)


def begin(path: Path, about: str) -> None:
    """From now on the log is at `path`. about: what its first line says behind the command."""
    global _log
    early = [*_early]
    end(None)
    try:
        path.parent.mkdir(exist_ok=True)
        _log = _Log(path)
    except OSError as error:
        logging.getLogger(__name__).warning("no log: can not write %s (%s)", path, error.strerror)
        return
    _log.write(f"begins: {command} ({about})")
    for text in early:
        _log.write(text)


def note(text: str) -> None:
    """For the log alone, if there is one: what is printed in another way."""
    if _log is not None:
        _log.write(text)


def end(status: int | None) -> None:
    """The last line, with the exit status; None: without one."""
    global _log
    log, _log = _log, None
    _early.clear()
    if log is not None:
        if status is not None:
            log.write(f"ends: status {status} after {time.monotonic() - log.began:.0f} s")
        with suppress(OSError):
            os.close(log.descriptor)
