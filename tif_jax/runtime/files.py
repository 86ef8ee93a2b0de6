"""Files and folders that appear whole or not at all, whatever interrupts their writer.

They are written under another name in the same folder and renamed when all is there.
"""

import errno
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tif_jax.errors import InputError, WorkError

_CAN_NOT_BE_WRITTEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{32}\.tmp|\..+\.partial|.+\.orbax-checkpoint-tmp.*")
_SECONDS_OF_ANY_WRITE = 3600


def write(path: Path, data: bytes, *, once: bool = False) -> None:
    """Puts a file at `path`, in a folder that is made if need be. The data are on disk before the file has its name.

    once: only if there is no such file yet; of several writers at once, one writes it and the others change nothing.
    Raises InputError if the folder can not be written to, WorkError if the disk is full; both name the path.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        (_link if once else os.replace)(temporary, path)
    except OSError as error:
        raise not_written(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def read(path: Path) -> bytes:
    """The file's content. Raises InputError if it can not be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"can not read {path}: {error.strerror}") from error


def remove_abandoned(folder: Path) -> None:
    """Removes what writers that were killed left unfinished anywhere in the folder; nobody may be writing there.

    Except to impact shards, which have locks of their own: beside them only what no writer can still be at is removed.
    """
    for parent, folders, names in os.walk(folder):
        shared = any(name.startswith(("manifest.json", "part-")) for name in names)
        for name in [name for name in (*folders, *names) if _UNFINISHED.fullmatch(name)]:
            path = Path(parent, name)
            with suppress(OSError):
                if not shared or time.time() - path.lstat().st_mtime > _SECONDS_OF_ANY_WRITE:
                    shutil.rmtree(path) if name in folders else path.unlink()
        folders[:] = [name for name in folders if not _UNFINISHED.fullmatch(name)]


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A name to write a file or folder to, which becomes `path` when the block ends; after an error nothing is left.

    Only one writer at a time: raises InputError if there is such a path already, or another writer's unfinished one.
    """
    if os.path.lexists(path):
        raise InputError(f"{path} exists already; choose another name, or move it away")
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.mkdir(parents=True)
    except FileExistsError:
        raise InputError(
            f"{partial} exists: either it is being written, or its writer was killed; then delete it"
        ) from None
    except OSError as error:
        raise not_written(path, error) from error
    try:
        yield partial / path.name
        (partial / path.name).rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def not_written(path: Path, error: OSError) -> InputError | WorkError:
    """The error to raise where `path` could not be written."""
    failed = f"can not write {path}: {error.strerror}"
    if error.errno in _CAN_NOT_BE_WRITTEN:
        return InputError(f"{failed}; choose a place (--workdir) that can be written to")
    remedy = "make room" if error.errno in _DISK_FULL else "check the disk"
    return WorkError(f"{failed}; what is finished is intact: {remedy}, then run the same command again")


def _link(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)  # unlike a rename, never replaces what another writer put there
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links, such as exFAT or a mounted bucket
        os.replace(temporary, path)
