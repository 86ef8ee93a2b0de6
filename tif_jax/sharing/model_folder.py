"""A model as a folder that `load`, timm and plain Flax read.

model.safetensors    the backbone under timm's names; our description is in its metadata
reducer.safetensors  what the reducer owns, by our paths; only where it has parameters
config.json          timm's, and under 'tif_jax' the fields and the reducer
parameters.json      by our path of each parameter: the tensor's name, its axes in our order, our shape
README.md            the model card
"""

import itertools
import json
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy
from flax import traverse_util

from tif_jax.errors import InputError
from tif_jax.models import Model, built_with
from tif_jax.models.params import params_of
from tif_jax.runtime.digests import digest
from tif_jax.sharing.card import model_card
from tif_jax.sharing.facts import Facts
from tif_jax.weights import described, pretrained
from tif_jax.weights.folders import REDUCER, WEIGHTS
from tif_jax.weights.loading import TRAINING_HEADS
from tif_jax.weights.timm_config import config_of

logger = logging.getLogger(__name__)


def contents_of(model: Model, facts: Facts, name: str) -> dict[str, bytes]:
    """The files of the folder by name. name: what the card says to load.

    Raises InputError for a model that timm's layout can not hold.
    """
    built, params = built_with(model), params_of(model)
    fields = built["model"]
    if left_out := [name for name in params if f"{name}/" in TRAINING_HEADS]:
        logger.warning("left out, because only training has it: %s", ", ".join(left_out))
    backbone = {name: value for name, value in params.items() if name not in ("reducer", *left_out)}
    tensors, free = pretrained.to_tensors(backbone, fields)
    reducer = params.get("reducer", {})
    said = described.Description(
        "",
        preprocessing=vars(model.preprocessing),
        class_names=model.class_names,
        reducer=built["reducer"],
        reducer_digest=digest(reducer) if reducer else "",
    )
    config = config_of(fields, model.preprocessing, model.class_names) | {"tif_jax": built}
    found = {WEIGHTS: safetensors.numpy.save(tensors, metadata=described.metadata(said, free))}
    if reducer:
        flat = traverse_util.flatten_dict({"reducer": reducer}, sep="/")
        found[REDUCER] = safetensors.numpy.save({path: np.ascontiguousarray(leaf) for path, leaf in flat.items()})
    found["config.json"] = (json.dumps(config, indent=2) + "\n").encode()
    if where := _where(backbone, tensors, fields):
        found["parameters.json"] = _lines(where)
    found["README.md"] = model_card(model, facts, config, {*found}, name).encode()
    return found


def _where(backbone: dict[str, Any], tensors: Mapping[str, np.ndarray], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Where each parameter is: `tensors[name].transpose(axes).reshape(shape)` is the parameter of the path.

    Empty where some parameters are several tensors.
    """
    flat = traverse_util.flatten_dict(backbone, sep="/")
    if (names := pretrained.names_of(backbone, fields)) is None:
        return {}
    return {path: [names[path], *_axes(tensors[names[path]], np.asarray(leaf))] for path, leaf in flat.items()}


def _axes(tensor: np.ndarray, parameter: np.ndarray) -> tuple[list[int], list[int]]:
    """The order of the tensor's axes that gives the parameter, and the parameter's shape."""
    for axes in itertools.permutations(range(tensor.ndim)):
        if np.array_equal(tensor.transpose(axes).reshape(parameter.shape), parameter):
            return list(axes), list(parameter.shape)
    raise InputError(
        f"a tensor of shape {tensor.shape} is no parameter of shape {parameter.shape} with its axes in order"
    )


def _lines(data: Mapping[str, Any]) -> bytes:
    """JSON with a line for each entry."""
    return (
        "{\n" + ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in data.items()) + "\n}\n"
    ).encode()
