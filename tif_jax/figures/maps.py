"""From arrays over the patch raster to pictures of 8-bit RGB.

Legend: Y rows, X columns of pixels; R rows, C columns of the patch raster; N patches.
"""

import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from tif_jax.data.preprocess import Preprocessing
from tif_jax.figures.colours import OUTLINE, Scale

Picture = UInt8[np.ndarray, "_ _ 3"]

_SIDE = 320  # pixels at least of the longer side: of small photographs every pixel is repeated
_LIGHT = 0.6  # of the darkest grey under a map, that its colours can be told there


def photograph(image: Float[np.ndarray, "Y X 3"], how: Preprocessing) -> Picture:
    """The view that a model gets, as the pixels it was made of."""
    pixels = np.asarray(image, np.float32) * np.asarray(how.std, np.float32) + np.asarray(how.mean, np.float32)
    return np.rint(255 * pixels.clip(0, 1)).astype(np.uint8)


def enlarged(photo: Picture) -> Picture:
    """Large enough to be looked at: pixels repeated by the same whole number."""
    times = -(-_SIDE // max(photo.shape[:2]))
    return photo.repeat(times, axis=0).repeat(times, axis=1)


def map_over(photo: Picture, values: Float[np.ndarray, "R C"], scale: Scale) -> Picture:
    """The photograph in light grey, each patch tinted with the colour of its value."""
    photo = enlarged(photo)
    grey = photo.mean(axis=2, keepdims=True) / 255
    tint = _spread(scale.colours(values), photo.shape[:2])
    return np.rint(255 * tint * (_LIGHT + (1 - _LIGHT) * grey)).astype(np.uint8)


def tokens_over(photo: Picture, source: Int[np.ndarray, "R C"]) -> Picture:
    """What is left: patches that are tokens of their own as they are, those merged in the mean colour of their token.

    source: the token that holds each patch, or -1, where the picture is pale. Tokens of several patches are outlined.
    """
    photo = enlarged(photo)
    shape = photo.shape[:2]
    colours = _patch_means(photo, source.shape)
    tokens, row, sizes = np.unique(source, return_inverse=True, return_counts=True)
    row = row.reshape(-1)
    sums = np.stack([np.bincount(row, colours[:, channel], len(tokens)) for channel in range(3)], axis=1)
    means = (sums / sizes[:, None])[row].reshape(*source.shape, 3)
    is_group = (sizes[row].reshape(source.shape) > 1) & (source >= 0)
    grey = photo.mean(axis=2, keepdims=True)
    pale = np.broadcast_to(255 - 0.18 * (255 - grey), photo.shape)
    picture = np.where(_spread(source >= 0, shape)[..., None], photo, pale)
    picture = np.where(_spread(is_group, shape)[..., None], _spread(means, shape), picture)
    picture = np.rint(picture).astype(np.uint8)
    picture[_outlines(source, is_group, shape)] = [int(OUTLINE[i : i + 2], 16) for i in (1, 3, 5)]
    return picture


def as_jpeg(picture: Picture) -> bytes:
    """The file's bytes; colours are not thinned out, so that lines stay sharp."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=88, subsampling=0)
    return file.getvalue()


def _patch_means(photo: Picture, grid: Sequence[int]) -> Float[np.ndarray, "N 3"]:
    """The mean colour of each patch."""
    height, width = photo.shape[0] // grid[0], photo.shape[1] // grid[1]
    patches = photo[: grid[0] * height, : grid[1] * width].reshape(grid[0], height, grid[1], width, 3)
    return patches.mean(axis=(1, 3)).reshape(-1, 3)


def _spread(values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A value per patch as one per pixel."""
    rows, columns = (np.arange(size) * cells // size for size, cells in zip(shape, values.shape, strict=False))
    return values[rows][:, columns]


def _outlines(source: Int[np.ndarray, "R C"], is_group: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Which pixels of tokens of several patches are within a line's width of another token; of the picture's edge none."""
    token, group = _spread(source, shape), _spread(is_group, shape)
    border = np.zeros(shape, bool)
    for step in range(1, 1 + max(1, min(shape) // 240)):
        down, right = token[step:] != token[:-step], token[:, step:] != token[:, :-step]
        border[:-step] |= down
        border[step:] |= down
        border[:, :-step] |= right
        border[:, step:] |= right
    return border & group
