"""The `data` section of a config."""

import dataclasses
import difflib
from typing import Any, Protocol, runtime_checkable

from tif_jax.data.preprocess import IMAGENET_MEAN, IMAGENET_STD, check_view
from tif_jax.errors import InputError


@runtime_checkable
class Settings(Protocol):
    """Plain values by name: a dict or a ConfigDict."""

    def keys(self) -> Any: ...

    def __getitem__(self, key: str, /) -> Any: ...


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """The keys of `data` and what they are where a config leaves them out."""

    name: str = ""  # digits | image_folder | image_table | tfds
    root: str = ""  # image_folder: holds the split folders; image_table: holds the CSV files; tfds: TFDS's data_dir
    tfds_name: str = ""  # tfds only: 'name', 'name/config' or 'name/config:version'
    train_split: str = "train"  # a folder's name; a CSV file's name; a split of TFDS, also 'train[:90%]'
    test_split: str = "test"
    num_train: int = 0  # at most so many images, evenly spaced; 0: all. digits: so many canvases
    num_test: int = 0
    class_index: Settings | None = None  # image_folder only: folder name -> output of the head
    image_size: int | tuple[int, int] = 224  # (Y, X), or both
    crop_fraction: float = 0.875  # share of the resized image that the evaluation view shows, in (0, 1]
    mean: tuple[float, float, float] = IMAGENET_MEAN  # per channel, of values in [0, 1]
    std: tuple[float, float, float] = IMAGENET_STD
    augment: str = "none"  # none: training sees the evaluation view; crop_flip: random crops, mirrored half of the time
    on_error: str = "raise"  # an unreadable image ends the run (raise) or is counted, logged and left out (skip)
    num_workers: int = 4  # threads that read and preprocess, about one per core; 0: only the caller
    worker_processes: int = 0  # of so many threads each, where one process's threads wait for each other; 0: none
    seed: int = 0  # digits only: of the generator of canvases

    @property
    def size(self) -> tuple[int, int]:
        """image_size as (Y, X)."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size


def read_options(data: Settings) -> DataOptions:
    """The options of a config's `data`, defaults filled in. InputError on the first that is unknown or not allowed."""
    options: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(DataOptions)}
    for key in data.keys():
        if key not in options:
            near = difflib.get_close_matches(key, options, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise InputError(f"unknown key data.{key}; {hint}known: {', '.join(options)}")
        kind = type(options[key])
        if kind in (str, int) and key != "image_size" and type(data[key]) is not kind:
            raise InputError(f"data.{key} is {data[key]!r}; it must be of type {kind.__name__}")
        options[key] = tuple(data[key]) if isinstance(data[key], list) else data[key]
    for key, allowed in {"augment": ("none", "crop_flip"), "on_error": ("raise", "skip")}.items():
        if options[key] not in allowed:
            raise InputError(f"data.{key} is {options[key]!r}; allowed: {', '.join(map(repr, allowed))}")
    for key in "num_train", "num_test", "num_workers", "worker_processes", "seed":
        if options[key] < 0:
            raise InputError(f"data.{key} is {options[key]}; it must be at least 0")
    check_view(*(options[key] for key in ("image_size", "crop_fraction", "mean", "std")))
    return DataOptions(**options)
