"""config.json and preprocessor_config.json as HF transformers writes them: which model it is, and which images it takes."""

import json
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tif_jax.data.preprocess import INTERPOLATIONS
from tif_jax.errors import InputError

logger = logging.getLogger(__name__)

_PREPARED = ("preprocessor_config.json", "processor_config.json")  # the second holds the first as `image_processor`
# What transformers leaves out of a file, because it is its default, by model_type.
_VIT = dict(hidden_size=768, num_attention_heads=12, image_size=224, hidden_act="gelu", layer_norm_eps=1e-12)
_DEFAULTS: dict[str, dict[str, Any]] = {
    "vit": _VIT,
    "deit": _VIT,
    "dinov2": _VIT | dict(layer_norm_eps=1e-6),
    "dinov2_with_registers": _VIT | dict(layer_norm_eps=1e-6),
    "dinov3_vit": _VIT | dict(hidden_size=384, num_attention_heads=6, layer_norm_eps=1e-5),
    "clip_vision_model": _VIT | dict(hidden_act="quick_gelu", layer_norm_eps=1e-5),
    "siglip_vision_model": _VIT | dict(hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6),
}
_TOWERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}  # models of pictures and texts -> their tower
_GELUS = {"gelu": "exact", "gelu_pytorch_tanh": "tanh", "gelu_new": "tanh", "gelu_fast": "tanh", "quick_gelu": "quick"}
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # PIL's numbers


def is_known(config: Any) -> bool:
    """Whether config.json is that of a model of transformers whose weights can be read."""
    kind = config.get("model_type") if isinstance(config, Mapping) else None
    return isinstance(kind, str) and (kind in _DEFAULTS or kind in _TOWERS)


def fields_of(origin: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the model that config.json says. Raises InputError for another activation than the GELUs."""
    kind = config["model_type"]
    said = config.get("vision_config") or config.get("vision_config_dict") or {} if kind in _TOWERS else config
    if not isinstance(said, Mapping):
        raise InputError(f"{origin}: its vision_config is no dict; mend or remove it")
    said = {**_DEFAULTS[_TOWERS.get(kind, kind)], **{name: value for name, value in said.items() if value is not None}}
    if said["hidden_act"] not in [*_GELUS]:
        raise InputError(f"{origin}: hidden_act {said['hidden_act']!r} is not supported; known: {', '.join(_GELUS)}")
    return {
        "num_heads": said["num_attention_heads"],
        "width": said["hidden_size"],
        "image_size": said["image_size"],
        "gelu": _GELUS[said["hidden_act"]],
        "norm_eps": said["layer_norm_eps"],
        "num_classes": len(config["id2label"]) if _classifies(config) else None,
    }


def class_names_of(config: Mapping[str, Any]) -> list[str] | None:
    """The names of the classes by number; None where there are none but LABEL_0, LABEL_1, ..."""
    names = config.get("id2label") or {}
    if not _classifies(config) or (found := by_number(names)) is None:
        return None
    listed = [str(name) for name in found]
    return None if all(re.fullmatch(r"LABEL_\d+", name) for name in listed) else listed


def by_number(names: Mapping[str, Any]) -> list[Any] | None:
    """The names of the outputs '0', '1', ...; None where the numbers have gaps or are none: a name would move."""
    numbers = [str(output) for output in range(len(names))]
    return [names[number] for number in numbers] if names.keys() == set(numbers) else None


def preprocessing_of(folder: Path) -> tuple[str, dict[str, Any]]:
    """The file in the folder that says how images are prepared, and the parts that it says; ('', {}): there is none."""
    path = next((folder / name for name in _PREPARED if (folder / name).is_file()), None)
    if path is None:
        return "", {}
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        said = said.get("image_processor", said)
        return str(path), _parts(path, said)
    except (OSError, ValueError, RecursionError, AttributeError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} can not be read ({error}); mend or remove it") from None


def _parts(path: Path, said: Mapping[str, Any]) -> dict[str, Any]:
    if said.get("do_rescale", True) is False:
        raise InputError(
            f"{path}: do_rescale false is not supported; pixels are from 0 to 1 here before they are normalised"
        )
    if not math.isclose(said.get("rescale_factor") or 1 / 255, 1 / 255, rel_tol=1e-3):
        raise InputError(f"{path}: rescale_factor {said['rescale_factor']!r} is not supported; known: 1/255")
    parts: dict[str, Any] = {"interpolation": _interpolation(path, said.get("resample"))}
    if said.get("do_normalize", True):
        parts |= {"mean": said.get("image_mean"), "std": said.get("image_std")}
    else:
        parts |= {"mean": [0.0] * 3, "std": [1.0] * 3}
    resized, cut = (_edge(said.get(name)) for name in ("size", "crop_size"))
    if "crop_pct" in said:
        parts["crop_fraction"] = said["crop_pct"]
    elif said.get("do_center_crop") and cut and resized:
        parts["crop_fraction"] = min(1.0, cut / resized)
    elif said.get("do_resize", True) and resized:
        parts["crop_fraction"] = 1.0
        logger.warning("%s has images resized to a square whatever their shape; here their centre is cut out", path)
    return {name: value for name, value in parts.items() if value is not None}


def _interpolation(path: Path, resample: Any) -> str | None:
    name = _RESAMPLE.get(resample)
    if name is None or name in INTERPOLATIONS:
        return name
    logger.warning("%s: resampling by %s is not supported: %s is assumed", path, name, "bicubic")
    return None


def _edge(size: Any) -> int | None:
    """The shorter edge of a size, which is a number, {"shortest_edge": ...} or {"height": ..., "width": ...}."""
    if isinstance(size, Mapping):
        return size.get("shortest_edge") or min(
            (size[name] for name in ("height", "width") if size.get(name)), default=None
        )
    return size


def _classifies(config: Mapping[str, Any]) -> bool:
    """Whether the weights have a head whose classes the file names."""
    made_as = config.get("architectures")
    named = made_as if isinstance(made_as, list) else []
    return any("ForImageClassification" in str(name) for name in named) and isinstance(config.get("id2label"), Mapping)
