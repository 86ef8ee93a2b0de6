"""A program that reads damaged pictures with 2 GiB of memory: python damaged_pictures.py FIRST COUNT.

Its last line says how many could be read and how many could not; anything but an UnreadableImage ends it with a trace.
"""

import random
import resource
import sys
import warnings

import numpy as np
from pictures import encode, picture
from PIL import Image

from tif_jax.data.pictures import read_image
from tif_jax.data.preprocess import augmented_view, evaluation_view
from tif_jax.data.source import UnreadableImage

_NUMBERS = [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\xff\xff", b"\x10\0\0\0", b"\0\x01\x86\xa0"]


def whole() -> dict[str, bytes]:
    """Small pictures of every kind that is read."""
    image = picture(rows=30, columns=40)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "camera"
    frames = dict(save_all=True, append_images=[image.rotate(90), image.rotate(180)])
    deep = Image.fromarray(np.arange(81, dtype=np.uint16).reshape(9, 9) * 800)
    made = {
        "jpeg": encode(image, "JPEG", exif=exif),
        "jpeg, progressive": encode(image, "JPEG", progressive=True),
        "jpeg, cmyk": encode(image.convert("CMYK"), "JPEG"),
        "mpo": encode(image, "MPO", **frames),
        "png": encode(image, "PNG", exif=exif),
        "png, palette": encode(image.convert("P"), "PNG", transparency=3),
        "png, 16 bits": encode(deep, "PNG"),
        "png, animated": encode(image, "PNG", **frames),
        "webp": encode(image, "WEBP", exif=exif),
        "webp, lossless": encode(image.convert("RGBA"), "WEBP", lossless=True),
        "webp, animated": encode(image, "WEBP", **frames),
        "gif": encode(image, "GIF"),
        "gif, animated": encode(image, "GIF", **frames),
        "bmp": encode(image, "BMP"),
        "bmp, palette": encode(image.convert("P"), "BMP"),
        "ppm": encode(image, "PPM"),
        "pgm": encode(image.convert("L"), "PPM"),
        "tiff": encode(image, "TIFF", exif=exif),
    }
    kinds = ("tiff_lzw", "jpeg", "tiff_adobe_deflate")
    return made | {f"tiff, {kind}": encode(image, "TIFF", compression=kind) for kind in kinds}


def damaged(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, lost, added or moved, most of them near the beginning; sometimes the end is missing."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(changed) if rng.random() < 0.5 else min(len(changed), 200))
        kind = rng.randrange(6)
        if kind == 0:
            changed[at] = rng.randrange(256)
        elif kind == 1:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            changed[at : at + 4] = rng.choice(_NUMBERS)
        elif kind == 3:
            del changed[at : at + rng.randrange(1, 9)]
        elif kind == 4:
            changed[at:at] = rng.randbytes(rng.randrange(1, 9))
        else:
            other = rng.randrange(len(changed))
            changed[at : at + 8] = changed[other : other + 8]
    return bytes(changed[: rng.randrange(len(changed))] if rng.random() < 0.15 else changed)


def main(first: int, count: int) -> None:
    pictures = whole()
    for data in pictures.values():
        assert read_image(data).size in ((40, 30), (30, 40), (9, 9))
    resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
    warnings.simplefilter("ignore")
    found = {"read": 0, "unreadable": 0}
    for number in range(first, first + count):
        rng = random.Random(number)
        kind = rng.choice(sorted(pictures))
        try:
            image = read_image(damaged(pictures[kind], rng), f"{kind} {number}")
        except UnreadableImage as error:
            assert "\n" not in str(error) and str(error).startswith(f"cannot read image {kind} {number}: "), str(error)
            found["unreadable"] += 1
            continue
        assert image.mode == "RGB"
        for view in evaluation_view(image, (32, 32)), augmented_view(image, (32, 32), np.random.default_rng(0)):
            assert view.shape == (32, 32, 3) and np.isfinite(view).all()
        found["read"] += 1
    print(found["read"], found["unreadable"])


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
