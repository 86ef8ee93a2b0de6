"""`tif_jax.fit`: a pretrained model learns the classes of somebody's own pictures, in memory.

Legend: B images, Y X rows and columns.
"""

import os
from collections.abc import Iterable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tif_jax import checked, data
from tif_jax.data.classes import MAX_CLASSES, in_order
from tif_jax.data.loader import training_batches
from tif_jax.data.options import DataOptions
from tif_jax.data.pictures import AnyImage, read_image
from tif_jax.data.source import Example, Source
from tif_jax.errors import InputError
from tif_jax.models import Model
from tif_jax.models.build import check_seed
from tif_jax.models.fresh_heads import with_fresh_heads
from tif_jax.models.predictions import pictures_of
from tif_jax.runtime.mesh import shard
from tif_jax.tasks import CLASSIFICATION
from tif_jax.training import losses
from tif_jax.training.loop import run
from tif_jax.training.recipe import FreshViews, NetworkRecipe, Sharding
from tif_jax.training.stage import REDUCER_RESTS, Stage, prepare

# As configs/folder.py has it.
RECIPE: dict[str, Any] = dict(
    num_epochs=5.0, min_steps=40, batch_size=32, learning_rate=1e-4, final_learning_rate=1e-6, warmup_epochs=0.5,
    weight_decay=0.05, clip_norm=1.0, label_smoothing=0.1,
)  # fmt: skip
_FITTED = ("Tif", "Tosa", "Prior")  # reducers that REDUCER_RESTS is for


def fit(
    model: Any,
    images: str | os.PathLike | Iterable[AnyImage],
    labels: Sequence[Any] | np.ndarray | None = None,
    *,
    seed: int = 0,
    augment: bool = True,
    **recipe: Any,
) -> Model:
    """A copy of the model with a fresh head for the classes of these pictures, fine-tuned on them under its own reducer.

    images: a folder whose sub-folders are the classes (those of train/, where it has that), or pictures: paths, bytes of
      files, uint8 arrays (Y, X, 3) in RGB, PIL images.
    labels: of pictures, one each: texts, which become `class_names`, or whole numbers from 0. None for a folder.
    seed: of the head, the order of the pictures and what is drawn. augment: whether random crops, half of them mirrored,
      are shown instead of the evaluation view.
    recipe: keys of a config's section `backbone` that train (num_epochs, min_steps, batch_size, learning_rate, ...); what is
      not given is as in configs/folder.py. The filter of `tif` and the selectors of `tosa` rest.
    Pictures that can not be read are named in a warning and left out. Raises InputError for what does not fit, WorkError if
    the loss is not finite.
    """
    _check_model(model)
    made = _read_recipe(recipe, augment)
    source = _source(images, labels)
    options = DataOptions(
        image_size=model.image_size,
        augment="crop_flip" if augment else "none",
        on_error="skip",
        **vars(model.preprocessing),
    )
    fresh = with_fresh_heads(model, source.num_classes, check_seed(seed))
    stage = Stage(
        directory=Path(),  # nothing is written
        settings={},
        seed=seed,
        sharding=Sharding(),
        peak_tflops=0.0,
        recipe=made,
        model=fresh,
        fields={},
        reducer={},
        loss=partial(losses.classification, label_smoothing=made.label_smoothing),
        batches=training_batches(
            source,
            options,
            batch_size=made.batch_size,
            seed=seed,
            augmentation=made.augmentation,
            repeats=made.augmentation.repeats,
        ),
        num_examples=len(source),
        trainable=REDUCER_RESTS if type(model.reducer).__name__ in _FITTED else (),
    )
    _train(stage)
    fresh.class_names = tuple(source.class_names) if all(source.class_names) else None
    return fresh


def _read_recipe(given: dict[str, Any], augment: bool) -> NetworkRecipe:
    made = checked.read(NetworkRecipe, {**RECIPE, **given}, "recipe")
    for name in ("drop_path", "remat"):
        if name in given:
            raise InputError(f"recipe.{name} is a field of the model: tif_jax.load(..., {name}={given[name]!r})")
    if "save_every" in given:
        raise InputError("recipe.save_every is given, but nothing is saved before the end: leave it out")
    if not made.num_epochs:
        raise InputError("recipe.num_epochs is 0; give a number above 0")
    if not augment and made.augmentation != FreshViews():
        raise InputError("recipe.augmentation is for views that are drawn anew, of which augment=False has none")
    return made


def _train(stage: Stage) -> None:
    """Trains the stage's model where it is."""
    prepared, num_steps = prepare(stage), stage.num_steps
    with closing(stage.batches) as batches:
        state = run(
            prepared.step(stage.model),
            prepared.fresh(stage.model),
            (shard(batch, prepared.mesh) for batch in batches),
            until=num_steps,
            log_every=max(1, num_steps // 10),
            save_every=num_steps,
            log=lambda step, metrics: None,
            save=lambda state: None,
            title="fit",
        )
    found = jax.device_get(state.params if state.ema is None else state.ema)
    nnx.update(stage.model, jax.tree.map(jnp.asarray, found))  # NumPy's can not be indexed by what is traced


class _Pictures:
    """Pictures with labels, as a source."""

    def __init__(self, pictures: Sequence[tuple[str, AnyImage]], labels: Sequence[int], class_names: Sequence[str]):
        self.num_classes = len(class_names)
        self.class_names = tuple(class_names)
        self._pictures, self._labels = pictures, labels

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> Example:
        name, picture = self._pictures[index]
        return Example(id=name, image=read_image(picture, name), label=self._labels[index])


def _check_model(model: Any) -> None:
    """Raises InputError for what is no classifier or backbone of one."""
    if not isinstance(model, Model):
        raise InputError(f"model is {model!r:.60}; it is what tif_jax.load or tif_jax.create_model returns")
    if model.task != CLASSIFICATION.name:
        raise InputError(
            f"tif_jax.fit teaches classes of pictures, and this is a model of {model.task}: `tif train` and `tif run` train "
            "it, with data that have label maps"
        )


def _source(images: Any, labels: Any) -> Source:
    if labels is None:
        if not isinstance(images, str | os.PathLike):
            raise InputError(
                "labels are missing; give one for each picture, or a folder whose sub-folders are the classes"
            )
        where = dict(name="image_folder", root=os.fspath(images), train_split="auto", test_split="auto")
        source = data.open_source(where, "train")
    else:
        if isinstance(images, str | os.PathLike):
            raise InputError(
                f"labels are given for the folder {images}, whose sub-folders are the classes; leave them out"
            )
        source = _labelled(pictures_of(images), _array_of(labels))
    if source.num_classes < 2:
        raise InputError("there is one class alone, and nothing to tell apart; give pictures of two at least")
    return source


def _array_of(labels: Any) -> np.ndarray:
    try:
        return np.asarray(labels)
    except ValueError:  # lists of several lengths
        raise InputError(f"labels are {labels!r:.60}; give one for each picture, a text or a whole number") from None


def _labelled(pictures: list[tuple[str, AnyImage]], labels: np.ndarray) -> _Pictures:
    if labels.shape != (len(pictures),):
        raise InputError(f"labels have shape {labels.shape}, and there are {len(pictures)} pictures; give one for each")
    if labels.dtype.kind == "U":
        names = in_order(set(labels.tolist()))
        return _Pictures(pictures, [names.index(label) for label in labels.tolist()], names)
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= MAX_CLASSES:
        raise InputError(f"labels are {checked.shown(labels.tolist(), 60)}; they are texts, or whole numbers from 0")
    return _Pictures(pictures, labels.tolist(), [""] * (int(labels.max()) + 1))
