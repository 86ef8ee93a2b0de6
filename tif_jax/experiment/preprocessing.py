"""How the images of an experiment are prepared: as its weights say, and for every network of it alike."""

import dataclasses
import logging
import os

from tif_jax import data
from tif_jax.data.preprocess import PARTS
from tif_jax.errors import InputError
from tif_jax.experiment.schema import Experiment
from tif_jax.models import Model
from tif_jax.weights import hub
from tif_jax.weights.described import Description, complete
from tif_jax.weights.loading import description_of

logger = logging.getLogger(__name__)

_NUMBERS = ("mean", "std")  # with others than its own a network is wrong; another crop is a choice
_REMEDY = "set data.mean and data.std, or put timm's config.json beside the file"


def resolved(experiment: Experiment) -> Experiment:
    """With what `data` leaves open: the splits that its folder has; numbers of the weights, else the defaults, which a
    warning names.

    Names on the hub get the commit that they stand for now. Raises InputError where data.mean or data.std contradict the
    weights; of another crop or interpolation it warns.
    """
    experiment = _pinned(experiment)
    options, weights = experiment.data, os.path.expanduser(experiment.backbone.init_from)
    if os.path.isdir(os.path.expanduser(options.root)):  # else it is told where images are opened
        options = data.with_splits(options)
    how = options.preprocessing
    if weights:
        there = hub.is_name(weights) or os.path.exists(weights)  # also False for what can be no path
        said = description_of(weights) if there else Description(f"backbone.init_from {weights!r}, which is not there,")
        given = {part: getattr(options, part) for part in PARTS}
        for part, value in said.preprocessing.items():
            if given[part] not in (None, value):
                differing = f"data.{part} is {given[part]}, but {said.origin} says {value}"
                if part in _NUMBERS:
                    raise InputError(f"{differing}; leave it out, or set it to none, to have what the weights need")
                logger.warning("%s: the config's is taken", differing)
        how = complete(said, given, _REMEDY)
    return dataclasses.replace(experiment, data=dataclasses.replace(options, **vars(how)))


def _pinned(experiment: Experiment) -> Experiment:
    """With the commit in every name on the hub, so that what is made from it says which weights those were."""
    replaced = dataclasses.replace
    begun, recipe = experiment.backbone, experiment.finetune
    if hub.is_name(begun.init_from):
        experiment = replaced(experiment, backbone=replaced(begun, init_from=hub.pinned(begun.init_from)))
    if hub.is_name(given := recipe.distillation.teacher):
        distillation = replaced(recipe.distillation, teacher=hub.pinned(given))
        experiment = replaced(experiment, finetune=replaced(recipe, distillation=distillation))
    return experiment


def prepare(model: Model, experiment: Experiment, source: data.Source | None = None) -> Model:
    """Has the model carry how the experiment's images are prepared, and names of its classes, if it has none."""
    model.preprocessing = experiment.data.preprocessing
    names = tuple(source.class_names) if source else ()
    if model.class_names is None and len(names) == model.num_classes and all(names):
        model.class_names = names
    return model


def check_prepared(model: Model, experiment: Experiment, what: str) -> None:
    """Raises InputError for a network whose images need another mean or standard deviation than the experiment's."""
    for part in _NUMBERS:
        theirs, ours = (getattr(how, part) for how in (model.preprocessing, experiment.data.preprocessing))
        if theirs != ours:
            raise InputError(
                f"{what} takes images with {part} {theirs}; those of this config have data.{part} {ours}: set it to {theirs}"
            )
