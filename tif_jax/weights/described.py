"""What weights say of themselves beside their numbers: the images that they take, their classes, fields no shape tells.

Our checkpoints say it in their `config`, our .safetensors files in their metadata, files of timm and of HF transformers in a
config.json beside them (`transformers_config`). Whatever says it, it becomes a `Description`.
"""

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors

from tif_jax import checked
from tif_jax.data.preprocess import INTERPOLATIONS, PARTS, Preprocessing, replaced
from tif_jax.errors import InputError
from tif_jax.models import check_fields, field_kinds, model_fields
from tif_jax.weights import timm_config, transformers_config

logger = logging.getLogger(__name__)

_OURS = "tif_jax"  # the key of our description in a .safetensors file's metadata
_TIMMS = "config.json"
# What we call timm's values. Of global_pool 'avg' stands for a mean with whatever norm the file has.
_POOLS = {timms: ours for ours, timms in reversed(timm_config.POOLS.items())}
_GELUS = {timms: ours for ours, timms in timm_config.GELUS.items()}


@dataclasses.dataclass(frozen=True)
class Description:
    """Plain data. What is not said is not in it.

    origin: the file that says it.
    fields: of the model that the weights are from, by the names of `ViT` and `LeViT`.
    preprocessing: parts of a `Preprocessing`.
    class_names: one per output of the head, or None.
    reducer: the reducer that the weights were saved with, its name and options; {}: none is said.
    reducer_digest: of the reducer's parameters, which lie beside the weights; '': it has none.
    """

    origin: str
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    preprocessing: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    class_names: tuple[str, ...] | None = None
    reducer: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    reducer_digest: str = ""


def of_checkpoint(origin: str | Path, stored: Mapping[str, Any]) -> Description:
    """What a checkpoint's `config` says. Raises InputError where that is nothing that can be."""
    return _ours(str(origin), {"fields": {}, **{key: stored.get(key) for key in ("preprocessing", "class_names")}})


def of_file(path: str | Path) -> Description:
    """What a weight file says, or the config.json of timm or transformers beside it.

    A file that is missing or damaged says nothing. Raises InputError where what is said can not be.
    """
    path = Path(path)
    if said := _metadata(path).get(_OURS):
        try:
            return _ours(str(path), json.loads(said))
        except (ValueError, RecursionError):
            raise InputError(f"{path}: its metadata {_OURS!r} is damaged; write the file again") from None
    beside = path.parent / _TIMMS
    if not (path.is_file() and beside.is_file()):
        return Description(str(path))
    try:
        config = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{beside} can not be read ({error}); mend or remove it") from None
    of_timm = isinstance(config, dict) and ("pretrained_cfg" in config or {"mean", "std"} <= config.keys())
    if not (of_timm or transformers_config.is_known(config)):
        return Description(str(path))
    if path.suffix != ".json" and (
        others := sorted(other.name for other in path.parent.glob(f"*{path.suffix}") if other.name != path.name)
    ):
        logger.warning(
            "%s is taken to describe %s, but it lies beside %s as well; give each weight file a folder of its own",
            beside, path.name, others[0],
        )  # fmt: skip
    return (_timms if of_timm else _transformers)(str(beside), config)


def carried(said: Description) -> dict[str, Any]:
    """For a checkpoint's `config`, as `models.carried` has it, but without what nobody said."""
    names = said.class_names
    return {"preprocessing": checked.to_json(said.preprocessing), "class_names": names and list(names)}


def metadata(said: Description, fields: Mapping[str, Any]) -> dict[str, str]:
    """For a .safetensors file. fields: those of the model that no shape tells."""
    told = {"fields": dict(fields), **carried(said)}
    if said.reducer:
        told |= {"reducer": dict(said.reducer), "reducer_digest": said.reducer_digest}
    return {"format": "pt", _OURS: json.dumps(told)}


def complete(said: Description, given: Mapping[str, Any], remedy: str) -> Preprocessing:
    """What is given, else what is said, else the default. Where nobody says mean and std, a warning names what is assumed."""
    made = replaced(replaced(Preprocessing(), said.preprocessing), given)
    known = {*said.preprocessing, *(part for part, value in given.items() if value is not None)}
    if not {"mean", "std"} <= known:
        assumed = ", ".join(f"{part} {getattr(made, part)}" for part in PARTS if part not in known)
        logger.warning(
            "%s does not say how images are prepared for it: assumed is %s; %s", said.origin, assumed, remedy
        )
    return made


def _metadata(path: Path) -> Mapping[str, str]:
    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return file.metadata() or {}
    except Exception:  # reading the tensors will say what is wrong with it
        return {}


def _ours(origin: str, said: Any) -> Description:
    """What `carried` and `metadata` wrote."""
    said = said if isinstance(said, Mapping) else {}
    fields, how, names = (said.get(key) for key in ("fields", "preprocessing", "class_names"))
    reducer, digest = said.get("reducer") or {}, said.get("reducer_digest") or ""
    sound = isinstance(fields, Mapping) and isinstance(how or {}, Mapping) and isinstance(digest, str)
    if not sound or not (reducer == {} or (isinstance(reducer, Mapping) and isinstance(reducer.get("name"), str))):
        raise InputError(f"{origin}: what it says of its model is damaged; write it again")
    family = "levit" if "activation" in fields else "vit"
    prepared = _checked(origin, how or {})
    return Description(origin, _typed(origin, fields, family), prepared, _names(names), reducer, digest)


def _timms(origin: str, config: Mapping[str, Any]) -> Description:
    """What timm's config.json says: in `pretrained_cfg`, or as older files have it, without one."""
    weights, arguments = config.get("pretrained_cfg", config), config.get("model_args") or {}
    if not isinstance(weights, Mapping) or not isinstance(arguments, Mapping):
        raise InputError(f"{origin}: its pretrained_cfg or model_args is no dict; mend or remove it")
    how = {
        part: weights.get(name) for part, name in zip(PARTS, ("crop_pct", "mean", "std", "interpolation"), strict=True)
    }
    if how["interpolation"] not in (None, *INTERPOLATIONS) or weights.get("crop_mode", "center") not in (
        None,
        "center",
    ):
        logger.warning(
            "%s: interpolation %r with crop_mode %r is not supported: the image is resized by one of %s, its centre cut out",
            origin, how["interpolation"], weights.get("crop_mode"), ", ".join(INTERPOLATIONS),
        )  # fmt: skip
        how["interpolation"] = how["interpolation"] if how["interpolation"] in INTERPOLATIONS else None
    names = [config.get(key) or weights.get(key) for key in ("label_names", "label_descriptions")]
    return Description(
        origin,
        _timms_fields(origin, config, weights, arguments),
        _checked(origin, {part: value for part, value in how.items() if value is not None}),
        _described_names(*names),
    )


def _transformers(origin: str, config: Mapping[str, Any]) -> Description:
    """What the config.json of transformers says, and the file beside it about preprocessing."""
    fields, (says_how, how) = (
        transformers_config.fields_of(origin, config),
        transformers_config.preprocessing_of(Path(origin).parent),
    )
    names = _names(transformers_config.class_names_of(config))
    return Description(origin, _typed(origin, fields, "vit"), _checked(says_how, how), names)


def _timms_fields(
    origin: str, config: Mapping[str, Any], weights: Mapping[str, Any], arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """The fields that timm's arguments, or its name of the model, say."""
    architecture = str(config.get("architecture"))
    try:
        named = model_fields(architecture)
    except InputError:  # of another of timm's models
        named = {}
    shape = weights.get("input_size")  # channels, rows, columns
    fields = {
        "num_heads": arguments.get("num_heads", named.get("num_heads")),
        "width": config.get("num_features") or arguments.get("embed_dim"),
        "num_classes": config.get("num_classes"),  # 0: without a head
        "image_size": arguments.get("img_size") or (shape[1:] if isinstance(shape, list) else shape),
        "pool": _ours_of(
            origin, "global_pool", arguments.get("global_pool", config.get("global_pool")) or None, _POOLS
        ),
        "gelu": _ours_of(origin, "act_layer", arguments.get("act_layer"), _GELUS) or named.get("gelu"),
        "norm_eps": arguments.get("norm_eps", named.get("norm_eps")),
    }
    return _typed(origin, fields, named.get("family", "vit"))


def _ours_of(origin: str, name: str, value: Any, known: Mapping[str, str]) -> str | None:
    """What we call timm's value of one of its arguments."""
    if value is None:
        return None
    if not isinstance(value, str) or value not in known:
        raise InputError(f"{origin}: {name} {value!r} is not supported; known: {', '.join(known)}")
    return known[value]


def _typed(origin: str, fields: Mapping[str, Any], family: str) -> dict[str, Any]:
    """Those that are said and that the family has. Raises InputError for a value of another type or out of range."""
    known = field_kinds(family)
    try:
        return check_fields({key: v for key, v in fields.items() if key in known and v is not None}, family)
    except InputError as error:
        raise InputError(f"{origin}: {error}") from None


def _checked(origin: str, how: Mapping[str, Any]) -> dict[str, Any]:
    try:
        made = replaced(Preprocessing(), how)
    except InputError as error:
        raise InputError(f"{origin}: {error}") from None
    return {part: getattr(made, part) for part in how}


def _described_names(names: Any, descriptions: Any) -> tuple[str, ...] | None:
    """What people call the classes: their descriptions, where there are any."""
    if isinstance(names, Mapping):
        names = transformers_config.by_number(names)
    if isinstance(names, list) and isinstance(descriptions, Mapping):
        return _names([descriptions.get(str(name), name) for name in names])
    return _names(names or descriptions)


def _names(names: Any) -> tuple[str, ...] | None:
    is_list = isinstance(names, list) and names and all(isinstance(name, str | int) for name in names)
    return tuple(map(str, names)) if is_list else None
