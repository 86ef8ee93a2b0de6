"""Keys that somebody set and nothing reads, given the rest of the config."""

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tif_jax import checked
from tif_jax.data.options import DIVISIBLE, DataOptions
from tif_jax.experiment.reducer_entry import FITTED
from tif_jax.experiment.schema import Backbone, Experiment
from tif_jax.tasks import CLASSIFICATION, DEPTH, SEGMENTATION

logger = logging.getLogger(__name__)

_DEFAULTS = {key.path: key.default for key in checked.keys(Experiment)}
_OF_DIGITS = ("root", "train_split", "test_split", "class_index")  # what generated data have no use for


def warn(found: Mapping[str, str]) -> None:
    """Names the keys, if there are any, in one line: a config that says what is not done misleads its reader."""
    by_reason: dict[str, list[str]] = {}
    for path, reason in found.items():
        by_reason.setdefault(reason, []).append(path)
    told = [f"{', '.join(paths)} ({reason})" for reason, paths in by_reason.items()]
    if told:
        logger.warning("set, but without effect here: %s", "; ".join(told))


def unread(experiment: Experiment, paths: Iterable[str]) -> dict[str, str]:
    """Those of the paths that nothing reads in such an experiment, each with the reason."""
    unused = dict(_unused(experiment))
    found = {path: _reason(path, unused) for path in paths}
    return {path: reason for path, reason in found.items() if reason}


def changed(settings: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """Paths of the settings that differ from the defaults."""
    for name, value in settings.items():
        path = checked.dotted(where, name)
        if path in _DEFAULTS:
            if value != _DEFAULTS[path]:
                yield path
        elif isinstance(value, Mapping):
            yield from changed(value, path)


def _reason(path: str, unused: Mapping[str, str]) -> str:
    return next((why for key, why in unused.items() if path == key or path.startswith(f"{key}.")), "")


def _unused(experiment: Experiment) -> Iterator[tuple[str, str]]:
    """(key or section, why nothing reads it)."""
    backbone, score, labels = experiment.backbone, experiment.score, experiment.filter
    recipe = [
        field.name
        for field in dataclasses.fields(Backbone)
        if field.name not in ("init_from", "head", "model", "num_heads")
    ]
    if backbone.init_from and not backbone.head:
        yield from ((f"backbone.{name}", "the backbone is imported, not trained") for name in recipe)
    else:
        if not backbone.init_from:
            yield "backbone.num_heads", "it is of a weight file"
        if not backbone.num_epochs:
            untrained = [name for name in recipe if name != "num_epochs"]
            yield from ((f"backbone.{name}", "the backbone is not trained") for name in untrained)
    if score.estimator != "sampled":
        for key in ("score.num_samples", "score.keep_ratio", "evaluate.num_samples"):
            yield key, f"the estimator is {score.estimator}"
    if score.estimator != "exact":
        yield "score.mask", f"the estimator is {score.estimator}"
    entries = (experiment.reducer, *experiment.benchmark.reducers)
    if not any(entry.name in (*FITTED, "prior") for entry in entries):
        yield "filter", "no reducer here has a part that is fitted before"
    has_adapter = any(entry.has_adapter for entry in entries)
    if labels.labels == "top":
        yield "filter.rho", "labels are top"
    elif not has_adapter or experiment.adapter.as_used:  # an adapter that is fitted alone follows it, too
        yield "filter.keep_ratio", "labels are not top"
    if not has_adapter:
        yield "adapter", "no reducer here has an adapter"
    if experiment.data.task != "classification":
        for name in ("backbone", "finetune"):
            yield f"{name}.label_smoothing", "labels are of pixels"
    if experiment.data.task != DEPTH.name:
        yield "evaluate.eigen_crop", "the data have no depth"
    yield from _unused_in_finetuning(experiment)
    yield from _unused_of_data(experiment)


def _unused_in_finetuning(experiment: Experiment) -> Iterator[tuple[str, str]]:
    given = experiment.finetune.distillation
    if not given.kind:
        yield "finetune.distillation", "its kind is ''"
    elif given.kind == "hard":
        yield "finetune.distillation.tokens_weight", "distillation is hard"
    for where, recipe in (("backbone", experiment.backbone), ("finetune", experiment.finetune)):
        mixing = recipe.mixing
        if not (mixing.mixup and mixing.cutmix):
            yield f"{where}.mixing.switch", "mixup and CutMix are not both on"
        if not (mixing.mixup or mixing.cutmix):
            yield f"{where}.mixing.probability", "neither mixup nor CutMix is on"
        if recipe.augmentation.rand_augment:
            yield f"{where}.augmentation.color_jitter", "beside rand_augment it is not applied"


def _unused_of_data(experiment: Experiment) -> Iterator[tuple[str, str]]:
    name = experiment.data.name
    if name != "tfds":
        yield "data.tfds_name", f"the data are {name}"
    if name == "digits":
        yield from ((f"data.{key}", "digits are generated") for key in _OF_DIGITS)
    else:
        if not (experiment.data.test_fraction and name in DIVISIBLE):
            yield "data.seed", "only digits are generated, and no test images are kept"
    if name not in DIVISIBLE:
        yield "data.test_fraction", "it is of folders and tables"
    yield from _unused_of_label_maps(experiment.data)


def _unused_of_label_maps(data: DataOptions) -> Iterator[tuple[str, str]]:
    if data.name != "tfds":
        yield "data.label_map", f"the data are {data.name}"
    if data.name != "image_pairs":
        yield "data.label_folder", f"the data are {data.name}"
    if data.task == CLASSIFICATION.name:
        yield "data.label_kind", "there are no label maps"
    if data.task != DEPTH.name:
        yield "data.label_scale", "labels are classes"
    if data.task != SEGMENTATION.name:
        yield "data.num_classes", "there are no label maps with classes"
    if data.task == DEPTH.name:
        yield "data.class_index", "labels are depths"
