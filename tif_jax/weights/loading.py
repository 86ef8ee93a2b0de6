"""`tif_jax.load`: a model from a weight file, a checkpoint or a workdir, under any reducer."""

import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

from tif_jax.errors import InputError
from tif_jax.models import MODEL_FIELDS, Model, blueprint, grid_of
from tif_jax.models.budget import AMOUNTS
from tif_jax.models.params import params_of
from tif_jax.runtime import records
from tif_jax.training.checkpoints import load_params
from tif_jax.weights import pretrained
from tif_jax.weights import timm_levit as levit_layout
from tif_jax.weights.timm_vit import resize_position_embedding, shortened

logger = logging.getLogger(__name__)

# Heads that only training has: a source may have them or not, whatever the model that it is loaded into.
TRAINING_HEADS = ("class_head/", "class_norm/", "class_distillation_head/")


def load(
    source: str | Path, *, reducer: str | None = None, dtype: str = "float32", seed: int = 0, **options: Any
) -> Model:
    """A model with the weights of a timm-layout file (.safetensors, .npz, .pth), an Orbax checkpoint or a workdir.

    A workdir stands for its own checkpoints, else for the fine-tuned model that its report.json calls best.
    reducer: None is the checkpoint's own ('full' for a file). The same weights run under any reducer: parameters under
    `reducer/` that the source lacks are freshly drawn from `seed` and named in the log; any other difference is an error.
    options: the reducer's (keep_ratio, ...) and fields of the model: image_size resizes position embeddings, num_classes
    of a file other than its own starts a fresh head. Raises InputError for everything that does not fit.
    """
    return load_with_fields(source, reducer=reducer, dtype=dtype, seed=seed, **options)[0]


def load_with_fields(
    source: str | Path, *, reducer: str | None = None, dtype: str = "float32", seed: int = 0, **options: Any
) -> tuple[Model, dict[str, Any]]:
    """`load`, and the fields that the model was built with: what a checkpoint of it has to say."""
    path = Path(source)
    given = {key: options.pop(key) for key in list(options) if key in MODEL_FIELDS}
    given = {key: value for key, value in given.items() if value is not None}
    same_reducer = False
    if _is_checkpoint(path):
        params, stored = load_params(checkpoint_directory(path))
        fields = {**stored["model"], **given}
        params = _resized(params, stored["model"], fields)
        same_reducer = reducer in (None, stored["reducer"]["name"])
        if same_reducer:
            reducer, own = stored["reducer"]["name"], dict(stored["reducer"])
            if any(options.get(key) is not None for key in AMOUNTS):  # it stands in place of the checkpoint's
                own = {key: value for key, value in own.items() if key not in AMOUNTS}
            options = {**own, **options}
            options.pop("name")
    else:
        fields, params = pretrained.read_weights(path, **given)
    fields["dtype"] = dtype
    build = blueprint(fields, reducer=reducer or "full", **options)
    model = nnx.eval_shape(build, jax.random.key(0))
    wanted, found = (_flat(tree) for tree in (params_of(model), params))
    fresh = sorted(set(wanted) - set(found))
    # Of another reducer's parameters none are wanted; of the same one's, all.
    may_be_fresh = ("reducer/", *TRAINING_HEADS)
    may_go = TRAINING_HEADS if same_reducer else may_be_fresh
    surplus = [name for name in set(found) - set(wanted) if not name.startswith(may_go)]
    wrong = [name for name in set(found) & set(wanted) if found[name].shape != wanted[name].shape]
    lacking = [name for name in fresh if not name.startswith(may_be_fresh) and _is_checkpoint(path)]
    if problems := sorted({*surplus, *wrong, *lacking}):
        raise InputError(f"{path} does not fit this model: missing, surplus or of another shape: {shortened(problems)}")
    if fresh:
        logger.info("%s: freshly initialised: %s", path, ", ".join(fresh))

        @jax.jit
        def draw(key):
            drawn = _flat(params_of(build(key)))
            return {name: drawn[name] for name in fresh}

        found = {**found, **draw(jax.random.key(seed))}
    found = {name: jnp.asarray(found[name]) for name in wanted}
    nnx.update(model, traverse_util.unflatten_dict(found, sep="/"))
    return model, fields


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
    if old_grid == new_grid:
        return params
    if old.get("family") == "levit":
        return levit_layout.resize_positions(params, old_grid, new_grid, int(old.get("class_token", False)))
    embedding = params["position_embedding"]
    num_special = embedding.shape[1] - old_grid[0] * old_grid[1]
    return {**params, "position_embedding": resize_position_embedding(embedding, old_grid, new_grid, num_special)}


def _flat(params: dict[str, Any]) -> dict[str, Any]:
    return traverse_util.flatten_dict(params, sep="/")
