"""From a description of a model, by name or by fields, to the model with random weights."""

import functools
import inspect
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Key

from tif_jax import checked, reducers
from tif_jax.errors import InputError
from tif_jax.models.budget import Amounts, Speed, read_budget, within_budget
from tif_jax.models.levit import PATCH_SIZE, LeViT
from tif_jax.models.model import Model, dtype_name, height_and_width
from tif_jax.models.names import model_fields
from tif_jax.models.speed import Probes, within_speed
from tif_jax.models.vit import ViT

FAMILIES: dict[str, type[ViT] | type[LeViT]] = {"vit": ViT, "levit": LeViT}
_DEFAULTS = {
    name: {
        field: parameter.default
        for field, parameter in inspect.signature(family.__init__).parameters.items()
        if field not in ("self", "reducer", "rngs")
    }
    for name, family in FAMILIES.items()
}
MODEL_FIELDS = frozenset({"family"}).union(*_DEFAULTS.values())
# Of these, how a network is trained and run, and not which it is.
RUNNING_FIELDS = frozenset({"drop_path", "remat", "dtype", "lean_last_block"})
# Of fields; of all others `_COUNT`. What is beyond is a slip, and would end in a lack of memory.
_COUNT = checked.Range(least=1, most=2**20)
_RANGES = {
    "image_size": checked.Range(least=1, most=2**14),
    "width": checked.Range(least=1, most=2**16),
    "depth": checked.Range(least=1, most=1000),
    "depths": checked.Range(least=1, most=1000),
    "num_classes": checked.Range(least=0, most=2**20),
    "num_registers": checked.Range(least=0, most=2**12),
    "drop_path": checked.Range(least=0, below=1),
    "layer_scale": checked.Range(above=0),
    "norm_eps": checked.Range(above=0),
    "rotary_temperature": checked.Range(above=0),
    "decoder_blocks": checked.Range(least=0, most=1000),
    "max_depth": checked.Range(above=0),
}


def field_kinds(family: str) -> dict[str, Any]:
    """The annotation of each field of a family of models, `family` itself left out."""
    return {name: FAMILIES[family].__init__.__annotations__[name] for name in _DEFAULTS[family]}


def check_fields(fields: Any, family: str, where: str = "") -> dict[str, Any]:
    """The fields as their annotations have them: tuples for lists, a dtype's name for a dtype.

    where: what they are called in errors, 'backbone.model'. Raises InputError for what is unknown, of another type or out of
    range.
    """
    if family not in FAMILIES:
        raise InputError(f"family is {family!r}; allowed: {', '.join(map(repr, FAMILIES))}")
    kinds = {"family": str, **field_kinds(family)}
    if unknown := sorted(set(fields) - set(kinds)):
        if where:
            raise checked.unknown_key(f"{where}.{unknown[0]}", [f"{where}.{known}" for known in kinds])
        raise InputError(f"Unknown model fields {', '.join(unknown)}. Known: {', '.join(sorted(_DEFAULTS[family]))}")
    found = {name: dtype_name(value) if name == "dtype" else value for name, value in fields.items()}
    ranges = {name: _RANGES.get(name, _COUNT) for name in found}
    return {
        name: checked.value_of(kinds[name], v, checked.dotted(where, name), ranges[name]) for name, v in found.items()
    }


class Rngs(nnx.Rngs):
    """nnx.Rngs with one stream and the same keys, counted in Python: nnx's count is half of the time to trace a model."""

    def __init__(self, key: Key[Array, ""]):
        super().__init__(key)
        self.num_drawn = 0

    def params(self) -> Key[Array, ""]:
        self.num_drawn += 1
        return jax.random.fold_in(self.default.key[...], self.num_drawn - 1)


def create_model(name: str | dict[str, Any], *, reducer: str = "full", seed: int = 0, **options: Any) -> Model:
    """A model with random weights.

    name: timm's name, or a dict of fields. options: fields of the model (num_classes, image_size, dtype, ...) and
    of the reducer (keep_ratio, ...); budget=GMAC instead of keep_ratio or num_merged keeps as many tokens as that allows, and
    budget="120 images/s" or "1.5x" (times the speed of all tokens) as many as are as fast on this device (`models.speed`).
    Raises InputError for anything unknown, of another type or out of range.
    """
    if "pretrained" in options:
        raise InputError("create_model has random weights and takes no `pretrained`; tif_jax.load(FILE) has a file's")
    if not isinstance(name, str | Mapping):
        raise InputError(f"the model is {name!r:.60}; it is timm's name of one, or a dict of fields")
    if not isinstance(reducer, str):
        raise InputError(f"reducer is {reducer!r:.60}; it is a name, as in reducer='tif', keep_ratio=0.5")
    check_seed(seed)
    build = blueprint(name, reducer=reducer, **options)
    graphdef: Any = None

    @jax.jit  # one program draws all the weights: drawn one by one they would take seconds
    def draw(key):
        nonlocal graphdef
        graphdef, params = nnx.split(build(key))
        return params

    params = draw(jax.random.key(seed))
    return nnx.merge(graphdef, params)


def check_seed(seed: Any) -> int:
    """Raises InputError for what is no seed."""
    return checked.value_of(int, seed, "seed", checked.Range(least=0, below=2**31))


def blueprint(
    name: str | dict[str, Any], *, reducer: str = "full", **options: Any
) -> Callable[[Key[Array, ""]], Model]:
    """`create_model` up to the drawing of weights: a function of the random key, for `nnx.eval_shape` or `jax.jit`."""
    fields = model_fields(name) if isinstance(name, str) else name
    fields = with_defaults({**fields, **{key: options.pop(key) for key in MODEL_FIELDS & options.keys()}})
    if (budget := options.pop("budget", None)) is not None:
        options |= _solved(json.dumps([fields, reducer, options], default=dict), read_budget(budget))
    own = {key: value for key, value in fields.items() if key != "family"}

    def build(key: Key[Array, ""]) -> Model:
        rngs = Rngs(key)
        built = reducers.build(reducer, **_shape(fields), rngs=rngs, **options)
        model = FAMILIES[fields["family"]](**own, reducer=built, rngs=rngs)
        described = checked.to_json({"model": fields, "reducer": {"name": reducer, **options}})
        model.built = json.dumps(
            described, default=lambda value: value.item() if hasattr(value, "item") else str(value)
        )
        return model

    return build


def built_with(model: Model) -> dict[str, Any]:
    """{"model": fields, "reducer": {"name", its options}}: `create_model` makes the same model of them.

    A budget is the amount that it came to. Raises InputError for a model that neither `create_model` nor `load` has made.
    """
    if not model.built:
        raise InputError(
            "the model does not say what it was built with; make it by tif_jax.create_model or tif_jax.load"
        )
    return json.loads(model.built)


@functools.cache  # a run asks for the same solution several times
def _solved(described: str, budget: float | Speed) -> dict[str, float | int]:
    amounts = _amounts(described)
    if not isinstance(budget, Speed):
        return within_budget(budget, amounts)
    return within_speed(budget, described, lambda: _probes(described, budget.batch_size))


@functools.cache  # several budgets share what is counted
def _amounts(described: str) -> Amounts:
    fields, reducer, options = json.loads(described)

    def build(key: Key[Array, ""], **given: Any) -> Model:
        return blueprint(fields, reducer=reducer, **given)(key)

    return Amounts(build, reducers.options(reducer), options)


@functools.cache  # several budgets share what is measured
def _probes(described: str, batch_size: int) -> Probes:
    full = nnx.eval_shape(blueprint(json.loads(described)[0]), jax.random.key(0))
    return Probes(_amounts(described), full, batch_size)


def with_defaults(fields: Mapping[str, Any]) -> dict[str, Any]:
    """All fields of the family. Raises InputError for a family or fields that there are not, or not so."""
    family = fields.get("family", "vit")
    found = check_fields(fields, family)
    if found.get("task") == "depth":
        found["num_classes"] = 0  # whatever the name or the weight file has
    return {"family": family, **_DEFAULTS[family], **found}


def grid_of(fields: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of the patch raster (before the first block) of a model with these fields."""
    fields = with_defaults(fields)
    height, columns = height_and_width(fields["image_size"])
    patch_size = fields.get("patch_size", PATCH_SIZE)  # a LeViT has no choice
    return height // patch_size, columns // patch_size


def _shape(fields: Mapping[str, Any]) -> dict[str, int]:
    """What `reducers.build` has to know of the model."""
    num_patches = math.prod(grid_of(fields))
    if fields["family"] == "levit":
        widths, depths = fields["widths"], fields["depths"]
        return dict(num_patches=num_patches, width=widths[0], depth=sum(depths) + len(depths) - 1)
    return dict(num_patches=num_patches, **{name: fields[name] for name in ("width", "num_heads", "depth")})
