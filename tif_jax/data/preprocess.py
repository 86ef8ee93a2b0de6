"""From image files to the numbers a model sees.

Legend: B images, Y rows, X columns. Sizes are (Y, X).
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, UInt8
from PIL import Image, ImageOps

from tif_jax import checked
from tif_jax.checked import key
from tif_jax.data.augment import Augmentation, augment, erase
from tif_jax.data.pictures import AnyImage, read_image
from tif_jax.data.source import UnreadableImage
from tif_jax.errors import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")  # as Pillow has them

NONE = Augmentation()

# Sizes of a view. Of a picture that would become larger still, having sides like 50 to 1, only what the view shows is
# resized. Pillow may then resize columns before rows and round in between, so that all others are resized whole, as ever.
_MAX_RESIZED = 64
FRACTIONS: dict[str, Any] = dict(most=1, advice="channels are from 0 to 1 here: divide by 255 what is for 0 to 255")


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How pixels become what a model takes, whatever its image size: plain data that the model carries.

    Raises InputError for a value of another type or out of range.
    """

    crop_fraction: float = key(0.875, "share of the resized image that the view shows", above=0, most=1)
    mean: tuple[float, float, float] = key(IMAGENET_MEAN, "subtracted from each channel", least=0, **FRACTIONS)
    std: tuple[float, float, float] = key(
        IMAGENET_STD, "each channel is divided by it after that", above=0, **FRACTIONS
    )
    interpolation: str = key("bicubic", "how the image is resized", choices=INTERPOLATIONS)

    def __post_init__(self):
        checked.check(self)


PARTS = tuple(field.name for field in dataclasses.fields(Preprocessing))


def preprocess(
    images: Iterable[AnyImage],
    model: Any = None,
    *,
    image_size: int | tuple[int, int] | None = None,
    crop_fraction: float | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    interpolation: str | None = None,
) -> Float32[Array, "B Y X 3"]:
    """The evaluation view of every image, as the model takes it.

    An image is a path, the bytes of a file, a uint8 array (Y, X, 3) in RGB or a PIL image.
    model: what `tif_jax.load` returns; its `image_size` and `preprocessing` hold unless something else is given. Without a
      model they are 224 pixels and the defaults of `Preprocessing`, which are DeiT's.
    Raises InputError for what is no image or can not be read, and for values out of range.
    """
    if model is not None and not isinstance(getattr(model, "preprocessing", None), Preprocessing):
        raise InputError(f"model is {model!r:.60}; it is what tif_jax.load returns (a size is given as image_size=224)")
    given = dict(crop_fraction=crop_fraction, mean=mean, std=std, interpolation=interpolation)
    how = replaced(model.preprocessing if model else Preprocessing(), given)
    own_size = model.image_size if model else 224
    size = _height_and_width(own_size if image_size is None else image_size)
    return jnp.asarray(np.stack([evaluation_view(x, size, **vars(how)) for x in map(_read, _listed(images))]))


def replaced(preprocessing: Preprocessing, given: Any) -> Preprocessing:
    """The same but for what is given and not None. Raises InputError for what is unknown or out of range."""
    if not isinstance(given, Mapping) or not given.keys() <= {*PARTS}:
        raise InputError(f"preprocessing is {given!r:.80}; it is a dict of some of {', '.join(PARTS)}")
    said = {name: value for name, value in given.items() if value is not None}
    numbers = {name: np.asarray(said[name]).tolist() for name in ("mean", "std") if name in said}
    return checked.read(Preprocessing, {**vars(preprocessing), **said, **numbers})


def _listed(images: Any) -> list[Any]:
    is_batch = isinstance(images, np.ndarray) and images.ndim == 4
    if (isinstance(images, AnyImage) and not is_batch) or not isinstance(images, Iterable):
        raise InputError(f"images are {images!r:.60}; preprocess takes several: for one, a list of it")
    listed = list(images)
    if not listed:
        raise InputError("images are empty; preprocess takes at least one")
    return listed


def _read(image: Any) -> Image.Image:
    if not isinstance(image, AnyImage):
        raise InputError(f"an image is {image!r:.60}; it is a path, the bytes of a file, a uint8 array or a PIL image")
    try:
        return read_image(image)
    except UnreadableImage as error:
        raise UnreadableImage(f"{error}; replace it, or leave it out") from error


def _height_and_width(image_size: Any) -> tuple[int, int]:
    kind = int | tuple[int, int]
    size = checked.value_of(kind, image_size, "image_size", checked.Range(least=1))
    return (size, size) if isinstance(size, int) else size


def evaluation_view(
    image: Image.Image,
    image_size: tuple[int, int],
    crop_fraction: float = 0.875,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    interpolation: str = "bicubic",
) -> Float32[np.ndarray, "Y X 3"]:
    """The central crop that evaluation sees, as timm takes it, normalised.

    The image is resized (antialiased) to the smallest picture of its aspect that covers image_size /
    crop_fraction, and the centre is cut out of that.
    """
    (width, height), (left, top) = resized(image.size, image_size, crop_fraction)
    box = (left, top, left + image_size[1], top + image_size[0])
    filter = Image.Resampling[interpolation.upper()]
    if width * height > _MAX_RESIZED * math.prod(image_size):
        across, down = image.width / width, image.height / height
        seen = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
        return normalise(image.resize(image_size[::-1], filter, seen), mean, std)
    return normalise(image.resize((width, height), filter).crop(box), mean, std)


def resized(
    size: tuple[int, int], image_size: tuple[int, int], crop_fraction: float
) -> tuple[tuple[int, int], tuple[int, int]]:
    """What an image of (columns, rows) is resized to for its evaluation view, and where in that the view begins.

    Both as (columns, rows).
    """
    covered_height, covered_width = (math.floor(x / crop_fraction) for x in image_size)
    width, height = size
    if height * covered_width <= width * covered_height:
        width, height = width * covered_height // height, covered_height
    else:
        width, height = covered_width, height * covered_width // width
    return (width, height), (round((width - image_size[1]) / 2), round((height - image_size[0]) / 2))


def augmented_view(
    image: Image.Image,
    image_size: tuple[int, int],
    rng: np.random.Generator,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: bool = True,
    augmentation: Augmentation = NONE,
    interpolation: str = "bicubic",
) -> Float32[np.ndarray, "Y X 3"]:
    """A random crop of random aspect (`random_crop`) resized to image_size, half of the time mirrored, normalised.

    augmentation: what else is done to the picture, and to its pixels once they are normalised.
    """
    crop = image.crop(random_crop((image.height, image.width), rng, scale, ratio))
    view = crop.resize(image_size[::-1], Image.Resampling[interpolation.upper()])
    if flip and rng.random() < 0.5:
        view = ImageOps.mirror(view)
    return erase(normalise(augment(view, augmentation, rng, mean), mean, std), augmentation.erase, rng)


def random_crop(
    size: tuple[int, int], rng: np.random.Generator, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a crop whose share of the area is in `scale` and whose width / height is in `ratio`.

    torchvision's RandomResizedCrop: area uniform, aspect log-uniform, place uniform; after ten draws that do not fit,
    the largest central crop with an allowed aspect.
    """
    # rng.random() alone: the other distributions of numpy's generators may change from release to release, and with
    # them the views that impacts were scored on.
    image_height, image_width = size
    for _ in range(10):
        area = image_height * image_width * (scale[0] + (scale[1] - scale[0]) * rng.random())
        aspect = ratio[0] * (ratio[1] / ratio[0]) ** rng.random()
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= image_width and 0 < height <= image_height:
            top, left = int((image_height - height + 1) * rng.random()), int((image_width - width + 1) * rng.random())
            return left, top, left + width, top + height
    width = min(image_width, max(1, round(image_height * ratio[1])))
    height = min(image_height, max(1, round(image_width / ratio[0])))
    top, left = (image_height - height) // 2, (image_width - width) // 2
    return left, top, left + width, top + height


def normalise(
    image: Image.Image | UInt8[np.ndarray, "Y X 3"], mean: Sequence[float], std: Sequence[float]
) -> Float32[np.ndarray, "Y X 3"]:
    """Pixels as fractions of 255, minus the mean, over the standard deviation, per channel."""
    # In place and a row of pixels at a time: four times as fast as broadcasting over the three channels.
    pixels = np.array(image, np.float32)
    rows = pixels.reshape(len(pixels), -1)
    rows /= np.float32(255)
    rows -= _along_row(tuple(mean), pixels.shape[1])
    rows /= _along_row(tuple(std), pixels.shape[1])
    return pixels


@cache
def _along_row(channels: tuple[float, ...], num_pixels: int) -> Float32[np.ndarray, " XC"]:
    return np.tile(np.asarray(channels, np.float32), num_pixels)
