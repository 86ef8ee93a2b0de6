"""What a model predicts of pictures: the likeliest classes of each, with names and probabilities, or a map of its pixels.

Legend: B images, Y X height and width, L classes.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Num

from tif_jax import checked
from tif_jax.data.folder import as_id, image_files
from tif_jax.data.pictures import AnyImage, read_image
from tif_jax.data.preprocess import evaluation_view
from tif_jax.data.source import UnreadableImage
from tif_jax.errors import InputError, WorkError
from tif_jax.layers import true_float32
from tif_jax.tasks import CLASSIFICATION, DEPTH

logger = logging.getLogger(__name__)

# A batch is filled up with zeros to the next of these, so that a model is compiled at most this often.
_BATCH_SIZES = (1, 8, 32)
_NO_CLASS = -1  # of a pixel whose outputs are no numbers


class Prediction(NamedTuple):
    """The likeliest classes of one picture, the likeliest first; of one that can not be read there are none."""

    file: str  # the path; 'image 3' for the fourth of the pictures where it is none
    classes: tuple[int, ...]  # outputs of the head
    names: tuple[str, ...]  # the output's number where the model knows no name
    probabilities: tuple[float, ...]  # of each among all outputs of the head (softmax)
    error: str = ""  # why it can not be read


class PredictedMap(NamedTuple):
    """What a depth or segmentation model says of the pixels of one picture; of one that can not be read there is no map."""

    file: str  # as of `Prediction`
    pixels: Num[np.ndarray, "Y X"] | None  # of the view that the model gets: metres (float32) or classes (int32)
    error: str = ""  # why it can not be read


def predict_images(model: Any, files: Iterable[AnyImage] | AnyImage, top: int = 5) -> list[Prediction]:
    """The `top` likeliest classes of every picture, in the order of `files`; fewer if the model has fewer.

    model: what `tif_jax.load` returns; the pictures are prepared as it takes them.
    files: paths, bytes of files, uint8 arrays (Y, X, 3) in RGB or PIL images. A folder stands for the images in it and in
      folders below, sorted. One that can not be read is told in a warning and says why in `error`.
    Raises InputError where no picture can be read, WorkError where the model's outputs are no numbers.
    """
    return list(predictions(model, pictures_of(files), top))


def predict_maps(model: Any, files: Iterable[AnyImage] | AnyImage) -> list[PredictedMap]:
    """What a depth or segmentation model says of every picture, in the order of `files` (as of `predict_images`).

    Raises InputError for a classifier and where no picture can be read, WorkError where the model's outputs are no numbers.
    """
    return list(predicted_maps(model, pictures_of(files)))


def require_head(model: Any, what: str) -> None:
    """Raises InputError for a model that predicts no class of a picture: `what` asks for it."""
    if model.task != CLASSIFICATION.name:
        raise InputError(
            f"{what} needs classes of pictures, and this is a model of {model.task}, which predicts maps of pixels: "
            "predict_maps, or `tif predict --out DIR`, has them"
        )
    if not model.num_classes:
        raise InputError(
            f"{what} needs classes, and this model has no head: its outputs are features; give num_classes for a fresh head"
        )


def pictures_of(files: Iterable[AnyImage] | AnyImage) -> list[tuple[str, AnyImage]]:
    """Names and pictures that `files` stands for (`predict_images`). Raises InputError where there are none."""
    several = not isinstance(files, AnyImage) or (isinstance(files, np.ndarray) and files.ndim == 4)
    if several and not isinstance(files, Iterable):
        raise InputError(f"files are {files!r:.60}; they are paths of images or folders")
    found: list[tuple[str, AnyImage]] = []
    for file in files if several else [files]:  # type: ignore[union-attr, list-item]
        if not isinstance(file, AnyImage):
            raise InputError(f"a file is {file!r:.60}; it is a path, the bytes of a file, a uint8 array or a PIL image")
        if not isinstance(file, str | os.PathLike):
            found.append((f"image {len(found)}", file))
        elif os.path.isdir(file):
            found.extend((path, path) for path in image_files(os.fspath(file)))
        else:
            found.append((os.fspath(file), file))
    if not found:
        raise InputError("there are no pictures to predict; give paths of images or folders")
    return found


def predictions(model: Any, pictures: list[tuple[str, AnyImage]], top: int) -> Iterator[Prediction]:
    """A prediction per picture, a batch at a time. Errors as of `predict_images`, some of them when all are given."""
    require_head(model, "a prediction")
    checked.value_of(int, top, "top", checked.Range(least=1))
    for name, row in _rows(model, pictures, _probabilities):
        if isinstance(row, str):
            yield Prediction(name, (), (), (), row)
        else:
            yield prediction_of(model, name, row, top)


def predicted_maps(model: Any, pictures: list[tuple[str, AnyImage]]) -> Iterator[PredictedMap]:
    """A map per picture, a batch at a time. Errors as of `predict_maps`, some of them when all are given."""
    if model.task == CLASSIFICATION.name:
        raise InputError(
            "a map of pixels needs a depth or segmentation model, and this is a classifier: predict_images"
        )
    for name, row in _rows(model, pictures, _pixels):
        if isinstance(row, str):
            yield PredictedMap(name, None, row)
            continue
        if not np.isfinite(row).all() or (row == _NO_CLASS).any():
            raise WorkError(f"the model's outputs for {as_id(name)} are no numbers (NaN); take other weights")
        yield PredictedMap(name, row)


def _rows(
    model: Any, pictures: list[tuple[str, AnyImage]], compute: Callable[..., Num[Array, "B *row"]]
) -> Iterator[tuple[str, Num[np.ndarray, "*row"] | str]]:
    """Each picture's name, and its row of compute(graphdef, state, images), or why it can not be read."""
    graphdef, state = nnx.split(model)
    last_error = ""
    some_read = False
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(pictures), _BATCH_SIZES[-1]):
            batch = pictures[start : start + _BATCH_SIZES[-1]]
            views = list(pool.map(partial(_view, model), batch))
            readable = [view for view in views if not isinstance(view, str)]
            rows = iter(_of_views(compute, graphdef, state, readable)) if readable else iter(())
            some_read |= bool(readable)
            for (name, _), view in zip(batch, views, strict=True):
                if isinstance(view, str):
                    last_error = view
                    logger.warning("%s; it is left out", view)
                    yield name, view
                else:
                    yield name, next(rows)
    if not some_read:
        raise InputError(f"none of the pictures can be read ({len(pictures)}); the last: {last_error}")


def _view(model: Any, picture: tuple[str, AnyImage]) -> Float32[np.ndarray, "Y X 3"] | str:
    """The picture as the model takes it, or why there is none."""
    name, image = picture
    try:
        return evaluation_view(read_image(image, as_id(name)), model.image_size, **vars(model.preprocessing))
    except UnreadableImage as error:
        return str(error)


def _of_views(
    compute: Callable[..., Num[Array, "B *row"]], graphdef: Any, state: Any, views: list[Float32[np.ndarray, "Y X 3"]]
) -> Num[np.ndarray, "B *row"]:
    size = next(size for size in _BATCH_SIZES if size >= len(views))
    images = np.zeros((size, *views[0].shape), np.float32)
    images[: len(views)] = views
    return np.asarray(compute(graphdef, state, images))[: len(views)]


@partial(jax.jit, static_argnums=0)
def _probabilities(graphdef: Any, state: Any, images: Float[Array, "B Y X 3"]) -> Float32[Array, "B L"]:
    """Of all classes."""
    model = nnx.merge(graphdef, state)
    with true_float32(model.dtype):
        return jax.nn.softmax(model(images)[0].astype(jnp.float32))


@partial(jax.jit, static_argnums=0)
def _pixels(graphdef: Any, state: Any, images: Float[Array, "B Y X 3"]) -> Num[Array, "B Y X"]:
    """Metres, or each pixel's likeliest class, _NO_CLASS where outputs are no numbers."""
    model = nnx.merge(graphdef, state)
    with true_float32(model.dtype):
        found = model(images)[0]
    if model.task == DEPTH.name:
        return found.astype(jnp.float32)
    return jnp.where(jnp.isfinite(found).all(axis=-1), found.argmax(axis=-1), _NO_CLASS).astype(jnp.int32)


def prediction_of(model: Any, name: str, probabilities: Float32[np.ndarray, " L"], top: int) -> Prediction:
    """The likeliest of all classes. Raises WorkError for what are no numbers."""
    if not np.isfinite(probabilities).all():
        raise WorkError(f"the model's outputs for {as_id(name)} are no numbers (NaN); take other weights")
    classes = tuple(np.argsort(-probabilities, kind="stable")[:top].tolist())
    known = model.class_names
    names = tuple((known[output] if known else "") or str(output) for output in classes)
    return Prediction(name, classes, names, tuple(probabilities[list(classes)].tolist()))
