"""The `data` section of a config: which images, and how they are read."""

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from typing import Any, TypeAlias

from ml_collections import ConfigDict

from tif_jax import checked
from tif_jax.checked import key
from tif_jax.data.classes import MAX_CLASSES
from tif_jax.data.label_maps import KINDS, LabelMaps
from tif_jax.data.preprocess import FRACTIONS, INTERPOLATIONS, PARTS, Preprocessing, replaced
from tif_jax.tasks import CLASSIFICATION, DEPTH

_ELSE = "none: what the weights of backbone.init_from say, else"
DIVISIBLE = ("image_folder", "image_pairs", "image_table")  # kinds whose labels are known before an image is read
KNOWN = ("digits", "image_folder", "image_pairs", "image_table", "tfds")


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Keys of `data`. Sizes are (rows, columns) in pixels."""

    name: str = key("digits", "what kind of data set is read", choices=KNOWN)
    root: str = key(
        "", "image_folder, image_pairs: holds the split folders; image_table: the CSV files; tfds: TFDS's data_dir"
    )
    tfds_name: str = key("", "tfds only: 'name', 'name/config' or 'name/config:version'")
    train_split: str = key(
        "train",
        "a folder's name ('.': the class folders lie in root; 'auto': train, or '.'), a CSV file's name, or a split of TFDS, "
        "also 'train[:90%]'",
    )
    test_split: str = key(
        "test",
        "where the test images are, as train_split says where the training images are; 'auto': the folder test or val, or "
        "what train_split names",
    )
    test_fraction: float = key(
        0.0,
        "image_folder, image_pairs, image_table: share of each class's images that is kept for the test where both splits "
        "are the same; 0: all are trained and tested on",
        least=0,
        below=1,
    )
    num_train: int = key(
        0,
        "how many training images at most, evenly spaced; 0: all. digits: how many canvases, at least 1",
        least=0,
        below=2**31,
    )
    num_test: int = key(
        0,
        "how many test images at most, evenly spaced; 0: all. digits: how many canvases, at least 1",
        least=0,
        below=2**31,
    )
    num_validation: int = key(
        0,
        "how many training images, evenly spaced, are kept out of training to choose models on; 0: none",
        least=0,
        below=2**31,
    )
    class_index: dict[str, int] | None = key(
        None,
        "class -> output of the head; a class is a folder, a label of a table, a label (name or number) of TFDS, or a number "
        "of a label map",
    )
    label_map: str = key(
        "", "tfds only: which feature is the label map, as depth of nyu_depth_v2; '': images have a class each"
    )
    label_folder: str = key("depth", "image_pairs only: the folder beside image/ that holds the label maps")
    label_kind: str = key(
        DEPTH.name, "label maps only: what they say of a pixel, its depth or its class", choices=KINDS
    )
    label_scale: float | None = key(
        None,
        "depth only: metres per unit of a label map; none: 1, which holds for floating-point numbers",
        above=0,
        advice="in metres per unit: 0.001 where units are millimetres",
    )
    num_classes: int = key(
        0,
        "segmentation only: classes that label maps have, numbered from 0; 0: as class_index or TFDS says, else the model",
        least=0,
        most=MAX_CLASSES,
    )
    image_size: int | tuple[int, int] = key(
        224, "pixels of an image: (rows, columns), or one number for both", least=1, most=2**14
    )
    crop_fraction: float | None = key(
        None, f"share of the resized image that the evaluation view shows; {_ELSE} 0.875", above=0, most=1
    )
    mean: tuple[float, float, float] | None = key(
        None, f"subtracted from each channel, whose values are in [0, 1]; {_ELSE} ImageNet's", least=0, **FRACTIONS
    )
    std: tuple[float, float, float] | None = key(
        None, f"each channel is divided by it after that; {_ELSE} ImageNet's", above=0, **FRACTIONS
    )
    interpolation: str | None = key(None, f"how an image is resized; {_ELSE} bicubic", choices=(None, *INTERPOLATIONS))
    augment: str = key(
        "none",
        "crop_flip: training sees random crops, half of them mirrored; crops are nearly whole where there are label maps",
        choices=("none", "crop_flip"),
    )
    on_error: str = key(
        "raise", "what an unreadable image does: end the run, or be left out and logged", choices=("raise", "skip")
    )
    num_workers: int = key(4, "threads that read images, about one per core; 0: only the caller", least=0, most=1024)
    worker_processes: int = key(
        0, "processes of so many threads each, where one process's threads wait for each other", least=0, most=256
    )
    seed: int = key(0, "seed of the canvases of digits, and of what test_fraction keeps", least=0, below=2**32)

    def __post_init__(self):
        checked.check(self)

    @property
    def size(self) -> tuple[int, int]:
        """image_size as (rows, columns)."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def task(self) -> str:
        """What is learned from such labels: 'classification' of images, 'depth' or 'segmentation' of pixels."""
        has_maps = self.name == "image_pairs" or (self.name == "tfds" and bool(self.label_map))
        return self.label_kind if has_maps else CLASSIFICATION.name

    @cached_property
    def label_maps(self) -> LabelMaps | None:
        """What label maps say; None where images have a class each. InputError for what does not fit together."""
        if self.task == CLASSIFICATION.name:
            return None
        return LabelMaps(self.label_kind, self.label_scale, self.class_index, self.num_classes)

    @property
    def makes_split(self) -> bool:
        """Whether training and test images are divided here (`data.split`)."""
        return self.test_fraction > 0 and self.train_split == self.test_split and self.name in DIVISIBLE

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """With the default for what is None here."""
        return replaced(Preprocessing(), {part: getattr(self, part) for part in PARTS})


Settings: TypeAlias = Mapping[str, Any] | ConfigDict | DataOptions


def read_options(data: Settings) -> DataOptions:
    """The options of these settings, defaults filled in. InputError on what is unknown or not allowed."""
    return data if isinstance(data, DataOptions) else checked.read(DataOptions, data, "data")
