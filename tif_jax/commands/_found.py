"""Where what was found from pictures comes from, for the file that has it."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from tif_jax.commands._pictures import Pictures
from tif_jax.commands._weights import Weights
from tif_jax.errors import InputError
from tif_jax.runtime import log_file, records
from tif_jax.runtime.machine import machine


def found_from(weights: Weights, pictures: Pictures, num_images: int, seconds: float) -> dict[str, Any]:
    """num_images: how many of the pictures could be read."""
    return {
        "weights": weights.source,
        "digest": weights.digest,
        "images": list(pictures.folders),
        "fingerprint": pictures.fingerprint,
        "num_images": num_images,
        "seconds": round(seconds, 1),
        "device": jax.devices()[0].device_kind,
        "machine": machine(),
        "versions": records.versions(),
        "command": log_file.command,
        "date": time.strftime("%Y-%m-%d"),
    }


def check_replaceable(path: Path) -> None:
    """Raises InputError if a file is there that was not found in this way: it would be lost."""
    if path.exists() and _calibration_in(path) is None:
        raise InputError(f"{path} is there already and no such file; choose another --out")


def found_on_the_same(given: Sequence[str], fingerprint: str | None) -> list[str]:
    """Files of schedules, or in folders of them, that were found from the pictures of this fingerprint."""
    paths = [Path(text).expanduser() for text in given]
    inside = [inner for path in paths for inner in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    found = {path: _calibration_in(path) for path in inside if path.suffix == ".json" and path.is_file()}
    return [str(path) for path, how in found.items() if how and how.get("fingerprint") == fingerprint]


def _calibration_in(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    found = content.get("calibration") if isinstance(content, dict) else None
    return found if isinstance(found, dict) else None
