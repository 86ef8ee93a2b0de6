"""Which class is which output of a classification head."""

import logging
from collections.abc import Collection, Mapping
from itertools import pairwise

from tif_jax.errors import InputError
from tif_jax.runtime import once

logger = logging.getLogger(__name__)

MAX_CLASSES = 1_000_000  # far above any head: a label beyond is a mistake, and must not cost memory

_JOINED = " / "

ClassIndex = Mapping[str, int]


def outputs(
    names: Collection[str], class_index: ClassIndex | None = None, what: str = "class folder"
) -> dict[str, int]:
    """The output of each class of a data set: by class_index, or its position `in_order`.

    InputError, calling a class `what`, for one that class_index has no output for.
    """
    if class_index is not None:
        found = {name: _entry(name, class_index, what) for name in sorted(names)}
        if shared := [name for name in names_by_output(found) if _JOINED in name]:
            once.warn(logger, f"data.class_index makes one class of several {what}s: {'; '.join(shared[:3])}")
        return found
    return {name: i for i, name in enumerate(in_order(names))}


def in_order(names: Collection[str]) -> list[str]:
    """Sorted as text; by size if all are whole numbers, so that 10 comes after 9. InputError if two are one number."""
    ordered = sorted(names)
    if not all(name.isascii() and name.isdecimal() for name in ordered):
        return ordered
    ordered.sort(key=_size)
    for one, other in pairwise(ordered):
        if _size(one) == _size(other):
            raise InputError(
                f"class folders {one!r} and {other!r} are the same number; rename one, or say in data.class_index which "
                "folder is which class"
            )
    return ordered


def names_by_output(output_of: Mapping[str, int]) -> tuple[str, ...]:
    """The name of each output up to the last that has a class; '' for one that has none."""
    names = [""] * (1 + max(output_of.values(), default=-1))
    for name, output in output_of.items():
        names[output] = f"{names[output]}{_JOINED}{name}" if names[output] else name
    return tuple(names)


def _size(name: str) -> tuple[int, str]:
    """Orders whole numbers of any length."""
    digits = name.lstrip("0")
    return len(digits), digits


def _entry(name: str, class_index: ClassIndex, what: str) -> int:
    if name not in class_index:
        raise InputError(f"data.class_index has no entry for {what} {name!r}; add it, or remove the {what}")
    output = class_index[name]
    if type(output) is not int or not 0 <= output < MAX_CLASSES:
        raise InputError(
            f"data.class_index.{name} is {output!r}; it must be a whole number from 0 to {MAX_CLASSES - 1}"
        )
    return output
