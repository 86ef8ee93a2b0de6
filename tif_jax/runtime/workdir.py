"""The folder of a run: what it may be called, that one run at a time has it, and what killed ones leave there."""

import json
import os
import platform
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import jax

from tif_jax.errors import InputError
from tif_jax.runtime import log_file, processes, records
from tif_jax.runtime.locks import holder, lock

_LOCK = ".lock"
_LONGEST = 3000  # bytes of 4096: names in a checkpoint are long
_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{32}\.tmp|.+\.orbax-checkpoint-tmp.*")
_SECONDS_OF_ANY_WRITE = 3600


def check_name(path: Path) -> None:
    """Raises InputError if checkpoints can not be kept in a folder of this name."""
    name = str(path.absolute())
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        raise InputError(f"{name!a} is not UTF-8; choose a folder with another name") from None
    if wrong := {*"*?["} & {*name}:  # Orbax looks with glob for what it has written itself, and does not find it
        raise InputError(f"{name} has {' and '.join(sorted(wrong))} in its name; choose a folder without any of * ? [")
    if length > _LONGEST:
        raise InputError(f"{name[:40]}... has {length} bytes; choose a folder with a path below {_LONGEST}")


@contextmanager
def only_run(workdir: Path, flag: str = "--workdir") -> Iterator[None]:
    """While the block runs, no other program trains, measures speed or reports in the folder.

    What killed ones left unfinished there is removed. Raises InputError that says who has the folder. Of the processes of a
    run the first one holds it for all. flag: by which the folder was chosen.
    """
    path = workdir / _LOCK
    who = {"command": log_file.command, "host": socket.gethostname(), "pid": os.getpid()}
    who["since"] = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    with lock(path, json.dumps(who)) if processes.is_first() else nullcontext() as ours:
        if not processes.first_says(ours is not False):
            raise InputError(f"{workdir} is in use by {_holder(path)}: wait for it, stop it, or choose another {flag}")
        if ours:
            remove_abandoned(workdir)
        yield


def begin_log(workdir: Path, part: str = "") -> None:
    """DIR/log.txt; of the further processes of a run, and of an array job's part K/N, DIR/logs/NAME.txt."""
    names = ["score-{:0>5}-of-{:0>5}".format(*part.split("/"))] if part else []
    names += [] if processes.is_first() else [f"process-{jax.process_index()}"]
    path = workdir / "logs" / f"{'-'.join(names)}.txt" if names else workdir / "log.txt"
    versions = ", ".join(f"{name} {version}" for name, version in records.versions().items())
    log_file.begin(path, f"{versions}, Python {platform.python_version()}, on {socket.gethostname()}")


def _holder(path: Path) -> str:
    if (who := holder(path)) is None:  # it has just taken the lock, or just let go of it
        return "another run"
    return f"`{who['command']}`, process {who['pid']} on {who['host']} since {who['since']}"


def remove_abandoned(folder: Path) -> None:
    """Removes what writers that were killed left unfinished in the folder; nobody may be writing there.

    A workdir below it is left alone: it has a lock of its own. Impact shards have locks, too: beside
    them only what no writer can still be at is removed.
    """
    for parent, folders, names in os.walk(folder):
        if _LOCK in names and Path(parent) != folder:
            folders.clear()
            continue
        shared = any(name.startswith(("manifest.json", "part-")) for name in names)
        for name in [name for name in (*folders, *names) if _UNFINISHED.fullmatch(name)]:
            path = Path(parent, name)
            with suppress(OSError):
                if not shared or time.time() - path.lstat().st_mtime > _SECONDS_OF_ANY_WRITE:
                    shutil.rmtree(path) if name in folders else path.unlink()
        folders[:] = [name for name in folders if not _UNFINISHED.fullmatch(name)]
