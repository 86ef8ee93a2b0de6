"""The label map of a picture that is one of a data set's pairs: what its prediction is held against."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tif_jax.data.label_maps import LabelMaps, read_numbers
from tif_jax.data.pairs import IMAGES
from tif_jax.data.pictures import AnyImage
from tif_jax.data.source import LabelMap
from tif_jax.models import Model
from tif_jax.training.checkpoints import newest, read_config
from tif_jax.weights.where import checkpoint_directory


def truths_as_trained(model: Model, folder: Path) -> Callable[[AnyImage], LabelMap | None]:
    """A function from a picture's path to its label map: SPLIT/LABELS/NAME.png of SPLIT/image/NAME, if that is there.

    folder: what a stage left. What LABELS is called, and what its numbers are, is as that stage's data had it.
    """
    data = (read_config(newest(checkpoint_directory(folder))).get("config") or {}).get("data") or {}
    if data.get("name") != "image_pairs" or data.get("label_kind") != model.task:
        return lambda picture: None
    maps = LabelMaps(model.task, data.get("label_scale"), data.get("class_index"), model.num_classes)
    return lambda picture: _beside(picture, str(data.get("label_folder")), maps)


def _beside(picture: Any, label_folder: str, maps: LabelMaps) -> LabelMap | None:
    if not isinstance(picture, str | os.PathLike):
        return None
    parts = Path(picture).absolute().parts
    at = next((i for i in range(len(parts) - 2, -1, -1) if parts[i] == IMAGES), None)
    if at is None:
        return None
    path = Path(*parts[:at], label_folder, *parts[at + 1 :]).with_suffix(".png")
    return maps.read(read_numbers(path, str(path), maps.kind), str(path)) if path.is_file() else None
