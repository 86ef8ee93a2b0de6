"""JSON files that a run leaves behind: written whole or not at all."""

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from tif_jax.errors import InputError
from tif_jax.runtime import files, processes


def write(path: Path, data: Any) -> None:
    """Writes JSON. Of the processes of one run, which all have the same to say, the first one writes.

    Raises InputError if the folder can not be written to, WorkError if the disk is full.
    """
    if processes.is_first():
        files.write(path, (json.dumps(data, indent=2) + "\n").encode())


def versions() -> dict[str, str]:
    """Of the software that results depend on."""
    return {name: importlib.metadata.version(name) for name in ("jax", "flax", "tif_jax")}


def read(path: Path) -> Any:
    """The data, or None if there is no such file. InputError if it is damaged."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); delete it and run the same command again") from None


def claim(directory: Path, record: Mapping[str, Any], *, ignored: Sequence[str] = ()) -> None:
    """Notes in DIRECTORY/config.json what is made there, or checks that it is the same as noted before.

    Raises InputError that names the first difference, before anything is overwritten. Of the processes of one run the
    first one does so. ignored: keys, at any depth, that may differ.
    """
    if not processes.is_first():
        return
    path = directory / "config.json"
    noted = read(path)
    if noted is None:
        write(path, record)
        return
    for key, (there, here) in sorted(differences(noted, record).items()):
        if not {*key.split(".")} & {*ignored}:
            raise InputError(
                f"{directory} was made with {key} {there!r}, not {here!r}; choose another --workdir or delete that folder"
            )


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Where two nested records differ as JSON: dotted key -> (value there, value here); None stands for no value."""
    there, here = (flatten_dict(json.loads(json.dumps(record)), sep=".") for record in (there, here))
    keys = dict.fromkeys((*there, *here))
    return {key: (there.get(key), here.get(key)) for key in keys if there.get(key) != here.get(key)}
