"""What a data set is to the rest of the library: images with labels, by position."""

from typing import NotRequired, Protocol, TypeAlias, TypedDict, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int, Int32, UInt8
from PIL import Image

from tif_jax.errors import InputError
from tif_jax.runtime import records


class UnreadableImage(InputError):
    """An image that cannot be decoded; the message names its file. `data.on_error` decides whether it ends the run."""


LabelMap: TypeAlias = Float32[np.ndarray, "_ _"] | Int32[np.ndarray, "_ _"]  # (rows, columns)


class Example(TypedDict):
    """One labelled image: with a label, or with a label map."""

    id: str  # file path relative to the source's root, or the TFDS id
    image: Image.Image | UInt8[np.ndarray, "Y X 3"]  # RGB
    label: int  # index of the classification head's output, -1 if there is none
    label_map: NotRequired[LabelMap]  # metres, 0 where not measured; or outputs of a head, -1 where a pixel is ignored


@runtime_checkable
class Source(Protocol):
    """Examples in a fixed order, read at random and from many threads."""

    num_classes: int  # outputs the classification head needs: the largest label plus 1
    class_names: tuple[str, ...]  # one per output; '' for an output that no class of the data set is

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class Subset:
    """The examples at some positions of a source."""

    def __init__(self, source: Source, positions: Int[np.ndarray, " n"]):
        self.source = source
        self.num_classes = source.num_classes
        self.class_names = source.class_names
        self._positions = positions

    @property
    def fingerprint(self) -> str | None:
        of_all = fingerprint(self.source)
        return of_all and records.digest([of_all, np.asarray(self._positions).tolist()])

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int) -> Example:
        return self.source[int(self._positions[index])]


class Labelled:
    """A source of which labels, or label maps, are read: InputError for one with a label that is no output of the head.

    name: the data set's, for the message.
    """

    def __init__(self, source: Source, num_outputs: int, name: str):
        self.source = source
        self.num_classes = source.num_classes
        self.class_names = source.class_names
        self._num_outputs = num_outputs
        self._name = name

    @property
    def fingerprint(self) -> str | None:
        return fingerprint(self.source)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        example = self.source[index]
        if "label_map" in example:
            label = int(example["label_map"].max(initial=-1))
            if example["label_map"].dtype.kind == "i" and label >= self._num_outputs:
                raise InputError(
                    f"{self._name}: the label map of {example['id']} has class {label}; the model has classes "
                    f"0..{self._num_outputs - 1}: say in data.class_index which number is which class"
                )
            return example
        if example["label"] < 0:
            raise InputError(
                f"{self._name} has images without a label, as {example['id']}; name a split that has labels"
            )
        if example["label"] >= self._num_outputs:
            raise InputError(
                f"{self._name}: {example['id']} has label {example['label']}; the model has classes "
                f"0..{self._num_outputs - 1}"
            )
        return example


def fingerprint(source: Source) -> str | None:
    """Digest of which examples there are, in which order, with which labels; None where a source does not tell.

    The folder that they lie in is not part of it. The sources of this package have it as a property.
    """
    return getattr(source, "fingerprint", None)


def evenly_spaced(num: int, num_examples: int) -> Int[np.ndarray, " n"]:
    """At most `num` positions among so many examples: sorted by class, every class keeps its share."""
    num = min(num, num_examples)
    return np.arange(num) * num_examples // max(1, num)
