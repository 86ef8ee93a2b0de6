"""Images of folders, with labels where somebody says them: a table, or the folders that they lie in."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from tif_jax.data.classes import ClassIndex, in_order
from tif_jax.data.folder import ImageFiles, ImageTable, as_id, image_files
from tif_jax.errors import InputError

logger = logging.getLogger(__name__)

BY_FOLDER = "folders"  # in place of a table
NO_LABEL = -1


def open_listed(
    folders: Sequence[str], labels: str | None, num_classes: int, class_index: ClassIndex | None
) -> ImageFiles:
    """The images in these folders and below, sorted; ids are paths relative to the folder, of several to what they share.

    labels: None; a CSV file (`ImageTable`), and images that it does not list are left out; or 'folders': an image in FOLDER/X
    or below is of class X. class_index: class -> output of the head; None: labels of a table are outputs, and folders are, in
    order, if there are as many as the head has outputs. Raises InputError for what is missing or no output of the head.
    """
    if missing := [folder for folder in folders if not os.path.isdir(folder)]:
        raise InputError(f"{as_id(missing[0])} is not a folder; --images takes folders of images")
    found: dict[str, tuple[str, str]] = {}  # by its real path: the folder, and the path in it, which may have links
    for folder in folders:
        for path in image_files(folder, linked=True):
            found.setdefault(os.path.realpath(path), (folder, path))
    root = os.path.commonpath([os.path.abspath(folder) for folder in folders])
    if labels == BY_FOLDER:
        of_path = _by_folder(found, num_classes, class_index)
    elif labels is not None:
        of_path = _by_table(found, labels, class_index)
    else:
        of_path = dict.fromkeys(found, NO_LABEL)
    if beyond := {path: label for path, label in of_path.items() if label >= num_classes}:
        path, label = next(iter(beyond.items()))
        raise InputError(f"{as_id(found[path][1])} has label {label}; the model has classes 0..{num_classes - 1}")
    files = [os.path.relpath(found[path][1], root) for path in of_path]
    return ImageFiles(Path(root), files, list(of_path.values()), [""] * num_classes)


def _by_table(found: dict[str, tuple[str, str]], labels: str, class_index: ClassIndex | None) -> dict[str, int]:
    table = ImageTable(labels, class_index)
    of_file = {os.path.realpath(table.root / f): label for f, label in zip(table.files, table.labels, strict=True)}
    kept = {path: of_file[path] for path in found if path in of_file}
    if not kept:
        folders = ", ".join(dict.fromkeys(folder for folder, _ in found.values()))
        raise InputError(f"{labels} lists none of the images in {folders}; paths are relative to it")
    if left := len(found) - len(kept):
        logger.warning("%s lists %d of %d images: the other %d are left out", labels, len(kept), len(found), left)
    return kept


def _by_folder(found: dict[str, tuple[str, str]], num_classes: int, class_index: ClassIndex | None) -> dict[str, int]:
    names = {}
    for path, (folder, seen) in found.items():
        inside = os.path.relpath(seen, folder)
        if os.sep not in inside:
            raise InputError(
                f"{as_id(seen)} lies in no class folder; with --labels folders images lie in FOLDER/CLASS/"
            )
        names[path] = inside.split(os.sep)[0]
    classes = sorted({*names.values()})
    if class_index and not {*classes} <= {*class_index}:
        unknown = min({*classes} - {*class_index})
        raise InputError(
            f"folder {unknown!r} is none of the {len(class_index)} known classes: say which in --class-index"
        )
    if not class_index and len(classes) != num_classes:
        raise InputError(
            f"{len(classes)} class folders, and the model has {num_classes} classes without names: say which folder is which "
            "output in --class-index"
        )
    index = class_index or {name: i for i, name in enumerate(in_order(classes))}
    return {path: index[name] for path, name in names.items()}
