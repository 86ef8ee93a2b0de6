"""`tif_jax.view`: what a model sees in pictures, and what its reducers leave of them.

Legend: Y X height and width.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32
from PIL import Image

from tif_jax import checked
from tif_jax.data.folder import as_id
from tif_jax.data.joint_views import evaluation_pair
from tif_jax.data.pictures import AnyImage, read_image
from tif_jax.data.preprocess import evaluation_view
from tif_jax.data.source import LabelMap, UnreadableImage, evenly_spaced
from tif_jax.errors import InputError
from tif_jax.figures.seen import Seen, see, ways_of
from tif_jax.models import Model
from tif_jax.models.predictions import pictures_of

if TYPE_CHECKING:
    from tif_jax.figures.sheet import Sheet

logger = logging.getLogger(__name__)


def view(
    model: Any,
    images: Iterable[AnyImage] | AnyImage,
    *,
    reducers: Any = None,
    top: int = 3,
    num_images: int = 6,
    estimator: str = "sampled",
    num_samples: int = 16,
    seed: int = 0,
) -> "Sheet":
    """A matplotlib figure that shows, for each picture, the impact of its patches (nats, of the model's own prediction), the
    tokens that reducers leave, block by block, and the likeliest classes with all tokens and with these. Notebooks show it.
    Of a depth or segmentation model there are maps of the pixels instead of classes.

    images: as `predict_images` takes them: paths, folders, bytes, uint8 arrays, PIL images. Of more than num_images as many
      are drawn, evenly spaced. One that can not be read is told in a warning and left out.
    reducers: a list of names, dicts as in dict(name="tome", num_merged=8), or models with a reducer of their own, whose
      filter, if they have one, is drawn as well. Default: the model's own, else evit, tome, random and norm.
    estimator, num_samples, seed: of `token_impact`, with the target 'teacher'. 'exact' takes about five times as long.
    top: how many classes.

    Raises InputError for what does not fit, or where no picture can be read.
    """
    from tif_jax.figures.sheet import sheet

    ways = ways_of(model, reducers)
    oracle: dict[str, Any] = dict(estimator=estimator, num_samples=num_samples, seed=seed)
    return sheet(list(seen_in(model, ways, chosen(pictures_of(images), num_images), top, **oracle)))


def chosen(pictures: list[tuple[str, AnyImage]], num_images: int) -> list[tuple[str, AnyImage]]:
    """At most num_images of them, evenly spaced. A log line says so."""
    checked.value_of(int, num_images, "num_images", checked.Range(least=1))
    if len(pictures) > num_images:
        logger.info("%d of %d pictures are shown, evenly spaced", num_images, len(pictures))
    return [pictures[i] for i in evenly_spaced(num_images, len(pictures))]


def seen_in(
    full: Model,
    ways: Mapping[str, Model],
    pictures: list[tuple[str, AnyImage]],
    top: int,
    truth_of: Callable[[AnyImage], LabelMap | None] = lambda picture: None,
    **oracle: Any,
) -> Iterator[Seen]:
    """What there is to see of every picture that can be read (`seen.see`); InputError where none can, when all were tried.

    truth_of: a picture's label map, as large as it is, if it has one.
    """
    checked.value_of(int, top, "top", checked.Range(least=1))
    error, num_read = "", 0
    for name, picture in pictures:
        try:
            image, truth = _views(full, read_image(picture, as_id(name)), truth_of(picture))
        except UnreadableImage as unreadable:
            error = str(unreadable)
            logger.warning("%s; it is left out", error)
            continue
        num_read += 1
        yield see(full, ways, as_id(name), image, top, truth, **oracle)
    if not num_read:
        raise InputError(f"none of the pictures can be read ({len(pictures)}); the last: {error}")


def _views(
    model: Model, image: Image.Image, label_map: LabelMap | None
) -> tuple[Float32[np.ndarray, "Y X 3"], LabelMap | None]:
    if label_map is None:
        return evaluation_view(image, model.image_size, **vars(model.preprocessing)), None
    return evaluation_pair(image, label_map, model.image_size, model.preprocessing)
