"""The images of an experiment, checked against the model that sees them."""

import logging
import re
from contextlib import suppress
from functools import cache
from pathlib import Path

from tif_jax import data
from tif_jax.data.options import DIVISIBLE, DataOptions
from tif_jax.data.source import Labelled, UnreadableImage
from tif_jax.errors import InputError
from tif_jax.experiment.folders import division_note
from tif_jax.experiment.preprocessing import check_prepared
from tif_jax.experiment.schema import Experiment
from tif_jax.models import Model
from tif_jax.runtime import once, records
from tif_jax.tasks import CLASSIFICATION, SEGMENTATION
from tif_jax.weights.loading import NEW_HEAD

logger = logging.getLogger(__name__)

_CLASS_OF = {"image_folder": "class folder", "image_table": "label", "tfds": "label", "digits": "class"}


def open_for_model(experiment: Experiment, split: str, model: Model, labelled: bool = True) -> data.Source:
    """The split's examples, which are prepared as the model's were, and whose labels are checked against its classes.

    labelled: every example must have a label. Raises InputError for labels that are missing, beyond the head, or numbered
    otherwise than the head for all that is known; and for label maps or classes where the model learns the other.
    """
    _check_task(experiment.data, model.task)
    if model.task != CLASSIFICATION.name:
        check_prepared(model, experiment, "the network")
        return _open_label_maps(experiment.data, split, model, labelled)
    if not model.num_classes:
        raise InputError(f"an experiment needs classes, and these weights have no head; {NEW_HEAD}")
    check_prepared(model, experiment, "the network")
    options, num_classes = experiment.data, model.num_classes
    source = data.open_source(options, split)
    _check_numbers(options, split, source, num_classes)
    _check_names(options, source, model)
    if experiment.backbone.init_from and not experiment.backbone.head and not model.class_names:
        _warn_of_order(options, source)
    _warn_of_classes(options, split, source)
    return Labelled(_with_labels(options, split, source), num_classes, _name(options, split)) if labelled else source


def check_splits(experiment: Experiment, workdir: Path) -> None:
    """Raises InputError if images that a run is trained or judged on are missing, without labels, or others than before.

    Where training and test images are divided here, DIR/split.json notes how.
    """
    options = experiment.data
    if (task := experiment.backbone.model.get("task")) or not experiment.backbone.init_from:
        _check_task(options, task or CLASSIFICATION.name)
    for split in ("train", "test"):
        if options.label_maps:
            opened = data.open_source(options, split)
            if experiment.backbone.head and options.task == SEGMENTATION.name and not opened.num_classes:
                raise InputError(
                    "backbone.head 'fresh' has an output for each class, and how many the label maps have is not said: set "
                    "data.num_classes"
                )
            with suppress(UnreadableImage):
                opened[0]
            continue
        source = _with_labels(options, split, data.open_source(options, split))
        if experiment.backbone.head and source.num_classes < 2:
            raise InputError(
                f"{options.root} has one class alone, {''.join(source.class_names)!r}, and there is nothing to tell apart; "
                "data.root is the folder that holds a folder for each class"
            )
    if options.makes_split:
        _note_division(options, division_note(workdir))
    elif options.train_split == options.test_split and options.name != "digits":
        logger.warning(
            "test images are the training images, those of %r: results say how well these are remembered; name another split "
            "in data.test_split%s", options.train_split,
            ", or keep some in data.test_fraction" if options.name in DIVISIBLE else "",
        )  # fmt: skip


def _check_task(options: DataOptions, task: str) -> None:
    """Raises InputError where a model of this task can not learn from such data."""
    if options.task == task:
        return
    if task == CLASSIFICATION.name:
        raise InputError(
            f"data.{'label_map' if options.name == 'tfds' else 'name'} asks for label maps of {options.task}, and the model "
            f"classifies images: set backbone.model.task={options.task}, or use data with a class for each image"
        )
    if options.task == CLASSIFICATION.name:
        raise InputError(
            f"the model's task is {task}, and {options.name} as it is set has a class for each image: use "
            "data.name=image_pairs, or tfds with data.label_map (docs/data.md, Label maps)"
        )
    raise InputError(
        f"the model's task is {task}, and data.label_kind is {options.task!r}: set one of them to what the label maps are"
    )


def _open_label_maps(options: DataOptions, split: str, model: Model, labelled: bool) -> data.Source:
    source = data.open_source(options, split)
    if source.num_classes > model.num_classes:
        raise InputError(
            f"{options.name} has label maps with {source.num_classes} classes, and the model has {model.num_classes}: set "
            "backbone.model.num_classes, or say in data.class_index which number is which class"
        )
    return Labelled(source, model.num_classes, _name(options, split)) if labelled else source


def _note_division(options: DataOptions, path: Path) -> None:
    """Writes which images are for what, or compares with what is written. InputError where images came or went."""
    parts = data.division(options)
    made = {"test_fraction": options.test_fraction, "seed": options.seed}
    noted = records.read(path, "delete it; impacts and results notice by themselves if their images are others")
    if noted is None:
        logger.info("%s: %d images for training, %d for the test", path, len(parts["train"]), len(parts["test"]))
        records.write(path, {**made, **parts})
        return
    records.check_same(path.parent, {key: noted[key] for key in made}, made)
    now, then = ({*which["train"], *which["test"]} for which in (parts, noted))
    if now != then:
        told = [
            f"{len(ids)} images {what} (the first: {min(ids)})"
            for ids, what in ((now - then, "more"), (then - now, "fewer"))
            if ids
        ]
        raise InputError(
            f"{options.root} has {' and '.join(told)} than when {path.parent} was begun, and what was learned there is of "
            "those: put them back as they were, or choose another --workdir to begin anew"
        )


def _with_labels(options: DataOptions, split: str, source: data.Source) -> data.Source:
    """The source, unless it is without labels: where the first example has one, all should."""
    with suppress(UnreadableImage):
        if not source.num_classes or source[0]["label"] < 0:
            raise InputError(f"{_name(options, split)} has no labels; name one whose images have them")
    return source


def _name(options: DataOptions, split: str) -> str:
    value = options.test_split if split == "test" else options.train_split
    return f"data.{'test' if split == 'test' else 'train'}_split {value!r}"


def _check_numbers(options: DataOptions, split: str, source: data.Source, num_classes: int) -> None:
    """Whether each class of the data set is known to be one of the head's."""
    if beyond := [item for item in (options.class_index or {}).items() if item[1] >= num_classes]:
        raise InputError(
            f"data.class_index.{beyond[0][0]} is {beyond[0][1]}; the model has classes 0..{num_classes - 1}"
        )
    if source.num_classes > num_classes:
        raise InputError(
            f"{options.name} has labels up to {source.num_classes - 1}; the model has classes 0..{num_classes - 1}"
        )
    if options.class_index or not 0 < source.num_classes < num_classes:
        return
    if options.name == "digits":
        raise InputError(f"digits have 10 classes and the model {num_classes}; set backbone.model.num_classes to 10")
    if options.name == "image_table":
        numbers = {name for name in source.class_names if name} | _numbers_of_the_other_table(options, split)
        # Labels of a table are numbers of the head. Few of them that are scattered were chosen from it; few that begin
        # at 0 without a gap were numbered by themselves, one or the other missing in a split.
        highest = max(map(int, numbers))
        if highest + 1 == num_classes and "0" in numbers:
            return
        if highest + 1 == num_classes or 2 * len(numbers) <= highest + 1:
            taken = f"its {len(numbers)} labels, up to {highest}, are taken for outputs of the head, of {num_classes}"
            once.warn(logger, f"{_name(options, split)}: {taken}; say in data.class_index if they are not")
            return
    raise InputError(
        f"{options.root} has {source.num_classes} {_CLASS_OF[options.name]}s and the model {num_classes} classes: say in "
        f"data.class_index which {_CLASS_OF[options.name]} is which class; or {NEW_HEAD}"
    )


def _check_names(options: DataOptions, source: data.Source, model: Model) -> None:
    """Whether classes that model and data call the same are the same output. A table's numbers are no names."""
    if options.class_index or options.name == "image_table" or not model.class_names:
        return
    for output, name in enumerate(source.class_names):
        if name in model.class_names and model.class_names[output] != name:
            raise InputError(
                f"{_CLASS_OF[options.name]} {name!r} would be class {output}, and the model's class {name!r} is "
                f"{model.class_names.index(name)}: say in data.class_index which {_CLASS_OF[options.name]} is which class"
            )


def _warn_of_order(options: DataOptions, source: data.Source) -> None:
    """Programs differ in whether 10 comes after 9, and a head without names does not tell how its folders were sorted."""
    names = list(source.class_names)
    if options.name == "image_folder" and not options.class_index and sorted(names) != sorted(names, key=_by_numbers):
        how = "as text" if names == sorted(names) else "by their numbers"
        once.warn(
            logger,
            f"class folders of {options.root} are sorted {how} ({', '.join(names[:3])}, ...), and nothing tells how those of "
            f"the weights were: if otherwise, say so in data.class_index",
        )


def _by_numbers(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", name)]


def _numbers_of_the_other_table(options: DataOptions, split: str) -> set[str]:
    """A class may be missing in one of the two."""
    try:
        other = options.train_split if split == "test" else options.test_split
        return {str(int(label)) for label in _classes(options.name, options.root, other) or ()}
    except (InputError, ValueError):
        return set()


def _warn_of_classes(options: DataOptions, split: str, source: data.Source) -> None:
    if source.num_classes and sum(map(bool, source.class_names)) == 1:
        once.warn(
            logger,
            f"{_name(options, split)} has one class alone, {source.class_names[-1]!r}: there is nothing to tell apart",
        )
    try:
        train, test = (_classes(options.name, options.root, x) for x in (options.train_split, options.test_split))
    except (InputError, OSError):  # the other split need not be there
        return
    if not train or not test or train == test:
        return
    for here, there, name, other in ((train, test, "train", "test"), (test, train, "test", "train")):
        if missing := sorted(there - here):
            once.warn(
                logger,
                f"{_name(options, name)} has no image of {len(missing)} of the classes that {_name(options, other)} has: "
                f"{', '.join(missing[:5])}{', ...' * (len(missing) > 5)}",
            )


@cache  # listing folders over a network takes a while
def _classes(kind: str, root: str, split: str) -> frozenset[str] | None:
    return data.classes_of(kind, root, split)
