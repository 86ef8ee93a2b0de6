"""Models by timm's names.

A model is described by a dict of fields: plain data that `create_model` takes and checkpoints carry. Its entry `family`
says whose fields they are, 'vit' or 'levit'; without it they are a `ViT`'s.
"""

import functools
import inspect
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Key

from tif_jax import reducers
from tif_jax.errors import InputError
from tif_jax.models.budget import within_budget
from tif_jax.models.levit import PATCH_SIZE, LeViT
from tif_jax.models.vit import ViT

SIZES = {
    "tiny": dict(width=192, depth=12, num_heads=3),
    "small": dict(width=384, depth=12, num_heads=6),
    "base": dict(width=768, depth=12, num_heads=12),
    "large": dict(width=1024, depth=24, num_heads=16),
}
_NAME = re.compile(
    r"(?P<family>deit3|deit|vit)_(?P<size>tiny|small|base|large)(?P<distilled>_distilled)?_patch(?P<patch>\d+)_(?P<image>\d+)"
)

LEVIT_SIZES: dict[str, dict[str, Any]] = {
    "128s": dict(widths=(128, 256, 384), depths=(2, 3, 4), num_heads=(4, 6, 8), key_dim=16),
    "128": dict(widths=(128, 256, 384), depths=(4, 4, 4), num_heads=(4, 8, 12), key_dim=16),
    "192": dict(widths=(192, 288, 384), depths=(4, 4, 4), num_heads=(3, 5, 6), key_dim=32),
    "256": dict(widths=(256, 384, 512), depths=(4, 4, 4), num_heads=(4, 6, 8), key_dim=32),
    "384": dict(widths=(384, 512, 768), depths=(4, 4, 4), num_heads=(6, 9, 12), key_dim=32, drop_path=0.1),
}
_LEVIT_NAME = re.compile(rf"(?P<evo>evo_)?levit_(?P<size>{'|'.join(LEVIT_SIZES)})")

Model = ViT | LeViT
FAMILIES: dict[str, type[ViT] | type[LeViT]] = {"vit": ViT, "levit": LeViT}
_FIELDS = {
    name: {
        field: kind
        for field, kind in family.__init__.__annotations__.items()
        if field not in ("reducer", "rngs", "return")
    }
    for name, family in FAMILIES.items()
}
MODEL_FIELDS = frozenset({"family"}).union(*_FIELDS.values())


def field_kinds(family: str) -> dict[str, Any]:
    """The annotation of each field of a family of models, `family` itself left out."""
    return dict(_FIELDS[family])


class Rngs(nnx.Rngs):
    """nnx.Rngs with one stream and the same keys, counted in Python: nnx's count is half of the time to trace a model."""

    def __init__(self, key: Key[Array, ""]):
        super().__init__(key)
        self.num_drawn = 0

    def params(self) -> Key[Array, ""]:
        self.num_drawn += 1
        return jax.random.fold_in(self.default.key[...], self.num_drawn - 1)


def model_fields(name: str) -> dict[str, Any]:
    """Fields for a timm name such as 'deit_small_patch16_224' or 'levit_128s'. Raises InputError for other families.

    'evo_levit_128s' is Evo-LeViT's variant of it: a class token, absolute positions; the reducer is a choice of its own.
    """
    if match := _LEVIT_NAME.fullmatch(name):
        evo = dict(positions="absolute", class_token=True) if match["evo"] else {}
        return dict(family="levit", **LEVIT_SIZES[match["size"]], **evo)
    match = _NAME.fullmatch(name)
    if not match or (match["family"] == "deit3" and match["distilled"]):
        raise InputError(
            f"Unknown model {name!r}. Known: {{deit,deit3,vit}}_{{{','.join(SIZES)}}}_patch<P>_<image size>, "
            f"deit_<size>_distilled_patch<P>_<image size>, {{levit,evo_levit}}_{{{','.join(LEVIT_SIZES)}}}"
        )
    fields: dict[str, Any] = dict(SIZES[match["size"]], patch_size=int(match["patch"]), image_size=int(match["image"]))
    if match["family"] == "deit3":
        fields |= dict(layer_scale=1e-6, special_positions=False)
    if match["distilled"]:
        fields |= dict(distillation_token=True)
    return fields


def create_model(name: str | dict[str, Any], *, reducer: str = "full", seed: int = 0, **options: Any) -> Model:
    """A model with random weights.

    name: timm's name, or a dict of fields. options: fields of the model (num_classes, image_size, dtype, ...) and
    of the reducer (keep_ratio, ...); budget=GMAC instead of keep_ratio or num_merged keeps as many tokens as that allows.
    Raises InputError for anything unknown.
    """
    build = blueprint(name, reducer=reducer, **options)
    graphdef: Any = None

    @jax.jit  # one program draws all the weights: drawn one by one they would take seconds
    def draw(key):
        nonlocal graphdef
        graphdef, params = nnx.split(build(key))
        return params

    params = draw(jax.random.key(seed))
    return nnx.merge(graphdef, params)


def blueprint(
    name: str | dict[str, Any], *, reducer: str = "full", **options: Any
) -> Callable[[Key[Array, ""]], Model]:
    """`create_model` up to the drawing of weights: a function of the random key, for `nnx.eval_shape` or `jax.jit`."""
    fields = model_fields(name) if isinstance(name, str) else dict(name)
    reducer_options = {k: options.pop(k) for k in list(options) if k not in MODEL_FIELDS}
    fields |= options
    family = fields.pop("family", "vit")
    if family not in FAMILIES:
        raise InputError(f"family is {family!r}; allowed: {', '.join(map(repr, FAMILIES))}")
    if unknown := sorted(set(fields) - set(_FIELDS[family])):
        raise InputError(f"Unknown model fields {', '.join(unknown)}. Known: {', '.join(sorted(_FIELDS[family]))}")
    rows, columns = grid_of({"family": family, **fields})
    if family == "vit":
        shape = {name: _field(ViT, fields, name) for name in ("width", "num_heads", "depth")}
    else:
        depths = _field(LeViT, fields, "depths")
        shape = dict(width=_field(LeViT, fields, "widths")[0], depth=sum(depths) + len(depths) - 1)
    if (budget := reducer_options.pop("budget", None)) is not None:
        described = json.dumps([{"family": family, **fields}, reducer, reducer_options], default=dict)
        reducer_options |= _solved(described, budget)

    def build(key: Key[Array, ""]) -> Model:
        rngs = Rngs(key)
        built = reducers.build(reducer, num_patches=rows * columns, **shape, rngs=rngs, **reducer_options)
        return FAMILIES[family](**fields, reducer=built, rngs=rngs)

    return build


@functools.cache  # a run asks for the same solution several times
def _solved(described: str, budget: float) -> dict[str, float | int]:
    fields, reducer, options = json.loads(described)

    def build(key: Key[Array, ""], **given: Any) -> Model:
        return blueprint(fields, reducer=reducer, **given)(key)

    return within_budget(budget, build, reducers.options(reducer), options)


def plain_vit(model: Model, what: str) -> ViT:
    """The model, if it is a ViT. Raises InputError for others, which can not do `what`."""
    if not isinstance(model, ViT):
        raise InputError(f"{what} needs a ViT; a {type(model).__name__} has no token for each patch in every block")
    return model


def grid_of(fields: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of the patch raster (before the first block) of a model with these fields."""
    family = FAMILIES[fields.get("family", "vit")]
    patch_size = _field(ViT, fields, "patch_size") if family is ViT else PATCH_SIZE
    image_size = _field(family, fields, "image_size")
    height, columns = (image_size, image_size) if isinstance(image_size, int) else image_size
    return height // patch_size, columns // patch_size


def _field(family: type[Model], fields: Mapping[str, Any], name: str) -> Any:
    """The field's value, or its default."""
    return fields.get(name, inspect.signature(family.__init__).parameters[name].default)
