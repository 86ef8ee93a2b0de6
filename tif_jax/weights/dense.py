"""Dense models among weights: what one begins with from a classifier's, and how a file holds its decoder.

A file has the backbone in timm's layout, and beside it the decoder's parameters by our own paths, `decoder/...`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from tif_jax import checked
from tif_jax.errors import InputError
from tif_jax.tasks import CLASSIFICATION, SEGMENTATION
from tif_jax.weights.layout import Tensors

DECODER = "decoder/"  # how the names of its parameters begin
FREE = ("task", "decoder", "decoder_width", "decoder_blocks", "max_depth", "fill")  # no tensor of timm's says them
# Of a trained decoder: given otherwise than the source says, its parameters would not fit, or mean something else.
_FACTS = ("decoder", "decoder_width", "decoder_blocks", "max_depth", "num_classes")
# What only a classifier has between the last block and its prediction.
_OF_CLASSIFIERS = ("head", "distillation_head", "class_head", "class_norm", "attention_pool")
NEEDS_VIT = "task={!r} needs a ViT; a LeViT has no features of every patch in the end"


def task_of(*fields: Mapping[str, Any]) -> str:
    """The task that the first of these fields says, classification if none does."""
    return next((str(some["task"]) for some in fields if some.get("task") is not None), CLASSIFICATION.name)


def is_dense(fields: Mapping[str, Any]) -> bool:
    return task_of(fields) != CLASSIFICATION.name


def check_given(origin: Any, said: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raises InputError where a trained decoder is asked for another task, or to be another. said: the source's fields."""
    if not is_dense(said):
        return
    if task_of(given, said) != task_of(said):
        raise InputError(
            f"task={given['task']!r} asks for a head that {origin} does not have: it is a model of {task_of(said)}; leave "
            "task out"
        )
    for name in _FACTS:
        if name in said and name in given and checked.plain(said[name]) != checked.plain(given[name]):
            raise InputError(f"{name}={given[name]!r} contradicts {origin}, which says {said[name]!r}; leave it out")


def begun(
    fields: Mapping[str, Any], params: Mapping[str, Any], task: str, num_classes: int | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields and parameters that a model of a dense task begins with from a classifier's: without what only that has.

    num_classes: of a pixel, None where nobody says it. Raises InputError where it is needed, and for a LeViT.
    """
    if fields.get("family", "vit") != "vit":
        raise InputError(NEEDS_VIT.format(task))
    if task == SEGMENTATION.name and num_classes is None:
        raise InputError(f"task={task!r} needs num_classes, the number of classes that a pixel can be of")
    kept = {name: value for name, value in params.items() if name not in _OF_CLASSIFIERS}
    without = {key: value for key, value in fields.items() if key != "class_head"}
    return {**without, "task": task, "num_classes": num_classes or 0}, kept


def of_backbone(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Fields, or parameters by module, without those that only dense models have."""
    return {name: value for name, value in entries.items() if name not in FREE}


def told_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a file has to say of a dense model, none of another."""
    if not is_dense(fields):
        return {}
    return {name: value for name, value in fields.items() if name in (*FREE, "num_classes")}


def divided(tensors: Tensors, *fields: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors of the backbone, and the parameters of the decoder, nested and none where the file has none.

    Raises InputError for a decoder where no fields say what it is for.
    """
    decoder = {name: tensor for name, tensor in tensors.items() if name.startswith(DECODER)}
    if decoder and not any(map(is_dense, fields)):
        raise InputError(
            "the weights have a decoder, and the metadata that say of which task are lost; write the file again with "
            "`tif convert`"
        )
    rest = {name: tensor for name, tensor in tensors.items() if name not in decoder}
    return rest, traverse_util.unflatten_dict(decoder, sep="/")


def tensors_of(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The decoder among a model's parameters as tensors, by name."""
    flat = traverse_util.flatten_dict({name: of for name, of in params.items() if f"{name}/" == DECODER}, sep="/")
    return {path: np.ascontiguousarray(leaf) for path, leaf in flat.items()}


def module_of(name: str) -> str:
    """The module that a parameter belongs to, at most two levels down: 'reducer/adapter', 'head'; of a decoder, that."""
    if name.startswith(DECODER):
        return DECODER.rstrip("/")
    return "/".join(name.split("/")[:-1][:2])
