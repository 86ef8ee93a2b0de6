"""Folders of weights as hubs have them: model.safetensors, whole or in shards, with config.json and our reducer beside it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import traverse_util

from tif_jax.errors import InputError
from tif_jax.runtime.digests import digest
from tif_jax.weights.pretrained import read_tensors

WEIGHTS, SHARDED, TORCH = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
REDUCER = "reducer.safetensors"  # parameters of the reducer by our paths; timm has no place for them


def weight_file(folder: Path) -> Path | None:
    """The file in the folder that stands for its weights: whole, the index of its shards, or PyTorch's."""
    return next((folder / name for name in (WEIGHTS, SHARDED, TORCH) if (folder / name).is_file()), None)


def read_reducer(weights: Path, expected: str) -> Mapping[str, Any]:
    """The reducer's parameters that lie beside a weight file. expected: their digest, as that file says it.

    Raises InputError where they are missing, damaged or those of other weights.
    """
    path = weights.parent / REDUCER
    if not path.is_file():
        raise InputError(f"{weights} was saved with a reducer, whose {REDUCER} is not beside it; copy it there, too")
    found = traverse_util.unflatten_dict(read_tensors(path), sep="/").get("reducer")
    if digest(found) != expected:
        raise InputError(f"{path} is not what was saved with {weights.name}; copy both from the same folder again")
    return found
