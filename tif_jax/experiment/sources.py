"""The images of an experiment, checked against the model that sees them."""

from tif_jax import data
from tif_jax.errors import InputError
from tif_jax.experiment.schema import Experiment
from tif_jax.models import Model


def open_for_model(experiment: Experiment, split: str, model: Model) -> data.Source:
    """The split's examples, whose labels are checked against the model's classes."""
    options = experiment.data
    source, num_classes = data.open_source(options, split), model.head.out_features
    if source.num_classes > num_classes:
        raise InputError(
            f"{options.name} has labels up to {source.num_classes - 1}; the model has classes 0..{num_classes - 1}"
        )
    if source.num_classes < num_classes and options.name == "image_folder" and not options.class_index:
        raise InputError(
            f"{options.root} has {source.num_classes} class folders and the model {num_classes} classes: "
            "say in data.class_index which folder is which class"
        )
    return source
