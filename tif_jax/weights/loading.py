"""`tif_jax.load`: a model from a weight file, a checkpoint or a workdir, under any reducer."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jaxtyping import Array, Key

from tif_jax.errors import InputError
from tif_jax.models import MODEL_FIELDS, Model, blueprint, grid_of
from tif_jax.models.budget import AMOUNTS
from tif_jax.models.params import params_of
from tif_jax.runtime import records
from tif_jax.training.checkpoints import load_params
from tif_jax.weights import pretrained
from tif_jax.weights.layout import shortened
from tif_jax.weights.positions import resize_positions

logger = logging.getLogger(__name__)

# Heads that only training has: a source may have them or not, whatever the model that it is loaded into.
TRAINING_HEADS = ("class_head/", "class_norm/", "class_distillation_head/")
HEADS = ("head/", "distillation_head/")  # read_weights leaves them out where num_classes is another


def load(
    source: str | Path, *, reducer: str | None = None, dtype: str = "float32", seed: int = 0, **options: Any
) -> Model:
    """A model with the weights of a timm-layout file (.safetensors, .npz, .pth), an Orbax checkpoint or a workdir.

    A workdir stands for its own checkpoints, else for the fine-tuned model that its report.json calls best.
    reducer: None is the checkpoint's own ('full' for a file). The same weights run under any reducer: parameters under
    `reducer/` that the source lacks are freshly drawn from `seed`, which a warning says; any other difference is an error.
    options: the reducer's (keep_ratio, ...) and fields of the model: image_size resizes position embeddings, num_classes
    of a file other than its own starts a fresh head. Raises InputError for everything that does not fit.
    """
    told_at = logging.WARNING  # who asks for a reducer here may not know that it has something to learn
    return load_with_fields(source, reducer=reducer, dtype=dtype, seed=seed, fresh_told_at=told_at, **options)[0]


def load_with_fields(
    source: str | Path,
    *,
    reducer: str | None = None,
    dtype: str = "float32",
    seed: int = 0,
    fresh_told_at: int = logging.INFO,
    **options: Any,
) -> tuple[Model, dict[str, Any]]:
    """`load`, and the fields that the model was built with: what a checkpoint of it has to say.

    fresh_told_at: the level of the log line that names parameters drawn afresh.
    """
    path = Path(source)
    given = {key: options.pop(key) for key in MODEL_FIELDS & options.keys()}
    given = {key: value for key, value in given.items() if value is not None}
    if _is_checkpoint(path):
        params, stored = load_params(checkpoint_directory(path))
        fields, own = {**stored["model"], **given}, stored["reducer"]
        params, may_be_fresh = _resized(params, stored["model"], fields), ["reducer/", *TRAINING_HEADS]
    else:
        fields, params = pretrained.read_weights(path, **given)
        own, may_be_fresh = {"name": "full"}, ["reducer/", *TRAINING_HEADS, *HEADS]
    fields["dtype"] = dtype
    reducer_name = own["name"] if reducer is None else reducer
    if reducer_name == own["name"]:
        options = _with_own_options(own, options)
    build = blueprint(fields, reducer=reducer_name, **options)
    model = nnx.eval_shape(build, jax.random.key(0))
    wanted, found = (_flat(tree) for tree in (params_of(model), params))
    # Of another reducer's parameters none are wanted; of the same one's, all.
    may_go = [*TRAINING_HEADS] if reducer_name == own["name"] else ["reducer/", *TRAINING_HEADS]
    _check_fit(path, wanted, found, may_be_fresh, may_go)
    if fresh := sorted(set(wanted) - set(found)):
        logger.log(fresh_told_at, "%s: freshly initialised: %s", path, ", ".join(fresh))
        found |= _drawn(build, fresh, seed)
    found = {name: jnp.asarray(found[name]) for name in wanted}
    nnx.update(model, traverse_util.unflatten_dict(found, sep="/"))
    return model, fields


def _with_own_options(own: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a checkpoint's reducer, with those given in their place; an amount given stands for any of its own."""
    other_amount = any(given.get(key) is not None for key in AMOUNTS)
    kept = {key: value for key, value in own.items() if key != "name" and not (other_amount and key in AMOUNTS)}
    return {**kept, **given}


def _check_fit(
    path: Path, wanted: Mapping[str, Any], found: Mapping[str, Any], may_be_fresh: list[str], may_go: list[str]
) -> None:
    """Raises InputError with all parameters that are missing, surplus or of another shape.

    may_be_fresh, may_go: how the names begin of those that may be missing, and of those that may be surplus.
    """
    missing = {name for name in wanted.keys() - found.keys() if not name.startswith(tuple(may_be_fresh))}
    surplus = {name for name in found.keys() - wanted.keys() if not name.startswith(tuple(may_go))}
    wrong = {name for name in found.keys() & wanted.keys() if found[name].shape != wanted[name].shape}
    if problems := sorted(missing | surplus | wrong):
        raise InputError(f"{path} does not fit this model: missing, surplus or of another shape: {shortened(problems)}")


def _drawn(build: Callable[[Key[Array, ""]], Model], names: Sequence[str], seed: int) -> dict[str, Array]:
    """The parameters of these names of the model that `build` draws from the seed."""

    @jax.jit
    def draw(key):
        drawn = _flat(params_of(build(key)))
        return {name: drawn[name] for name in names}

    return draw(jax.random.key(seed))


def checkpoint_directory(path: Path) -> Path:
    """Where in `path` the checkpoints are: a checkpoint's own folder, a folder of checkpoints, a stage, or a workdir."""
    if (path / "params").is_dir():
        return path
    for folder in (path / "checkpoints", path):
        if folder.is_dir() and any(child.name.isdigit() for child in folder.iterdir()):
            return folder
    best = (records.read(path / "report.json") or {}).get("best")
    if best:
        return checkpoint_directory(path / best)
    raise InputError(
        f"no checkpoint in {path}: neither checkpoints/ nor a report.json that names the best run; "
        "run the stage that makes it first"
    )


def _is_checkpoint(path: Path) -> bool:
    """Whether this is, or would be if it existed, a folder of ours and no weight file."""
    return path.is_dir() or not (path.exists() or path.suffix in pretrained.READERS)


def _resized(params: dict[str, Any], old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The parameters for the patch raster of other fields."""
    old_grid, new_grid = grid_of(old), grid_of(new)
    return params if old_grid == new_grid else resize_positions(params, old_grid, new_grid)


def _flat(params: dict[str, Any]) -> dict[str, Any]:
    return traverse_util.flatten_dict(params, sep="/")
