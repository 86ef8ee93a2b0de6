"""Locks between processes: files that the system unlocks when their process ends, however it ends.

They are flock's. Where the file system knows no locks (some network file systems and mounted buckets; Windows), everybody
gets every lock.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from tif_jax.errors import InputError
from tif_jax.runtime import files, processes

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_NAME = ".lock"


@contextmanager
def lock(path: Path, note: str = "") -> Iterator[bool | None]:
    """Whether this process holds the lock, until the block ends: False while another holds it. Nobody is waited for.

    None: there are no locks here. path: a file in a folder that exists; it is there while the lock is held. note: what the
    file says then.
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


@contextmanager
def only_run(workdir: Path) -> Iterator[None]:
    """While the block runs, no other program trains, evaluates or reports in the folder.

    What killed ones left unfinished there is removed. Raises InputError that says who has the folder. Of the processes of a
    run the first one holds it for all.
    """
    path = workdir / _NAME
    who = {"command": " ".join(["tif", *sys.argv[1:]]), "host": socket.gethostname(), "pid": os.getpid()}
    who["since"] = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    with lock(path, json.dumps(who)) if processes.is_first() else nullcontext() as ours:
        if not processes.first_says(ours is not False):
            raise InputError(
                f"{workdir} is in use by {_holder(path)}: wait for it, stop it, or choose another --workdir"
            )
        if ours:
            files.remove_abandoned(workdir)
        yield


def _holder(path: Path) -> str:
    try:
        who = json.loads(path.read_text())
        return f"`{who['command']}`, process {who['pid']} on {who['host']} since {who['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has just taken the lock, or just let go of it
        return "another run"


def _lock(path: Path) -> tuple[int | None, bool | None]:
    """A descriptor that holds the lock, or None; and what `lock` says."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise files.not_written(path, error) from error
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
