"""`tif_jax.load`: a model from a weight file, a checkpoint or a workdir, under any reducer."""

import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jaxtyping import Array, Key

from tif_jax import checked, reducers
from tif_jax.data.preprocess import Preprocessing, replaced
from tif_jax.errors import InputError
from tif_jax.models import MODEL_FIELDS, Model, blueprint, check_seed, grid_of, with_defaults
from tif_jax.models.budget import AMOUNTS
from tif_jax.models.model import dtype_name
from tif_jax.models.params import params_of
from tif_jax.training.checkpoints import load_params, newest, read_config
from tif_jax.weights import dense, described, folders, hub, pretrained
from tif_jax.weights.layout import shortened
from tif_jax.weights.positions import resize_positions
from tif_jax.weights.where import checkpoint_directory, is_checkpoint, located

logger = logging.getLogger(__name__)

# Heads that only training has: a source may have them or not, whatever the model that it is loaded into.
TRAINING_HEADS = ("class_head/", "class_norm/", "class_distillation_head/")
NEW_HEAD = "backbone.head=fresh, with backbone.num_epochs, has one drawn and trained"  # what a config can do about it
HEADS = ("head/", "distillation_head/")  # read_weights leaves them out where num_classes is another
# Fields that no shape tells: given otherwise than the source says, they would be wrong in silence.
_FACTS = ("num_heads", "gelu", "activation", "norm_eps", "rotary", "rotary_grid", "rotary_temperature")
_REMEDY = "say tif_jax.load(..., preprocessing=dict(mean=..., std=...)), or put timm's config.json beside the file"


def load(
    source: str | Path,
    *,
    reducer: str | None = None,
    dtype: Any = "float32",
    seed: int = 0,
    preprocessing: Mapping[str, Any] | Preprocessing | None = None,
    **options: Any,
) -> Model:
    """A model with the weights of a timm-layout file (.safetensors, .npz, .pth), an Orbax checkpoint or a workdir.

    hf:OWNER/NAME[@REVISION] names weights on the Hugging Face hub, which are downloaded once (`from_pretrained`).
    A workdir stands for its own checkpoints, else for the fine-tuned model that its report.json calls best; any other folder
    for the model.safetensors in it, or its shards.
    reducer: a name, or a JSON file that `tif calibrate` wrote; None is the one that the weights were saved with, with its
    options ('full' where they do not say). One that is named has the options given here and its defaults; only those of its
    own that say what form the parameters have which it learned stay. The same weights run under any reducer: parameters under
    `reducer/` that the source lacks are freshly drawn from `seed`, which a warning says; any other difference is an error.
    A module that is none of `tif_jax.reducers` is imported only if it is named here.
    preprocessing: mean, std, crop_fraction, interpolation, those that the source does not say, or says wrong. What nobody
    says is ImageNet's, with a warning. The model has it as `model.preprocessing`, and its classes as `model.class_names`.
    options: the reducer's (keep_ratio, ...) and fields of the model: image_size resizes position embeddings, num_classes
    of a file other than its own starts a fresh head. Raises InputError for everything that does not fit.
    """
    if not isinstance(source, str | os.PathLike):
        raise InputError(f"the source is {source!r:.60}; it is the path of a weight file, a checkpoint or a workdir")
    if not isinstance(reducer, str | None):
        raise InputError(f"reducer is {reducer!r:.60}; it is a name, as in reducer='tif', keep_ratio=0.5")
    options |= dict(reducer=reducer, dtype=dtype_name(dtype), seed=check_seed(seed), preprocessing=preprocessing)
    # Who asks for a reducer here may not know that it has something to learn.
    return load_with_fields(source, fresh_told_at=logging.WARNING, **options)[0]


def from_pretrained(name: str | os.PathLike[str], revision: str | None = None, **options: Any) -> Model:
    """`load` of weights on the Hugging Face hub: OWNER/NAME and a branch, tag or commit of it (None: main, which may move).

    Only config.json and the weights are downloaded, into the library's cache, and read from there the next time. The model's
    `origin` is hf:OWNER/NAME@COMMIT. A path is a path, as `load` takes it. options: those of `load`. Raises InputError for
    what is not on the hub or may not be read, and without a connection where the cache does not have it.
    """
    if not isinstance(name, str | os.PathLike):
        raise InputError(f"the name is {name!r:.60}; it is OWNER/NAME on the hub, or a path")
    name = os.fspath(name)
    if revision is None and os.path.exists(os.path.expanduser(name)):
        return load(name, **options)
    return load(f"hf:{name.removeprefix('hf:')}" + (f"@{revision}" if revision else ""), **options)


def load_with_fields(
    source: str | Path,
    *,
    reducer: str | None = None,
    dtype: str = "float32",
    seed: int = 0,
    preprocessing: Any = None,
    named: Collection[str] = (),
    fresh_head: bool | None = None,
    fresh_told_at: int | None = logging.INFO,
    **options: Any,
) -> tuple[Model, dict[str, Any]]:
    """`load`, and the fields that the model was built with: what a checkpoint of it has to say.

    named: further modules of reducers that the caller names. fresh_head: whether the head is drawn anew whatever the source
    has, and without its class names; False: never; None: where num_classes asks for one, as `load` does.
    fresh_told_at: the level of the log line that names parameters drawn afresh; None: none may be, which is an InputError.
    """
    if hub.is_name(source):
        source = hub.pinned(str(source))
    path = located(source)
    if reducers.is_file(reducer):
        described_there = reducers.described_in(str(reducer))
        reducer, options = described_there["name"], _with_own_options(described_there, options)
    given = {key: options.pop(key) for key in MODEL_FIELDS & options.keys()}
    given = {key: value for key, value in given.items() if value is not None}
    named = {*named, *reducers.modules_in({"name": reducer, **options})}
    how = vars(preprocessing) if isinstance(preprocessing, Preprocessing) else preprocessing or {}
    replaced(Preprocessing(), how)  # a mistake in it is told before the weights are read
    fields, params, own, may_be_fresh, said = _read(path, given, reducer, bool(fresh_head))
    if fresh_head:
        heads = (*HEADS, *TRAINING_HEADS, dense.DECODER)
        params = {name: of_module for name, of_module in params.items() if f"{name}/" not in heads}
        may_be_fresh = [*may_be_fresh, *heads]
    fields["dtype"] = dtype
    reducer_name = own["name"] if reducer is None else reducer
    saved = own if reducer_name == own["name"] else {}
    _refuse_modules(path, {*reducers.modules_in({**saved, "name": reducer_name, **options})} - named)
    options = _options_for(reducer, own, options, fields, params.get("reducer") or {})
    build = blueprint(fields, reducer=reducer_name, **options)
    model = nnx.eval_shape(build, jax.random.key(0))
    wanted, found = (_flat(tree) for tree in (params_of(model), params))
    differing = {name for name in wanted if name not in found or found[name].shape != wanted[name].shape}
    if fresh_head is False and any(name.startswith(HEADS) for name in differing):
        raise InputError(f"{path} has no head for {model.num_classes} classes; {NEW_HEAD}")
    # Of another reducer's parameters none are wanted; of the same one's, all.
    may_go = [*TRAINING_HEADS] if reducer_name == own["name"] else ["reducer/", *TRAINING_HEADS]
    _check_fit(path, wanted, found, may_be_fresh, may_go)
    if fresh := sorted(set(wanted) - set(found)):
        lacking = ", ".join(dict.fromkeys(map(dense.module_of, fresh)))
        if fresh_told_at is None:
            raise InputError(f"{path} has no {lacking}, which {reducer_name!r} has to learn: take weights that have it")
        logger.log(fresh_told_at, "%s: freshly initialised: %s", path, lacking)
        found |= _drawn(build, fresh, seed)
    found = {name: jnp.asarray(found[name]) for name in wanted}
    nnx.update(model, traverse_util.unflatten_dict(found, sep="/"))
    model.preprocessing = described.complete(said, how, _REMEDY)
    _name_classes(model, said, fresh, bool(fresh_head))
    model.origin = str(source) if hub.is_name(source) else ""
    return model, fields


def _name_classes(model: Model, said: described.Description, fresh: Sequence[str], fresh_head: bool) -> None:
    """Gives the model the names of its classes. fresh: names of parameters that were drawn."""
    has_own_head = not fresh_head and not any(name.startswith(dense.DECODER) for name in fresh)
    if said.class_names and has_own_head and len(said.class_names) == model.num_classes:
        model.class_names = said.class_names
    elif said.class_names and model.num_classes and not any(name.startswith((*HEADS, dense.DECODER)) for name in fresh):
        logger.warning(
            "%s names %d classes, and the head has %d outputs: the names are left out",
            said.origin, len(said.class_names), model.num_classes,
        )  # fmt: skip


class _Read(NamedTuple):
    """What a source holds. may_be_fresh: how the names begin of parameters that it may lack."""

    fields: dict[str, Any]
    params: dict[str, Any]
    reducer: Mapping[str, Any]
    may_be_fresh: list[str]
    said: described.Description


def _read(path: Path, given: Mapping[str, Any], reducer_name: str | None, fresh_head: bool) -> _Read:
    """given: fields of the model that stand instead of the source's; reducer_name: of the reducer, None for the source's.

    fresh_head: the source's heads will not be used.
    """
    may_be_fresh = ["reducer/", *TRAINING_HEADS]
    if not is_checkpoint(path):
        said = described.of_file(path)
        _check_facts(said.origin, said.fields, given)
        if not fresh_head:
            dense.check_given(said.origin, said.fields, given)
        fields, params = pretrained.read_weights(path, said.fields, **given)
        _check_described(said, fields, given)
        saved_with = said.reducer or {"name": "full"}
        if said.reducer_digest and reducer_name in (None, saved_with["name"]):
            params["reducer"] = folders.read_reducer(path, said.reducer_digest)
        return _Read(fields, params, saved_with, [*may_be_fresh, *_heads_to_draw(said.fields)], said)
    params, stored = load_params(checkpoint_directory(path))
    own, reducer = stored.get("model"), stored.get("reducer")
    if not isinstance(own, dict) or not isinstance(reducer, dict) or not isinstance(reducer.get("name"), str):
        raise InputError(
            f"{path} does not say which model and reducer its weights are of: it is no checkpoint of tif_jax"
        )
    _check_facts(path, with_defaults(own), given)
    if not fresh_head:
        dense.check_given(path, with_defaults(own), given)
    if not dense.is_dense(own) and dense.is_dense(given):
        may_be_fresh = [*may_be_fresh, dense.DECODER]
        own, params = dense.begun(own, params, given["task"], given.get("num_classes"))
    fields = {**own, **given}
    return _Read(fields, _resized(params, own, fields), reducer, may_be_fresh, described.of_checkpoint(path, stored))


def _heads_to_draw(said: Mapping[str, Any]) -> tuple[str, ...]:
    """How the names begin of parameters that may lack in a file with these fields: a classifier's heads, and a decoder."""
    return () if dense.is_dense(said) else (*HEADS, dense.DECODER)


def description_of(source: str | Path) -> described.Description:
    """What a file, checkpoint or workdir says of its weights. A file that does not exist says nothing."""
    path = located(source)
    if not path.is_dir():
        return described.of_file(path)
    return described.of_checkpoint(path, read_config(newest(checkpoint_directory(path))))


def _check_facts(origin: str | Path, said: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raises InputError where what is given contradicts what the source says of the same weights."""
    for name in _FACTS:
        if name in said and name in given and checked.plain(said[name]) != checked.plain(given[name]):
            raise InputError(f"{name}={given[name]!r} contradicts {origin}, which says {said[name]!r}; leave it out")


def _check_described(said: described.Description, fields: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raises InputError where the description of a file is that of other weights."""
    of_same_head = ("num_classes",) if dense.task_of(said.fields) == dense.task_of(fields) else ()
    for name in ("width", "num_heads", *of_same_head):
        if name in said.fields and name in fields and name not in given and said.fields[name] != fields[name]:
            raise InputError(
                f"{said.origin} is not of these weights: it says {name} {said.fields[name]!r}, the tensors {fields[name]!r}; "
                "mend or remove it"
            )


def _refuse_modules(path: Path, names: Collection[str]) -> None:
    if names:
        raise InputError(
            f"{path} names the module {', '.join(sorted(names))}, whose code runs when it is loaded; if you trust it, name "
            f"it yourself: reducer={min(names)!r}"
        )


def _options_for(
    reducer: str | None,
    own: Mapping[str, Any],
    given: Mapping[str, Any],
    fields: Mapping[str, Any],
    learned: Mapping[str, Any],
) -> dict[str, Any]:
    """The options of the reducer that is asked for, None being the source's own, of which all stay that are not given.

    Where the source's own is named, those stay without which what it has `learned` would have another form.
    """
    if reducer is None:
        return _with_own_options(own, given)
    if reducer != own["name"] or not learned or _fits(learned, fields, reducer, given):
        return {**given}
    options = _with_own_options(own, given)
    for key in [key for key in options if key not in given]:
        fewer = {name: value for name, value in options.items() if name != key}
        if _fits(learned, fields, reducer, fewer):
            options = fewer
    return options


def _fits(learned: Mapping[str, Any], fields: Mapping[str, Any], reducer: str, options: Mapping[str, Any]) -> bool:
    """Whether a reducer with these options has a place for all that was learned; it may have more."""
    try:
        model = nnx.eval_shape(blueprint(dict(fields), reducer=reducer, **options), jax.random.key(0))
    except InputError:
        return False
    wanted, found = (_flat({"reducer": tree}) for tree in (params_of(model).get("reducer", {}), {**learned}))
    return all(name in wanted and wanted[name].shape == leaf.shape for name, leaf in found.items())


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


def _resized(params: dict[str, Any], old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The parameters for the patch raster of other fields."""
    old_grid, new_grid = grid_of(old), grid_of(new)
    return params if old_grid == new_grid else resize_positions(params, old_grid, new_grid)


def _flat(params: dict[str, Any]) -> dict[str, Any]:
    return traverse_util.flatten_dict(params, sep="/")
