"""Models by timm's names."""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Key

from tif_jax import reducers
from tif_jax.errors import InputError
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


class Rngs(nnx.Rngs):
    """nnx.Rngs with one stream and the same keys, counted in Python: nnx's count is half of the time to trace a model."""

    def __init__(self, key: Key[Array, ""]):
        super().__init__(key)
        self.num_drawn = 0

    def params(self) -> Key[Array, ""]:
        self.num_drawn += 1
        return jax.random.fold_in(self.default.key[...], self.num_drawn - 1)


MODEL_FIELDS = frozenset(ViT.__init__.__annotations__) - {"reducer", "rngs", "return"}


def model_fields(name: str) -> dict[str, Any]:
    """Fields of `ViT` for a timm name such as 'deit_small_patch16_224'. Raises InputError for other families."""
    match = _NAME.fullmatch(name)
    if not match or (match["family"] == "deit3" and match["distilled"]):
        raise InputError(
            f"Unknown model {name!r}. Known: {{deit,deit3,vit}}_{{{','.join(SIZES)}}}_patch<P>_<image size>, "
            "deit_<size>_distilled_patch<P>_<image size>"
        )
    fields: dict[str, Any] = dict(SIZES[match["size"]], patch_size=int(match["patch"]), image_size=int(match["image"]))
    if match["family"] == "deit3":
        fields |= dict(layer_scale=1e-6, special_positions=False)
    if match["distilled"]:
        fields |= dict(distillation_token=True)
    return fields


def create_model(name: str | dict[str, Any], *, reducer: str = "full", seed: int = 0, **options: Any) -> ViT:
    """A model with random weights.

    name: timm's name, or a dict of `ViT`'s fields. options: fields of `ViT` (num_classes, image_size, dtype, ...) and
    of the reducer (keep_ratio, ...). Raises InputError for anything unknown.
    """
    build = blueprint(name, reducer=reducer, **options)
    graphdef: Any = None

    @jax.jit  # one program draws all the weights: drawn one by one they would take seconds
    def draw(key):
        nonlocal graphdef
        graphdef, params = nnx.split(build(key), nnx.Param)
        return params

    params = draw(jax.random.key(seed))
    return nnx.merge(graphdef, params)


def blueprint(name: str | dict[str, Any], *, reducer: str = "full", **options: Any) -> Callable[[Key[Array, ""]], ViT]:
    """`create_model` up to the drawing of weights: a function of the random key, for `nnx.eval_shape` or `jax.jit`."""
    fields = model_fields(name) if isinstance(name, str) else dict(name)
    reducer_options = {k: options.pop(k) for k in list(options) if k not in MODEL_FIELDS}
    fields |= options
    if unknown := sorted(set(fields) - MODEL_FIELDS):
        raise InputError(f"Unknown model fields {', '.join(unknown)}. Known: {', '.join(sorted(MODEL_FIELDS))}")
    rows, columns = grid_of(fields)
    width = fields.get("width", inspect.signature(ViT.__init__).parameters["width"].default)

    def build(key: Key[Array, ""]) -> ViT:
        rngs = Rngs(key)
        built = reducers.build(reducer, width=width, num_patches=rows * columns, rngs=rngs, **reducer_options)
        return ViT(**fields, reducer=built, rngs=rngs)

    return build


def grid_of(fields: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of the patch raster of a `ViT` with these fields."""
    defaults = inspect.signature(ViT.__init__).parameters
    patch_size, image_size = (fields.get(key, defaults[key].default) for key in ("patch_size", "image_size"))
    height, columns = (image_size, image_size) if isinstance(image_size, int) else image_size
    return height // patch_size, columns // patch_size
