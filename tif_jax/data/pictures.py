"""From image files to upright 8-bit RGB pictures.

Legend: Y rows, X columns.
"""

import io
import logging
import math
import os
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image

from tif_jax.data.source import UnreadableImage
from tif_jax.errors import InputError

logger = logging.getLogger(__name__)

# What is opened, whatever a file is called. Pillow knows fifty more kinds, some through other programs (Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

_HUGE = 2**26  # pixels: a file that says it has more is likelier damaged than a photograph

# EXIF 2.3, tag 0x0112: what makes a picture upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_NOTES = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")  # where Pillow keeps the orientation

AnyImage = str | os.PathLike | bytes | np.ndarray | Image.Image


def read_image(image: AnyImage, name: str = "", most_pixels: int | None = None) -> Image.Image:
    """The upright 8-bit RGB picture: first frame, EXIF orientation applied, transparency laid over white.

    `name` stands for the image in errors; default: its path. UnreadableImage if the file is missing, truncated, corrupt,
    of none of the FORMATS, of a kind without a fixed range (floating point, more than 16 bits), or beyond what Pillow
    takes for honest (twice Image.MAX_IMAGE_PIXELS), or `most_pixels`; of neither is anything decoded.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise InputError(f"an image is a {image.dtype} array of shape {image.shape}; give uint8 (Y, X, 3) in RGB")
        return Image.fromarray(image)
    if isinstance(image, Image.Image):
        name = name or str(getattr(image, "filename", "")) or repr(image)
    elif not isinstance(image, bytes):
        name = name or os.fspath(image)
    try:
        if isinstance(image, Image.Image):
            return _to_rgb(image, name)
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else Path(image), formats=FORMATS) as opened:
            if most_pixels is not None and math.prod(opened.size) > most_pixels:
                raise ValueError(f"it has {opened.width} x {opened.height} pixels; {most_pixels} are the most")
            return _to_rgb(opened, name)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise every kind of exception on corrupt files
        unknown = isinstance(error, Image.UnidentifiedImageError)
        reason = f"not an image of a kind that is read ({', '.join(FORMATS)})" if unknown else described(error)
        raise UnreadableImage(f"cannot read image {name}: {reason}") from error


def described(error: Exception) -> str:
    """What a decoder says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    try:
        return _upright_rgb(image, name)
    except MemoryError:
        if math.prod(image.size) < _HUGE:
            raise  # the machine's fault, not the picture's
        raise ValueError(f"there is no memory for its {image.width} x {image.height} pixels") from None


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    image.load()
    orientation = _orientation(image, name)
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
        for note in _NOTES:
            image.info.pop(note, None)
    if image.mode.startswith("I"):
        image = Image.fromarray(_to_8_bit(np.asarray(image)))
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range; save it with 8 or 16 bits per channel")
    elif image.mode.endswith(("A", "a")) or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _orientation(image: Image.Image, name: str) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception as error:  # Pillow raises every kind; what a camera notes beside the pixels is no part of them
        logger.debug("EXIF of %s is damaged and ignored: %s", name, described(error))
        return 1


def _to_8_bit(pixels: np.ndarray) -> UInt8[np.ndarray, "Y X"]:
    """16-bit grey levels over the range of 8 bits."""
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError("pixels of more than 16 bits have no fixed range; save it with 8 or 16 bits per channel")
    return np.round(pixels / 257).astype(np.uint8)
