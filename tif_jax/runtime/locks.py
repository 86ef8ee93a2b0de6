"""Locks between processes: files that the system unlocks when their process ends, however it ends.

They are flock's. Where the file system knows no locks (some network file systems and mounted buckets; Windows), everybody
gets every lock.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def lock(path: Path, note: str = "") -> Iterator[bool | None]:
    """Whether this process holds the lock, until the block ends: False while another holds it. Nobody is waited for.

    None: there are no locks here. path: a file in a folder that exists; it is there while the lock is held. note: what the
    file says then. Raises OSError if the file can not be made.
    """
    descriptor, ours = _lock(path) if fcntl is not None else (None, None)
    if descriptor is None:
        yield ours
        return
    try:
        with suppress(OSError):  # a full disk is told by whoever has more to write
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, note.encode(errors="surrogateescape"), 0)
        yield True
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        os.close(descriptor)


def holder(path: Path) -> dict[str, Any] | None:
    """The note in a workdir's lock: command, host, pid, since; None where there is none, or not yet."""
    try:
        who = json.loads(path.read_text())
        return {key: who[key] for key in ("command", "host", "pid", "since")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_held(path: Path) -> bool | None:
    """Whether some process of this machine holds the lock, as the system's table says; None where there is no such table.

    Nothing is locked for that.
    """
    try:
        held = re.findall(r"FLOCK .*:(\d+) \d+ \w+$", Path("/proc/locks").read_text(), re.MULTILINE)
        return str(path.stat().st_ino) in held
    except FileNotFoundError:
        return None if path.exists() else False
    except OSError:
        return None


def _lock(path: Path) -> tuple[int | None, bool | None]:
    """A descriptor that holds the lock, or None; and what `lock` says."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(path, descriptor):
                return descriptor, True
        except BlockingIOError:
            os.close(descriptor)
            return None, False
        except OSError:
            os.close(descriptor)
            return None, None
        os.close(descriptor)  # its holder has removed it in the meantime: another may hold a new one


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
