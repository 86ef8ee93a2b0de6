"""The ways in which a program of this project ends before its work is done."""


class InputError(ValueError):
    """What the caller gave is wrong; the message names it, what is allowed and the remedy. Exit status 2."""


class WorkError(RuntimeError):
    """The work failed (a full disk, a NaN), everything finished so far is intact. Exit status 1."""


class Preempted(BaseException):
    """SIGTERM or Ctrl-C came; what is done is saved, and the same command goes on from there. Exit status 75 or 130.

    Like KeyboardInterrupt no `Exception`: where `main` is called from Python, a signal may raise it anywhere.
    """


def is_shortage(error: BaseException) -> bool:
    """Whether the machine ran short of memory or threads, so that the error says nothing of what was worked on."""
    return isinstance(error, MemoryError) or any(
        sign in str(error) for sign in ("RESOURCE_EXHAUSTED", "can't start new thread")
    )
