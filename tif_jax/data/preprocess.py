"""From image files to the numbers a model sees.

Legend: B images, Y rows, X columns. Sizes are (Y, X).
"""

import math
from collections.abc import Sequence
from functools import cache

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, UInt8
from PIL import Image, ImageOps

from tif_jax.data.augment import Augmentation, augment, erase
from tif_jax.data.pictures import AnyImage, read_image
from tif_jax.errors import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

NONE = Augmentation()


def preprocess(
    images: Sequence[AnyImage],
    image_size: int | tuple[int, int] = 224,
    crop_fraction: float = 0.875,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Float32[Array, "B Y X 3"]:
    """The evaluation view of every image, ready for a model.

    An image is a path, the bytes of a file, a uint8 array (Y, X, 3) in RGB or a PIL image. InputError if one is not.
    """
    if isinstance(images, AnyImage) or not len(images):
        raise InputError(f"preprocess takes a list of at least one image; got {images!r:.60}")
    check_view(image_size, crop_fraction, mean, std)
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    return jnp.asarray(np.stack([evaluation_view(read_image(x), size, crop_fraction, mean, std) for x in images]))


def evaluation_view(
    image: Image.Image,
    image_size: tuple[int, int],
    crop_fraction: float = 0.875,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Float32[np.ndarray, "Y X 3"]:
    """The central crop that evaluation sees, as timm takes it, normalised.

    The image is resized (bicubic, antialiased) to the smallest picture of its aspect that covers image_size /
    crop_fraction, and the centre is cut out of that.
    """
    covered_height, covered_width = (math.floor(x / crop_fraction) for x in image_size)
    width, height = image.size
    if height * covered_width <= width * covered_height:
        width, height = width * covered_height // height, covered_height
    else:
        width, height = covered_width, height * covered_width // width
    top, left = round((height - image_size[0]) / 2), round((width - image_size[1]) / 2)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return normalise(resized.crop((left, top, left + image_size[1], top + image_size[0])), mean, std)


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
) -> Float32[np.ndarray, "Y X 3"]:
    """A random crop of random aspect (`random_crop`) resized to image_size, half of the time mirrored, normalised.

    augmentation: what else is done to the picture, and to its pixels once they are normalised.
    """
    crop = image.crop(random_crop((image.height, image.width), rng, scale, ratio))
    view = crop.resize(image_size[::-1], Image.Resampling.BICUBIC)
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


def check_view(
    image_size: int | tuple[int, ...], crop_fraction: float, mean: Sequence[float], std: Sequence[float]
) -> None:
    """Raises InputError unless these describe an evaluation view."""
    sizes = (image_size,) if isinstance(image_size, int) else image_size
    if len(sizes) > 2 or min(sizes) < 1:
        raise InputError(f"image_size is {image_size}; it is a positive number of pixels, or (Y, X)")
    if not 0 < crop_fraction <= 1:
        raise InputError(f"crop_fraction is {crop_fraction}; it is a fraction in (0, 1]")
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise InputError(f"mean is {mean} and std {std}; they are three numbers each, std above 0")


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
