"""What a config says that does not fit together: found before anything runs, not after hours."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import psutil
from flax import nnx

from tif_jax import checked
from tif_jax.errors import InputError
from tif_jax.experiment.reducer_entry import ReducerEntry, check_options, default_of, option_kinds, phases_of
from tif_jax.experiment.schema import Experiment
from tif_jax.models import blueprint
from tif_jax.models.build import grid_of, with_defaults
from tif_jax.models.cost import cost
from tif_jax.models.params import params_of
from tif_jax.reducers.tosa import Tosa
from tif_jax.training import optim

_LABELLED = ("tif", "prior")  # reducers that learn from labels of tokens


def check(experiment: Experiment) -> None:
    """Raises InputError for reducers that can not be built, fitted or told apart, whatever the model."""
    entries = experiment.benchmark.reducers
    if experiment.seed + experiment.seeds > 2**31:
        raise InputError(f"seed is {experiment.seed}; with seeds {experiment.seeds} it goes beyond 2147483647")
    labels = [entry.label for entry in entries]
    if not labels or len(labels) > len(set(labels)):
        raise InputError(f"benchmark.reducers is {', '.join(labels) or 'empty'}; name at least one, each once")
    for where, entry in _entries(experiment):
        check_options(entry, where)
        _check_then(entry)
    if experiment.data.task != "classification" and experiment.finetune.distillation.kind:
        raise InputError(
            f"finetune.distillation is of a teacher's classes, and the task is {experiment.data.task}: set its kind to ''"
        )
    _check_memory(experiment)
    _check_phases(experiment)
    _check_shared_parts(experiment)
    if any(entry.name in _LABELLED for _, entry in _entries(experiment)) and label_ratio(experiment) == 1:
        raise InputError(
            "filter.keep_ratio is 1, or what tif keeps is: with all tokens worth keeping there is nothing to learn"
        )


def _check_memory(experiment: Experiment) -> None:
    """Raises InputError for a ViT whose parameters, or attention within one image, exceed the memory of this machine."""
    fields, memory = experiment.backbone.model, psutil.virtual_memory().total
    if experiment.backbone.init_from or not fields or fields.get("family", "vit") != "vit":
        return
    fields = with_defaults(fields)
    num_patches = math.prod(grid_of(fields))
    needs = {
        "its parameters": 4 * fields["depth"] * 12 * fields["width"] ** 2,
        "the attention within an image": 4 * fields["num_heads"] * num_patches**2,
    }
    for what, size in needs.items():
        if size > memory:
            raise InputError(
                f"backbone.model needs {size / 1e9:.3g} GB for {what} alone; this machine has {memory / 1e9:.3g} GB"
            )


def label_ratio(experiment: Experiment) -> float | None:
    """The fraction of an image's tokens that are labelled worth keeping: filter.keep_ratio, or what tif keeps.

    None if nothing here learns from such labels. Raises InputError if it is not said.
    """
    if experiment.filter.keep_ratio is not None:
        return experiment.filter.keep_ratio
    if not any(entry.name in _LABELLED for _, entry in _entries(experiment)):
        return None
    for name in _LABELLED:
        for _, entry in _entries(experiment):
            if entry.name == name and entry.budget is None:
                return entry.options.get("keep_ratio", default_of(name, "keep_ratio"))
    raise InputError("filter.keep_ratio is not given, and the reducer's budget does not tell it: give one, as in 0.5")


def check_on_backbone(experiment: Experiment, fields: Mapping[str, Any]) -> None:
    """Raises InputError if the reducer, a phase of it or a table of finetune does not fit a backbone of these fields."""
    recipe, fields = experiment.finetune, {**fields, **experiment.finetune.model}
    shapes = []
    for entry in (experiment.reducer, *(entry for _, entry in phases_of(experiment.reducer, recipe.phases))):
        model = nnx.eval_shape(blueprint(fields, reducer=entry.name, **entry.arguments), jax.random.key(0))
        _check_selectors(entry, model.reducer)
        cost(model)  # calls it
        for table in (recipe.rate_factors, recipe.decay_factors, [(pattern, False) for pattern in recipe.freeze]):
            optim.match(tuple(row[:2] for row in table), params_of(model), None)
        shapes.append(jax.tree.map(lambda leaf: leaf.shape, params_of(model)))
    if any(shape != shapes[0] for shape in shapes):
        raise InputError(
            f"finetune.phases change which parameters {experiment.reducer.name!r} has; they can not be trained through that"
        )


def _check_selectors(entry: ReducerEntry, reducer: Any) -> None:
    """Raises InputError where a number for each block alone says which blocks select: selectors are fitted without it."""
    if entry.is_fitted_first and isinstance(reducer, Tosa) and reducer.num_dense is not None:
        raise InputError(
            f"reducer.num_kept is {entry.options['num_kept']}, a number for each block; with learned selectors say the "
            f"blocks: layers={reducer.layers}, num_kept={reducer.num_kept}"
        )


def _entries(experiment: Experiment) -> Iterator[tuple[str, ReducerEntry]]:
    yield "reducer", experiment.reducer
    for i, entry in enumerate(experiment.benchmark.reducers):
        yield f"benchmark.reducers[{i}]", entry


def _check_then(entry: ReducerEntry) -> None:
    then = entry.options.get("then")
    if isinstance(then, Mapping):
        second = ReducerEntry(then["name"], {key: value for key, value in then.items() if key != "name"})
        if second.name == "prior" or second.is_fitted_first:
            raise InputError(
                f"reducer {second.name!r} needs a stage of its own and can not come `then` in a training run"
            )


def _check_phases(experiment: Experiment) -> None:
    """Every key of a phase is an option of one of the reducers at least, and every phase can be built."""
    known: dict[str, Any] = {"until": float, "budget": float}
    for _, entry in _entries(experiment):
        known |= option_kinds(entry.name)
    for i, phase in enumerate(experiment.finetune.phases):
        where = f"finetune.phases[{i}]"
        for name in phase:
            if name not in known:
                raise checked.unknown_key(f"{where}.{name}", [f"{where}.{other}" for other in known])
    for _, entry in _entries(experiment):
        for i, (_, changed) in enumerate(phases_of(entry, experiment.finetune.phases)):
            check_options(changed, f"finetune.phases[{i}]")


def _check_shared_parts(experiment: Experiment) -> None:
    """A run fits one token filter and one adapter: entries of tif can not ask for different ones."""
    entries = [(where, entry) for where, entry in _entries(experiment) if entry.name == "tif"]
    adapters = {entry.options["adapter"] for _, entry in entries if entry.has_adapter}
    if len(adapters) > 1:
        raise InputError(
            f"reducers of this run have adapters of the widths {', '.join(map(str, sorted(adapters)))}; "
            "one adapter is fitted for all of them: give each width a run of its own"
        )
    uses = [where for where, entry in entries if entry.has_adapter and entry != experiment.reducer]
    if experiment.adapter.as_used and uses:
        raise InputError(
            f"adapter.as_used fits the adapter for what `reducer` says, and {uses[0]} is another reducer with an adapter: "
            "give it a run of its own"
        )
