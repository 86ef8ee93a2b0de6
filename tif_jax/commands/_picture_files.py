"""Files that commands make of pictures: how they are called, and that no others are overwritten."""

import io
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from tif_jax.errors import InputError
from tif_jax.figures.page import MADE_BY

_IN_A_NAME = re.compile(r"[^\w-]+")
_LONGEST_NAME = 60
_HEAD = 1000  # bytes of a file, in which `MADE_BY` is found


def file_names() -> Callable[[str], str]:
    """A function that gives each picture a name of its own like the picture's, without folder and ending."""
    taken: set[str] = set()

    def name_of(picture: str) -> str:
        stem = _IN_A_NAME.sub("_", Path(picture).stem)[:_LONGEST_NAME] or "picture"
        number, name = 1, stem
        while name.lower() in taken:  # some file systems do not tell A from a
            number += 1
            name = f"{stem}-{number}"
        taken.add(name.lower())
        return name

    return name_of


def check_ours(paths: Iterable[Path], command: str, flag: str) -> None:
    """Raises InputError where a file that we did not make would be overwritten: a picture, with the folder beside it."""
    for path in paths:
        if not path.is_file():
            continue
        with path.open("rb") as opened:
            if MADE_BY.encode() not in opened.read(_HEAD):
                raise InputError(f"{path} is no file of `{command}`, and would be overwritten; choose another {flag}")


def as_png(pixels: np.ndarray) -> bytes:
    """A PNG file that says who made it: uint8 or uint16 (Y, X), or uint8 (Y, X, 3)."""
    told = PngImagePlugin.PngInfo()
    told.add_text("Software", MADE_BY)
    image = io.BytesIO()
    Image.fromarray(pixels).save(image, "PNG", pnginfo=told)
    return image.getvalue()
