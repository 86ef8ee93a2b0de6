"""Views of an image and its label map, made alike: every pixel of a view has the label of what it shows.

The image is resized with a filter (antialiased), the label map takes the number of the nearest pixel: a mean of two depths
or two classes is a surface that is not there.

Legend: Y rows, X columns. Coordinates are (x, y) in pixels from the upper left corner; pixel 0 reaches from 0 to 1.
"""

import math

import numpy as np
from jaxtyping import Float32
from PIL import Image, ImageOps

from tif_jax.data.augment import Augmentation, augment, fill_colour
from tif_jax.data.label_maps import IGNORED, UNMEASURED
from tif_jax.data.preprocess import NONE, Preprocessing, evaluation_view, normalise, resized
from tif_jax.data.source import LabelMap
from tif_jax.errors import InputError

SHARES = (0.85, 1.0)  # of the sides of the largest crop: BTS (Lee et al. 2019) crops 416 x 544 of 480 x 640 pixels

Affine = tuple[float, float, float, float, float, float]  # a, ..., f: (x, y) shows (a x + b y + c, d x + e y + f)
Pair = tuple[Float32[np.ndarray, "Y X 3"], LabelMap]


def check_joint(augmentation: Augmentation) -> None:
    """Raises InputError for augmentations that would part an image from its label map."""
    for name in ("rand_augment", "erase"):
        if value := getattr(augmentation, name):
            raise InputError(
                f"{name} is {value!r:.60}, and it is for images with one label each: their label maps would not follow; "
                "there are rotate and color_jitter"
            )


def evaluation_pair(image: Image.Image, label_map: LabelMap, image_size: tuple[int, int], how: Preprocessing) -> Pair:
    """`evaluation_view` of the image, and what the label map says of it."""
    (width, height), (left, top) = resized(image.size, image_size, how.crop_fraction)
    across, down = image.width / width, image.height / height
    shown = (across, 0.0, left * across, 0.0, down, top * down)
    return evaluation_view(image, image_size, **vars(how)), sampled(label_map, image_size, shown)


def augmented_pair(
    image: Image.Image,
    label_map: LabelMap,
    image_size: tuple[int, int],
    rng: np.random.Generator,
    how: Preprocessing,
    augmentation: Augmentation = NONE,
) -> Pair:
    """A random crop of both, resized to image_size, half of the time mirrored; the image alone with colour jitter.

    The crop has the aspect of image_size and 85 to 100 percent (uniform) of the sides of the largest such crop, at any
    place. Depths stay what they are, though what is shown larger looks nearer, by up to 18 percent: therefore no smaller
    crops.
    augmentation.rotate: first both are turned about their centre by an angle that is uniform in [-rotate, rotate]
    degrees; what comes into view from outside has the mean colour, and no label.
    """
    turn: Affine = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    if augmentation.rotate:
        turn = _turn(image.size, math.radians(augmentation.rotate) * (2 * rng.random() - 1))
        fill = fill_colour(how.mean)
        image = image.transform(
            image.size, Image.Transform.AFFINE, turn, resample=Image.Resampling.BICUBIC, fillcolor=fill
        )
    left, top, width, height = _crop(image.size, image_size, rng)
    rows, columns = image_size
    box = (left, top, min(left + width, image.width), min(top + height, image.height))
    view = image.resize((columns, rows), Image.Resampling[how.interpolation.upper()], box)
    shown: Affine = (width / columns, 0.0, left, 0.0, height / rows, top)
    if rng.random() < 0.5:
        view, shown = ImageOps.mirror(view), (-width / columns, 0.0, left + width, 0.0, height / rows, top)
    pixels = normalise(augment(view, augmentation, rng, how.mean), how.mean, how.std)
    return pixels, sampled(label_map, image_size, _after(shown, turn))


def sampled(label_map: LabelMap, size: tuple[int, int], shown: Affine) -> LabelMap:
    """A map of `size`, whose pixel with its centre at (x, y) has the label of the pixel that `shown` leads to.

    Without a label where that lies outside.
    """
    a, b, c, d, e, f = shown
    x, y = np.arange(size[1])[None] + 0.5, np.arange(size[0])[:, None] + 0.5
    columns, rows = np.floor(a * x + b * y + c).astype(np.int64), np.floor(d * x + e * y + f).astype(np.int64)
    height, width = label_map.shape
    inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    found = label_map[rows.clip(0, height - 1), columns.clip(0, width - 1)]
    nothing = UNMEASURED if label_map.dtype.kind == "f" else IGNORED
    return np.where(inside, found, found.dtype.type(nothing))


def _crop(
    size: tuple[int, int], image_size: tuple[int, int], rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """Left, top, width and height. size: (columns, rows) of the image; image_size: (rows, columns) of the view."""
    unit = min(size[0] / image_size[1], size[1] / image_size[0])
    share = SHARES[0] + (SHARES[1] - SHARES[0]) * rng.random()
    width, height = share * unit * image_size[1], share * unit * image_size[0]
    return (size[0] - width) * rng.random(), (size[1] - height) * rng.random(), width, height


def _turn(size: tuple[int, int], angle: float) -> Affine:
    """A turn of an image of (columns, rows) about its centre, in radians, counterclockwise as one sees it."""
    x, y = size[0] / 2, size[1] / 2
    cos, sin = math.cos(angle), math.sin(angle)
    return cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y


def _after(first: Affine, second: Affine) -> Affine:
    """Leads where `second` leads from where `first` leads."""
    a, b, c, d, e, f = first
    g, h, i, j, k, m = second
    return g * a + h * d, g * b + h * e, g * c + h * f + i, j * a + k * d, j * b + k * e, j * c + k * f + m
