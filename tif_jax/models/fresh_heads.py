"""New classification heads on a trained model."""

import json

import jax
import jax.numpy as jnp
from flax import nnx

from tif_jax.errors import InputError
from tif_jax.models.build import built_with
from tif_jax.models.levit import Head
from tif_jax.models.model import Model
from tif_jax.tasks import CLASSIFICATION

_HEADS = ("head", "distillation_head", "class_head", "class_distillation_head")


def with_fresh_heads(model: Model, num_classes: int, seed: int) -> Model:
    """A copy of the model whose heads, drawn from the seed, have so many outputs; they have no names yet.

    A model without a head gets one. Raises InputError for a model that predicts maps of pixels.
    """
    if model.task != CLASSIFICATION.name:
        raise InputError(
            f"new heads are for classes of pictures, and this is a model of {model.task}: load its weights anew"
        )
    made, rngs = nnx.clone(model), nnx.Rngs(seed)
    needed = ("head", "distillation_head") if getattr(model, "has_distillation", False) else ("head",)
    for name in _HEADS:
        old = getattr(made, name, None)
        if isinstance(old, Head):
            setattr(made, name, Head(old.linear.in_features, num_classes, dtype=model.dtype, rngs=rngs))
        elif old is not None or name in needed:
            width = old.in_features if old is not None else _num_features(model)
            normal = nnx.initializers.truncated_normal(0.02)
            new = nnx.Linear(width, num_classes, kernel_init=normal, dtype=model.dtype, rngs=rngs)
            setattr(made, name, new)
    made.class_names = None
    if made.built:
        built = built_with(made)
        made.built = json.dumps({**built, "model": {**built["model"], "num_classes": num_classes}})
    return made


def _num_features(model: Model) -> int:
    """Of a model without a head, whose outputs they are."""
    image = jax.ShapeDtypeStruct((1, *model.image_size, 3), jnp.float32)
    return jax.eval_shape(lambda image: model(image)[0], image).shape[-1]
