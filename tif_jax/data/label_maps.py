"""Label maps: the numbers that a file or a feature has for every pixel, as metres or as classes.

Legend: Y rows, X columns.
"""

import dataclasses
import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, Num, UInt8, UInt16
from PIL import Image

from tif_jax.data.classes import MAX_CLASSES, names_by_output
from tif_jax.data.source import LabelMap, UnreadableImage
from tif_jax.errors import InputError
from tif_jax.tasks import DEPTH, SEGMENTATION

KINDS = (DEPTH.name, SEGMENTATION.name)
UNMEASURED = 0.0  # metres: the depth of a pixel that was not measured
IGNORED = -1  # the class of a pixel that does not count

_MOST = 2**16  # what a number of a label map with classes is below


@dataclasses.dataclass(frozen=True)
class LabelMaps:
    """What the numbers of label maps stand for: metres, or outputs of a head that classifies pixels."""

    kind: str  # one of KINDS
    scale: float | None = None  # depth: metres per unit; None: numbers are floating-point, and metres
    class_index: Mapping[str, int] | None = None  # segmentation: number -> output; one that is not there is ignored
    num_classes: int = 0  # segmentation: classes are below; 0: what class_index has, else unknown

    def __post_init__(self):
        for number, output in (self.class_index or {}).items() if self.kind == SEGMENTATION.name else ():
            if not (number.isascii() and number.isdecimal() and len(number) < 6 and int(number) < _MOST):
                raise InputError(
                    f"data.class_index has an entry for {number!r:.40}; classes of label maps are whole numbers from 0 to "
                    f"{_MOST - 1}"
                )
            if type(output) is not int or not 0 <= output < (self.num_classes or MAX_CLASSES):
                raise InputError(
                    f"data.class_index.{number} is {output!r:.40}; it is a whole number from 0 to "
                    f"{(self.num_classes or MAX_CLASSES) - 1}"
                )

    @property
    def num_outputs(self) -> int:
        """Outputs that a head needs; 0: unknown, or none."""
        if self.kind == DEPTH.name:
            return 0
        return self.num_classes or 1 + max((self.class_index or {}).values(), default=-1)

    @property
    def class_names(self) -> tuple[str, ...]:
        """One per output; a class of class_index has its number as its name."""
        names = names_by_output(self.class_index) if self.class_index and self.num_outputs else ()
        return (*names, *[""] * (self.num_outputs - len(names)))

    def without_labels(self, size: tuple[int, int]) -> LabelMap:
        """A map of (rows, columns) that says nothing."""
        if self.kind == DEPTH.name:
            return np.full(size, UNMEASURED, np.float32)
        return np.full(size, IGNORED, np.int32)

    def check(self, dtype: np.dtype | type, where: str) -> None:
        """Raises InputError where numbers of this type can not be made sense of."""
        whole = np.dtype(dtype).kind in "iub"
        if self.kind == DEPTH.name and whole and self.scale is None:
            raise InputError(
                f"data.label_scale is not given, and {where} has whole numbers: say how many metres a unit is, as in 0.001 "
                "where they are millimetres (or set data.label_kind=segmentation if they are classes)"
            )
        if self.kind == SEGMENTATION.name and not whole:
            raise InputError(
                f"{where} has numbers of type {np.dtype(dtype).name}, and classes are whole numbers: set "
                "data.label_kind=depth if they are metres"
            )

    def read(self, numbers: Num[np.ndarray, "Y X"] | Bool[np.ndarray, "Y X"], name: str) -> LabelMap:
        """Metres, UNMEASURED where a number is 0, negative or not finite; or classes, IGNORED where that is said.

        Said to be ignored are negative numbers, the largest of 8 or 16 bits (255, 65535), and what class_index has no entry
        for. name: of the map, in the InputError for a class that there is not.
        """
        if self.kind == DEPTH.name:
            return _metres(numbers, 1.0 if self.scale is None else self.scale)
        if self.class_index:
            table = np.full(_MOST, IGNORED, np.int32)
            for number, output in self.class_index.items():
                table[int(number)] = output
            known = (numbers >= 0) & (numbers < _MOST)
            return np.where(known, table[np.where(known, numbers, 0).astype(np.int32)], np.int32(IGNORED))
        ignored = numbers == np.iinfo(numbers.dtype).max if numbers.dtype.kind == "u" else numbers < 0
        classes = np.where(ignored, np.int64(IGNORED), numbers)
        if self.num_classes and (largest := int(classes.max(initial=0))) >= self.num_classes:
            raise InputError(
                f"label map {name} has class {largest}, and there are {self.num_classes}, from 0: set data.num_classes to "
                "more, or say in data.class_index which number is which class (one that is not there is ignored)"
            )
        return classes.clip(max=np.iinfo(np.int32).max).astype(np.int32)


def read_numbers(file: Path | bytes, name: str, kind: str) -> UInt8[np.ndarray, "Y X"] | UInt16[np.ndarray, "Y X"]:
    """The numbers of a PNG file with one channel of 8 or 16 bits; of one with a palette, the indices of the colours.

    UnreadableImage, calling the map `name`, for any other file, and for a palette where depth is wanted.
    """
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=("PNG",)) as opened:
            return _numbers(opened, kind)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise every kind of exception on corrupt files
        unknown = isinstance(error, Image.UnidentifiedImageError)
        reason = "it is not a PNG file" if unknown else " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImage(f"cannot read label map {name}: {reason}") from error


def _numbers(opened: Image.Image, kind: str) -> UInt8[np.ndarray, "Y X"] | UInt16[np.ndarray, "Y X"]:
    tile = getattr(opened, "tile", None)
    layout = tile[0][3] if tile else opened.mode  # as the file has it: Pillow spreads 2 and 4 bits over 8
    if opened.mode not in ("1", "L", "P", "I", "I;16") or (opened.mode == "L" and layout != "L"):
        raise ValueError(f"its pixels are of the kind {layout}; save it with one channel of 8 or 16 bits")
    if opened.mode == "P" and kind == DEPTH.name:
        raise ValueError("it has a palette, whose colours are no metres; save the depth in grey levels of 16 bits")
    pixels = np.asarray(opened)
    return pixels.astype(np.uint16 if opened.mode.startswith("I") else np.uint8)


def _metres(numbers: Num[np.ndarray, "Y X"] | Bool[np.ndarray, "Y X"], scale: float) -> Float32[np.ndarray, "Y X"]:
    with np.errstate(over="ignore", invalid="ignore"):
        metres = numbers.astype(np.float32) * np.float32(scale)
    return np.where(np.isfinite(metres) & (metres > 0), metres, np.float32(UNMEASURED))
