"""What a data set is to the rest of the library: images with labels, by position."""

from typing import Protocol, TypedDict, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from tif_jax.errors import InputError


class UnreadableImage(InputError):
    """An image that cannot be decoded; the message names its file. `data.on_error` decides whether it ends the run."""


class Example(TypedDict):
    """One labelled image."""

    id: str  # file path relative to the source's root, or the TFDS id
    image: Image.Image | UInt8[np.ndarray, "Y X 3"]  # RGB
    label: int  # index of the classification head's output, -1 if there is none


@runtime_checkable
class Source(Protocol):
    """Examples in a fixed order, read at random and from many threads."""

    num_classes: int  # outputs the classification head needs: the largest label plus 1
    class_names: tuple[str, ...]  # one per class

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class Subset:
    """At most `num_examples` examples, evenly spaced over the source: sorted by class, every class keeps its share."""

    def __init__(self, source: Source, num_examples: int):
        self.source = source
        self.num_classes = source.num_classes
        self.class_names = source.class_names
        self._num_examples = min(num_examples, len(source))

    def __len__(self) -> int:
        return self._num_examples

    def __getitem__(self, index: int) -> Example:
        return self.source[range(len(self))[index] * len(self.source) // len(self)]
