"""DeiT's augmentations of one picture: RandAugment, colour jitter, random erasing.

What comes out depends on the picture, the options and the generator alone, and of the generator only `random()` is used:
numpy may change its other distributions from release to release. Pillow does all that is done to 8-bit pixels.

Legend: Y rows, X columns.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32
from PIL import Image, ImageEnhance, ImageOps

from tif_jax import checked
from tif_jax.checked import key
from tif_jax.errors import InputError

Colour = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Which augmentations there are; by default none. InputError on values that are not allowed."""

    rand_augment: str = key("", "as timm spells it, e.g. 'rand-m9-mstd0.5-inc1', with or without 'rand-'; '': off")
    color_jitter: float = key(0.0, "strength; as in timm, without effect beside rand_augment", least=0, most=1)
    erase: float = key(0.0, "probability of random erasing", least=0, most=1)
    rotate: float = key(
        0.0, "label maps only: degrees by which image and label map are turned at most", least=0, most=180
    )

    def __post_init__(self):
        checked.check(self)
        if self.rand_augment:
            _policy(self.rand_augment)


def augment(
    image: Image.Image,
    options: Augmentation,
    rng: np.random.Generator,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
) -> Image.Image:
    """RandAugment (Cubuk et al. 2020) as timm has it with inc1, or else colour jitter, or else the picture as it is.

    RandAugment: n operations, each drawn from OPERATIONS and applied with probability p, at a magnitude drawn from a
    normal distribution (m, mstd) and cut to 0..10. Jitter: brightness, contrast and saturation in random order, each
    times a number from [1 - color_jitter, 1 + color_jitter]. mean: of the data, in [0, 1] per channel; what comes into
    view from outside the picture has this colour.
    """
    if options.rand_augment:
        return _rand_augment(image, _policy(options.rand_augment), rng, fill_colour(mean))
    if options.color_jitter:
        return _jitter(image, options.color_jitter, rng)
    return image


def fill_colour(mean: Sequence[float]) -> Colour:
    """The colour of what comes into view from outside the picture. mean: of the data, in [0, 1] per channel."""
    red, green, blue = (min(255, round(255 * channel)) for channel in mean)
    return red, green, blue


def erase(
    image: Float32[np.ndarray, "Y X 3"], probability: float, rng: np.random.Generator
) -> Float32[np.ndarray, "Y X 3"]:
    """The normalised picture; with this probability a rectangle of it is overwritten, in place, with normal noise.

    Random erasing (Zhong et al. 2020) as in timm, mode 'pixel': the rectangle has 1/50 to 1/3 of the area, uniformly, and
    an aspect from 0.3 to 1/0.3, log-uniformly; nothing happens where ten of them do not fit.
    """
    if rng.random() < probability:
        rows, columns = image.shape[:2]
        for _ in range(10):
            area = rows * columns * (0.02 + (1 / 3 - 0.02) * rng.random())
            aspect = 0.3 ** (1 - 2 * rng.random())
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height < rows and width < columns:
                top, left = int((rows - height + 1) * rng.random()), int((columns - width + 1) * rng.random())
                image[top : top + height, left : left + width] = _normal(rng, (height, width, 3))
                break
    return image


def _shift(image: Image.Image, fill: Colour, *matrix: float | int) -> Image.Image:
    """Pixel (x, y) becomes what is at (a x + b y + c, d x + e y + f), matrix = a, ..., f."""
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BICUBIC, fillcolor=fill
    )


def _posterize(image: Image.Image, bits: int) -> Image.Image:
    """ImageOps.posterize, of which newer versions refuse 0 bits."""
    return image.point(lambda i: i >> 8 - bits << 8 - bits)


# By timm's names (less 'Increasing'): functions of a picture, a level in [-1, 1] and the colour outside the picture. The
# level is magnitude / 10 with a random sign; where there are no two directions, the sign is ignored.
OPERATIONS: dict[str, Callable[[Image.Image, float, Colour], Image.Image]] = {
    "AutoContrast": lambda image, level, fill: ImageOps.autocontrast(image),
    "Equalize": lambda image, level, fill: ImageOps.equalize(image),
    "Invert": lambda image, level, fill: ImageOps.invert(image),
    "Rotate": lambda image, level, fill: image.rotate(30 * level, Image.Resampling.BICUBIC, fillcolor=fill),
    "Posterize": lambda image, level, fill: _posterize(image, 4 - int(4 * abs(level))),
    "Solarize": lambda image, level, fill: ImageOps.solarize(image, 256 - int(256 * abs(level))),
    "SolarizeAdd": lambda image, level, fill: image.point(lambda i: i + int(110 * abs(level)) if i < 128 else i),
    "Color": lambda image, level, fill: ImageEnhance.Color(image).enhance(1 + 0.9 * level),
    "Contrast": lambda image, level, fill: ImageEnhance.Contrast(image).enhance(1 + 0.9 * level),
    "Brightness": lambda image, level, fill: ImageEnhance.Brightness(image).enhance(1 + 0.9 * level),
    "Sharpness": lambda image, level, fill: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * level),
    "ShearX": lambda image, level, fill: _shift(image, fill, 1, 0.3 * level, 0, 0, 1, 0),
    "ShearY": lambda image, level, fill: _shift(image, fill, 1, 0, 0, 0.3 * level, 1, 0),
    "TranslateXRel": lambda image, level, fill: _shift(image, fill, 1, 0, 0.45 * level * image.width, 0, 1, 0),
    "TranslateYRel": lambda image, level, fill: _shift(image, fill, 1, 0, 0, 0, 1, 0.45 * level * image.height),
}


class _Policy(NamedTuple):
    """timm's names and defaults."""

    m: float = 10.0
    mstd: float = 0.0
    n: float = 2.0
    p: float = 0.5


_MOST = {"m": 10, "mstd": 100, "n": 100, "p": 1, "inc": 1}


@functools.cache
def _policy(text: str) -> _Policy:
    """What a text such as 'rand-m9-mstd0.5-inc1' says. InputError if it says something else."""
    values = {}
    for part in text.removeprefix("rand-").split("-"):
        match = re.fullmatch(r"(m|mstd|p)([0-9]+(?:[.][0-9]+)?)", part) or re.fullmatch(r"(n|inc)([0-9]+)", part)
        if not match or float(match[2]) > _MOST[match[1]]:
            raise InputError(
                f"rand_augment is {checked.shown(text)} with the part {checked.shown(part)}; it is made of m (magnitude, 0 "
                "to 10), mstd (its standard deviation, 0 to 100), n (operations, 0 to 100), p (probability of each) and "
                "inc1, as in 'm9-mstd0.5-inc1'"
            )
        values[match[1]] = float(match[2])
    if not values.pop("inc", 0):
        raise InputError(
            f"rand_augment is {checked.shown(text)}; only operations of increasing severity are known: add '-inc1'"
        )
    return _Policy(**values)


def _rand_augment(image: Image.Image, policy: _Policy, rng: np.random.Generator, fill: Colour) -> Image.Image:
    operations = list(OPERATIONS.values())
    for _ in range(int(policy.n)):
        operation = operations[int(len(operations) * rng.random())]
        if rng.random() < policy.p:
            magnitude = min(max(policy.m + policy.mstd * _normal(rng, (1,)).item(), 0.0), 10.0)
            sign = 1 if rng.random() < 0.5 else -1
            image = operation(image, sign * magnitude / 10, fill)
    return image


def _jitter(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    enhancers = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color
    for i in np.argsort(rng.random(3)):
        image = enhancers[i](image).enhance(1 + strength * (2 * rng.random() - 1))
    return image


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float32 numbers, each made of two uniform ones (Box and Muller 1958); always finite."""
    # float32 takes a third of the time of float64.
    radius, turn = np.sqrt(-2 * np.log(1 - rng.random(shape, np.float32))), rng.random(shape, np.float32)
    return radius * np.cos(np.float32(2 * np.pi) * turn)
