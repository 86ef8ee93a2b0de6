"""StableHLO: the compiler's own language, for any batch size, on CPUs, NVIDIA GPUs and TPUs."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export

from tif_jax.export import artifact
from tif_jax.export.program import images_of_any_number, unchecked_shapes
from tif_jax.models import Model

PLATFORMS = ("cpu", "cuda", "tpu")
FILE = "model.stablehlo"


def to_stablehlo(model: Model, folder: str | Path) -> dict[str, Any]:
    """Makes a folder with the model as `jax.export` writes it, checked, a manifest and a loader; returns the manifest.

    The batch size is free, the weights are inside; `jax.export.deserialize(bytes).call(images)` gives {'logits': ...}.
    Raises InputError if there is such a folder already or it can not be written, WorkError where the file does not compute
    what the model computes.
    """
    artifact.check(model, folder)
    images = images_of_any_number((*model.image_size, 3))
    with unchecked_shapes():
        exported = export.export(jax.jit(artifact.forward(model)), platforms=PLATFORMS)(images)
    return artifact.write(model, folder, "stablehlo", {FILE: bytes(exported.serialize())}, _reloaded, "jax")


def _reloaded(path: Path) -> artifact.Call:
    call = export.deserialize(bytearray(path.read_bytes())).call
    return lambda images: {name: np.asarray(value) for name, value in call(images).items()}
