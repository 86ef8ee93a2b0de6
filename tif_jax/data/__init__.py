"""Data: from a config's `data` to a source of labelled images (and, in loader.py, to batches of them)."""

from pathlib import Path

import numpy as np

from tif_jax.data import remote
from tif_jax.data.options import DataOptions as DataOptions
from tif_jax.data.options import Settings
from tif_jax.data.options import read_options as read_options
from tif_jax.data.source import Source as Source
from tif_jax.data.source import Subset, evenly_spaced
from tif_jax.errors import InputError

SPLITS = ("train", "validation", "test")


def open_source(data: Settings, split: str) -> Source:
    """The examples of a split of the data set that `data`, options or settings of them, describes.

    'train' and 'test' are what data.train_split and data.test_split name. data.num_validation examples of the first are
    kept out of 'train' and are 'validation'. InputError, naming file or key, for what is missing or malformed.
    """
    options = read_options(data)
    if split not in SPLITS:
        raise InputError(
            f"unknown split {split!r}; 'train' or 'test', which data.train_split and data.test_split name, "
            "or 'validation'"
        )
    if options.class_index is not None and options.name == "digits":
        raise InputError("data.class_index renumbers the classes of files; data.name is 'digits'")
    if split == "test":
        return _open_split(options, split, options.test_split, options.num_test)
    source = _open_split(options, "train", options.train_split, options.num_train)
    if not options.num_validation and split == "train":
        return source
    if not 0 < options.num_validation < len(source):
        raise InputError(
            f"data.num_validation is {options.num_validation} of {len(source)} training images; some have to be kept, "
            "and some have to stay to train on"
        )
    kept = evenly_spaced(options.num_validation, len(source))
    return Subset(source, kept if split == "validation" else np.setdiff1d(np.arange(len(source)), kept))


def classes_of(kind: str, root: str, split: str) -> frozenset[str] | None:
    """Names of the classes of which a split holds images; None if that is not known without reading them.

    kind: `data.name`; split: the data set's name for it.
    """
    if kind == "image_folder":
        from tif_jax.data.folder import class_folders

        return frozenset(class_folders(root, split))
    if kind == "image_table":
        from tif_jax.data.folder import table_labels

        return frozenset(table_labels(Path(root, split)))
    return None


def _open_split(options: DataOptions, split: str, name: str, num_examples: int) -> Source:
    """All of a split, or num_examples of it; name: the data set's for it."""
    if options.name == "digits":
        return _open_digits(options, split, num_examples)
    if not options.root:
        raise InputError(f"data.root is empty; {options.name} needs the folder that holds the data")
    if options.name != "tfds" and remote.is_url(options.root):
        raise InputError(f"data.root {options.root}: {options.name} is read from local files; {remote.LOCALLY}")
    if options.name == "image_folder":
        from tif_jax.data.folder import ImageFolder

        source: Source = ImageFolder(options.root, name, options.class_index)
    elif options.name == "image_table":
        from tif_jax.data.folder import ImageTable

        source = ImageTable(Path(options.root, name), options.class_index)
    else:
        from tif_jax.data.tfds import Tfds

        source = Tfds(options.tfds_name, options.root, name, options.class_index)
    return Subset(source, evenly_spaced(num_examples, len(source))) if num_examples else source


def _open_digits(options: DataOptions, split: str, num_examples: int) -> Source:
    rows, columns = options.size
    if rows != columns:
        raise InputError(f"data.image_size is {options.image_size}; the canvas of digits is square")
    if not num_examples:
        raise InputError(f"data.num_{split} is 0; digits are generated, so say how many")
    from tif_jax.data.digits import Digits

    return Digits(split, num_examples, rows, options.seed)
