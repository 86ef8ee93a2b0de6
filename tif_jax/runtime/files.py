"""Files and folders that appear whole or not at all, whatever interrupts their writer.

They are written under another name in the same folder and renamed when all is there.
"""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from tif_jax.errors import InputError, WorkError
from tif_jax.runtime.locks import lock

_CAN_NOT_BE_WRITTEN = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG
)  # fmt: skip
_REMEDIES = {
    errno.ENOSPC: "make room (bytes or inodes)",
    errno.EDQUOT: "make room",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f)",
}


def write(path: Path, data: bytes, *, once: bool = False) -> None:
    """Puts a file at `path`, in a folder that is made if need be. The data are on disk before the file has its name.

    once: only if there is no such file yet; of several writers at once, one writes it and the others change nothing.
    Raises InputError if the folder can not be written to, WorkError if the disk is full; both name the path.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            (_link if once else os.replace)(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def read(path: Path) -> bytes:
    """The file's content. Raises InputError if it can not be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"can not read {path}: {error.strerror}") from error


def append(path: Path, data: bytes) -> None:
    """Adds to the end of a file. Errors as of `write`; then a part of the data may be there."""
    with writing(path), path.open("ab") as file:
        file.write(data)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around what writes at `path` in a way of its own: gives its errors the path and a remedy, as `write` does."""
    try:
        yield
    except OSError as error:
        raise not_written(path, error) from error


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A name to write a file or folder to, which becomes `path` when the block ends; after an error nothing is left.

    Only one writer at a time: raises InputError if there is such a path already, or another writer is at it. What one that
    was killed has left goes, where the file system knows locks.
    """
    check_new(path)
    partial = path.with_name(f".{path.name}.partial")
    with ExitStack() as stack:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            ours = stack.enter_context(lock(path.with_name(f".{path.name}.lock")))
            if ours:
                shutil.rmtree(partial, ignore_errors=True)
            if ours is False or partial.exists():
                raise InputError(
                    f"{partial} exists: either it is being written, or its writer was killed; then delete it"
                )
            partial.mkdir()
        stack.callback(shutil.rmtree, partial, ignore_errors=True)
        yield partial / path.name
        (partial / path.name).rename(path)


def check_new(path: str | os.PathLike[str]) -> None:
    """Raises InputError if there is such a path: `appearing` would, but only when what is to be written has been made."""
    if os.path.lexists(os.path.expanduser(path)):
        raise InputError(f"{path} exists already; choose another name, or move it away")
    check_writable(Path(path).expanduser().parent)


def check_writable(folder: Path) -> None:
    """Raises InputError if nothing can be written there; a folder that is not there yet is made by who writes.

    For what takes long to make: better now than when it is to be written.
    """
    if folder.parts and folder.parts[0].endswith(":"):  # a `Path` keeps one of a URL's slashes
        raise InputError(
            f"{folder} is a URL, but what is written goes to folders; mount the bucket (gcsfuse) and give its path"
        )
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise InputError(f"{there} is no folder that can be written to; choose another than {folder}")


def not_written(path: Path, error: OSError) -> InputError | WorkError:
    """The error to raise where `path` could not be written."""
    failed = f"can not write {path}: {error.strerror}"
    if error.errno in _CAN_NOT_BE_WRITTEN:
        return InputError(f"{failed}; choose a folder that can be written to")
    remedy = _REMEDIES.get(error.errno or 0, "check the disk")
    return WorkError(f"{failed}; what is finished is intact: {remedy}, then run the same command again")


def _link(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)  # unlike a rename, never replaces what another writer put there
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links, such as exFAT or a mounted bucket
        os.replace(temporary, path)
