"""JSON files that a run leaves behind: written whole or not at all."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tif_jax.errors import InputError
from tif_jax.runtime import files, processes


def write(path: Path, data: Any) -> None:
    """Writes JSON. Of the processes of one run, which all have the same to say, the first one writes.

    Raises InputError if the folder can not be written to, WorkError if the disk is full.
    """
    if processes.is_first():
        files.write(path, (json.dumps(data, indent=2) + "\n").encode())


def read(path: Path) -> Any:
    """The data, or None if there is no such file. InputError if it is damaged."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); delete it and run the same command again") from None


def claim(
    directory: Path, record: dict[str, Any], *, ignored: Sequence[str] = (), defaults: Mapping[str, Any] | None = None
) -> None:
    """Notes in DIRECTORY/config.json what is made there, or checks that it is the same as noted before.

    Raises InputError that names the first difference, before anything is overwritten. Of the processes of one run the
    first one does so. ignored: keys, at any depth, that may differ. defaults: what keys stood for before there were such.
    """
    if not processes.is_first():
        return
    ours = json.loads(json.dumps(record))
    noted = read(directory / "config.json")
    if noted is None:
        write(directory / "config.json", ours)
        return
    noted = _with_defaults(_without(noted, ignored), _without(defaults or {}, ignored), ours)
    ours = _without(ours, ignored)
    for key in sorted({*noted, *ours}):
        if noted.get(key) != ours.get(key):
            raise InputError(
                f"{directory} was made with {_difference(key, noted.get(key), ours.get(key))}; "
                "choose another --workdir or delete that folder"
            )


def _without(record: Mapping[str, Any], ignored: Sequence[str]) -> dict[str, Any]:
    kept = {key: value for key, value in record.items() if key not in ignored}
    return {key: _without(value, ignored) if isinstance(value, Mapping) else value for key, value in kept.items()}


def _with_defaults(noted: dict[str, Any], defaults: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """What was noted, and the defaults of those of our keys that were not."""
    filled = {key: json.loads(json.dumps(value)) for key, value in defaults.items() if key in ours} | noted
    for key, value in defaults.items():
        if isinstance(value, Mapping) and isinstance(noted.get(key), dict) and isinstance(ours.get(key), Mapping):
            filled[key] = _with_defaults(noted[key], value, ours[key])
    return filled


def _difference(key: str, there: Any, here: Any) -> str:
    if isinstance(there, dict) and isinstance(here, dict):
        inner = next(k for k in sorted({*there, *here}) if there.get(k) != here.get(k))
        return _difference(f"{key}.{inner}", there.get(inner), here.get(inner))
    return f"{key} {there!r}, not {here!r}"
