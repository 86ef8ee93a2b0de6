"""Data: from a config's `data` to a source of labelled images (and, in loader.py, to batches of them)."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np

from tif_jax.data import remote
from tif_jax.data.folder import ImageFolder, ImageTable, class_folders, table_labels
from tif_jax.data.options import DataOptions as DataOptions
from tif_jax.data.options import Settings
from tif_jax.data.options import read_options as read_options
from tif_jax.data.pairs import ImagePairs, found_pair_splits
from tif_jax.data.source import Source as Source
from tif_jax.data.source import Subset, evenly_spaced
from tif_jax.data.split import AUTO, TEST_NAMES, TRAIN_NAMES, found_splits, held_out
from tif_jax.errors import InputError

SPLITS = ("train", "validation", "test")


def open_source(data: Settings, split: str) -> Source:
    """The examples of a split of the data set that `data`, options or settings of them, describes.

    'train' and 'test' are what data.train_split and data.test_split name. data.num_validation examples of the first are
    kept out of 'train' and are 'validation'. Where both names are the same, data.test_fraction of each class is 'test' and
    the rest 'train'. InputError, naming file or key, for what is missing or malformed.
    """
    options = with_splits(read_options(data))
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


def with_splits(options: DataOptions) -> DataOptions:
    """With the names that 'auto' stands for in folders of images, and with the home folder for '~'."""
    options = dataclasses.replace(options, root=os.path.expanduser(options.root))
    if AUTO not in (options.train_split, options.test_split) or options.name not in ("image_folder", "image_pairs"):
        return options
    given = (_local_root(options), options.train_split, options.test_split)
    if options.name == "image_pairs":
        train, test = found_pair_splits(*given, (TRAIN_NAMES, TEST_NAMES))
    else:
        train, test = found_splits(*given)
    return dataclasses.replace(options, train_split=train, test_split=test)


def division(options: DataOptions) -> dict[str, list[str]]:
    """Ids of the images for training and for the test, where they are divided here; data.num_train and the like aside."""
    source, chosen = _divided(options)
    return {
        name: [id for id, is_test in zip(source.ids, chosen, strict=True) if is_test == (name == "test")]
        for name in ("train", "test")
    }


def _divided(options: DataOptions) -> tuple[Any, np.ndarray]:
    source: Any = _open_whole(options, options.train_split)
    return source, held_out(source.ids, source.labels, options.test_fraction, options.seed)


def classes_of(kind: str, root: str, split: str) -> frozenset[str] | None:
    """Names of the classes of which a split holds images; None if that is not known without reading them.

    kind: `data.name`; split: the data set's name for it.
    """
    if kind == "image_folder":
        return frozenset(class_folders(root, split))
    if kind == "image_table":
        return frozenset(table_labels(Path(root, split)))
    return None


def _open_split(options: DataOptions, split: str, name: str, num_examples: int) -> Source:
    """All of a split, or num_examples of it; name: the data set's for it."""
    if options.name == "digits":
        return _open_digits(options, split, num_examples)
    if options.makes_split:
        whole, chosen = _divided(options)
        source: Source = Subset(whole, np.flatnonzero(chosen == (split == "test")))
        if not len(source):
            raise InputError(
                f"data.test_fraction {options.test_fraction:g} leaves none of the {len(whole)} images in {whole.root} for "
                f"{split!r}; two of a class are needed at least"
            )
    else:
        source = _open_whole(options, name)
    return Subset(source, evenly_spaced(num_examples, len(source))) if num_examples else source


def _open_whole(options: DataOptions, name: str) -> Source:
    if options.name == "image_folder":
        return ImageFolder(_local_root(options), name, options.class_index)
    if options.name == "image_table":
        return ImageTable(Path(_local_root(options), name), options.class_index)
    if options.name == "image_pairs":
        assert options.label_maps is not None
        return ImagePairs(_local_root(options), name, options.label_folder, options.label_maps)
    from tif_jax.data.tfds import Tfds

    maps = (options.label_map, options.label_maps) if options.label_maps else None
    return Tfds(options.tfds_name, _root(options), name, options.class_index, maps)


def _root(options: DataOptions) -> str:
    if not options.root:
        raise InputError(f"data.root is empty; {options.name} needs the folder that holds the data")
    return options.root


def _local_root(options: DataOptions) -> str:
    if remote.is_url(options.root):
        raise InputError(f"data.root {options.root}: {options.name} is read from local files; {remote.LOCALLY}")
    return _root(options)


def _open_digits(options: DataOptions, split: str, num_examples: int) -> Source:
    rows, columns = options.size
    if rows != columns:
        raise InputError(f"data.image_size is {options.image_size}; the canvas of digits is square")
    if not num_examples:
        raise InputError(f"data.num_{split} is 0; digits are generated, so say how many")
    from tif_jax.data.digits import Digits

    return Digits(split, num_examples, rows, options.seed)
