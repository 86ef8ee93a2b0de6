"""A ladder of models as one folder: each model an export of its own, and a loader that climbs them."""

import hashlib
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tif_jax.adaptive.adaptive import Adaptive
from tif_jax.errors import InputError
from tif_jax.export import artifact
from tif_jax.runtime import files

logger = logging.getLogger(__name__)

_OF_ALL = ("format", "task", "preprocessing", "class_names", "inputs", "dtype", "versions")  # the same in every rung


def write_ladder(
    adaptive: Adaptive, folder: str | Path, form: str, to_form: Callable[..., dict[str, Any]]
) -> dict[str, Any]:
    """Makes a folder with the models that the route uses as DIR/rung_0, ..., the cheapest first, and returns its manifest.

    Each rung is a whole export as `to_form` makes it, checked. In the manifest, `ladder` says of each its folder, GMAC,
    reducer and `least_log_odds`: what its likeliest class has to have, log p / (1 - p), or the next rung is asked; None of
    the last. Raises what `to_form` raises, and InputError for timm, which has no reducers, and for infinite thresholds.
    """
    check_form(form)
    rungs_of, thresholds = adaptive.route
    if not all(map(math.isfinite, thresholds[:-1])):
        raise InputError(f"the route has thresholds {thresholds}; a manifest holds numbers, but for the last rung")
    folder = Path(folder).expanduser()
    with files.appearing(folder) as partial:
        rungs, manifests = [], []
        for number, (rung, threshold) in enumerate(zip(rungs_of, thresholds, strict=True)):
            made = to_form(adaptive.models[rung], partial / f"rung_{number}")
            needed = threshold if number < len(rungs_of) - 1 else None
            told = {"least_log_odds": needed, "gmac": made["cost"]["gmac"], "reducer": made["reducer"]}
            rungs.append({"folder": f"rung_{number}", **told})
            manifests.append(made)
        loader = Path(artifact.__file__).with_name(artifact.LOADER).read_bytes()
        files.write(partial / artifact.LOADER, loader)
        inside = sorted(path for path in partial.rglob("*") if path.is_file())
        manifest = {name: manifests[-1][name] for name in _OF_ALL} | {
            "ladder": rungs,
            "outputs": manifests[-1]["outputs"][:1],  # where patches are differs from rung to rung
            "files": {str(path.relative_to(partial)): hashlib.sha256(path.read_bytes()).hexdigest() for path in inside},
        }
        files.write(partial / artifact.MANIFEST, (json.dumps(manifest, indent=2, allow_nan=False) + "\n").encode())
    logger.info("%s is written: %d models", folder, len(rungs))
    return manifest


def check_form(form: str) -> None:
    """Raises InputError for timm, which has no reducers."""
    if form == "timm":
        raise InputError("timm's models have no place for a reducer: a ladder goes to onnx or stablehlo")
