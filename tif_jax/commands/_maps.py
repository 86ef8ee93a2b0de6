"""`tif predict` of depth and segmentation models: a line per picture, and maps of its pixels as PNG files.

Legend: Y X height and width of the view that the model gets.
"""

import logging
from pathlib import Path

import numpy as np
from jaxtyping import Num

from tif_jax.commands._picture_files import as_png, check_ours, file_names
from tif_jax.data.folder import as_id
from tif_jax.data.pictures import AnyImage
from tif_jax.figures.colours import class_colours, depth_scale
from tif_jax.models import Model
from tif_jax.models.predictions import predicted_maps
from tif_jax.runtime import files
from tif_jax.runtime.progress import Progress
from tif_jax.tasks import DEPTH

logger = logging.getLogger(__name__)

_PREVIEW = "preview.png"


def write_maps(model: Model, pictures: list[tuple[str, AnyImage]], out: str | None) -> None:
    """Prints what is predicted of every picture; with `out` DIR/NAME.depth.png (16 bits, millimetres) or
    DIR/NAME.classes.png (numbers of classes), and DIR/NAME.preview.png in colours.

    Raises InputError, before any work, where a file would be overwritten that this command did not make.
    """
    kind = "depth.png" if model.task == DEPTH.name else "classes.png"
    name_of = file_names()
    names = [name_of(as_id(name)) for name, _ in pictures]
    folder = None if out is None else Path(out).expanduser()
    if folder:
        files.check_writable(folder)
        check_ours((folder / f"{name}.{end}" for name in names for end in (kind, _PREVIEW)), "tif predict", "--out")
    lines, unread = [], 0
    with Progress("predict", len(pictures), "image") as progress:
        for name, found in zip(names, predicted_maps(model, pictures), strict=True):
            progress.update(1)
            if found.pixels is None:
                unread += 1
                lines.append(f"{as_id(found.file)}: could not be read")
                continue
            lines += [as_id(found.file), *(f"  {line}" for line in _lines(model, found.pixels))]
            if folder:
                files.write(folder / f"{name}.{kind}", as_png(_numbers(model, found.pixels)))
                files.write(folder / f"{name}.{_PREVIEW}", as_png(_coloured(model, found.pixels)))
    print("\n".join(lines))
    logger.info(
        "maps are in %s" if folder else "--out DIR writes the maps of pixels, too", *([folder] if folder else [])
    )
    if unread:
        logger.warning("%d of %d pictures could not be read", unread, len(pictures))


def _lines(model: Model, pixels: Num[np.ndarray, "Y X"]) -> list[str]:
    if model.task == DEPTH.name:
        least, middle, most = np.quantile(pixels, [0, 0.5, 1])
        return [f"{least:.2f} m nearest, {middle:.2f} m median, {most:.2f} m farthest"]
    shares = np.bincount(pixels.reshape(-1), minlength=model.num_classes) / pixels.size
    names = model.class_names or [f"class {i}" for i in range(model.num_classes)]
    return [f"{100 * shares[i]:5.1f} %  {names[i]}" for i in np.argsort(-shares, kind="stable") if shares[i]]


def _numbers(model: Model, pixels: Num[np.ndarray, "Y X"]) -> Num[np.ndarray, "Y X"]:
    if model.task == DEPTH.name:
        millimetres, most = np.rint(1000 * pixels), np.iinfo(np.uint16).max
        if beyond := int((millimetres > most).sum()):
            logger.warning(
                "%d pixels are farther than %.3f m, the most that the file can say, and have that", beyond, most / 1000
            )
        return millimetres.clip(0, most).astype(np.uint16)
    return pixels.astype(np.uint8 if model.num_classes <= 256 else np.uint16)


def _coloured(model: Model, pixels: Num[np.ndarray, "Y X"]) -> Num[np.ndarray, "Y X 3"]:
    if model.task == DEPTH.name:
        return np.rint(255 * depth_scale(pixels).colours(pixels)).astype(np.uint8)
    return np.rint(255 * class_colours(model.num_classes)[pixels]).astype(np.uint8)
