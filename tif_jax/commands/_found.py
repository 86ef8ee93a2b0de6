"""Where what was found from pictures comes from, for the file that has it."""

import sys
import time
from typing import Any

import jax

from tif_jax.commands._pictures import Pictures
from tif_jax.commands._weights import Weights
from tif_jax.runtime import records
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
        "command": ["tif", *sys.argv[1:]],
        "date": time.strftime("%Y-%m-%d"),
    }
