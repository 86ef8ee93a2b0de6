"""JSON files that a run leaves behind: written whole or not at all, and sealed, so that a changed digit is noticed.

The seal is the entry `sha256`: that of the other entries.
"""

import hashlib
import importlib.metadata
import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tif_jax.errors import InputError
from tif_jax.runtime import files
from tif_jax.runtime.version import __version__

logger = logging.getLogger(__name__)

_SEAL = "sha256"


def sealed(data: Mapping[str, Any]) -> dict[str, Any]:
    """The entries, as strict JSON has them, and their seal."""
    data = strict(data)
    return {**data, _SEAL: digest(data)}


def opened(data: Any) -> dict[str, Any]:
    """The entries without their seal. Raises ValueError, in one line, if that is missing or not theirs."""
    rest = dict(data) if isinstance(data, Mapping) else {}
    if _SEAL not in rest:
        raise ValueError(f"it has no {_SEAL}: it was changed, or an earlier version wrote it")
    if rest.pop(_SEAL) != digest(rest):
        raise ValueError(f"its content does not have the {_SEAL} that was written with it")
    return rest


def write(path: Path, data: Mapping[str, Any]) -> None:
    """Writes sealed JSON. Of the processes of one run, which all have the same to say, the first one writes.

    Raises InputError if the folder can not be written to, WorkError if the disk is full.
    """
    from tif_jax.runtime import processes  # it imports JAX, and who only reads does not need that

    if processes.is_first():
        files.write(path, text(data))


def text(data: Mapping[str, Any]) -> bytes:
    """What `write` writes."""
    return (json.dumps(sealed(data), indent=2, allow_nan=False) + "\n").encode()


def strict(data: Any) -> Any:
    """The data with None for numbers that are not finite: JSON has none, and few programs but Python read theirs."""
    if isinstance(data, Mapping):
        return {name: strict(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [strict(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def versions() -> dict[str, str]:
    """Of the software that results depend on."""
    return {name: importlib.metadata.version(name) for name in ("jax", "flax")} | {"tif_jax": __version__}


def read(path: Path, remedy: str = "delete it and run the same command again") -> Any:
    """The data, or None if there is no such file. InputError, with the remedy, if it is damaged."""
    if not path.exists():
        return None
    try:
        return opened(json.loads(files.read(path)))
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); {remedy}") from None


def read_result(path: Path, made_from: Mapping[str, Any]) -> Any:
    """A result that is cheap to make again: None, with a warning, where it is damaged or was made from something else.

    made_from: entries that it has to have.
    """
    try:
        data = read(path)
    except InputError as error:
        logger.warning("%s: it is made again", str(error).partition(";")[0])
        return None
    if data is None:
        return None
    if stale := differences({key: data.get(key) for key in made_from}, made_from):
        told = "; ".join(
            f"{key} has changed" if _are_digests(there, here) else f"{key} was {there!r}, is {here!r}"
            for key, (there, here) in sorted(stale.items())
        )
        logger.warning("%s was made from something else and is made again: %s", path, told)
        return None
    return data


def claim(directory: Path, record: Mapping[str, Any], *, ignored: Sequence[str] = ()) -> None:
    """Notes in DIRECTORY/config.json what is made there, or checks that it is the same as noted before.

    Raises InputError that names the first difference, before anything is overwritten. Of the processes of one run the
    first one does so. ignored: keys, at any depth, that may differ.
    """
    from tif_jax.runtime import processes

    if not processes.is_first():
        return
    path = directory / "config.json"
    noted = read(path, f"put back a copy, or delete {directory} to make it anew")
    if noted is None:
        write(path, record)
        return
    check_same(directory, noted, record, ignored=ignored)


def check_same(directory: Path, there: Any, here: Mapping[str, Any], *, ignored: Sequence[str] = ()) -> None:
    """Raises InputError that names the first difference between what the folder was made with and what is wanted."""
    for key, (was, wanted) in sorted(differences(there, here).items()):
        if not {*key.split(".")} & {*ignored}:
            made = (
                f"another {key}, which has changed since"
                if _are_digests(was, wanted)
                else f"{key} {was!r}, not {wanted!r}"
            )
            raise InputError(f"{directory} was made with {made}; choose another --workdir or delete that folder")


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Where two nested records differ as JSON: dotted key -> (value there, value here); None stands for no value."""
    there, here = (_flat(json.loads(json.dumps(strict(record)))) for record in (there, here))
    keys = dict.fromkeys((*there, *here))
    return {key: (there.get(key), here.get(key)) for key in keys if there.get(key) != here.get(key)}


def _flat(record: Any, prefix: str = "") -> dict[str, Any]:
    """Values by dotted keys; a dict without entries has none."""
    if not isinstance(record, Mapping):
        return {prefix: record}
    inner = [_flat(value, f"{prefix}.{key}" if prefix else key) for key, value in record.items()]
    return {key: value for part in inner for key, value in part.items()}


def _are_digests(*values: Any) -> bool:
    """Whether a reader has nothing of these values but that they differ."""
    return all(re.fullmatch("[0-9a-f]{64}", str(value)) for value in values)


def digest(data: Any) -> str:
    """sha256, in hexadecimal, of the data as JSON."""
    plain = json.loads(json.dumps(data))  # as it will be read: keys are strings, tuples lists
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
