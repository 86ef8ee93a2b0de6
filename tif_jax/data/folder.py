"""Labelled image files on disk."""

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from tif_jax.data.pictures import read_image
from tif_jax.data.source import Example
from tif_jax.errors import InputError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")


class ImageFiles:
    """Image files with labels. The id of an example is its path relative to `root`."""

    def __init__(self, root: Path, files: Sequence[str], labels: Sequence[int], class_names: Sequence[str]):
        self.root = root
        self.num_classes = len(class_names)
        self.class_names = tuple(class_names)
        self._files = files
        self._labels = labels

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Example:
        file = self._files[index]
        return Example(id=file, image=read_image(self.root / file), label=self._labels[index])


class ImageFolder(ImageFiles):
    """`root/split/class/image`, sorted by class folder, then by file name.

    A label is the position of its folder among the class folders of all splits (as TFDS's ImageFolder counts), or
    `class_index[folder]` where the classification head was trained with other numbers; extra entries are ignored.
    """

    def __init__(self, root: str | os.PathLike, split: str, class_index: Mapping[str, int] | None = None):
        root = Path(root)
        if not root.is_dir():
            raise InputError(f"data.root {root} is not a folder; it must hold root/split/class/image.jpg")
        splits = _folders(root)
        if split not in splits:
            raise InputError(f"{root} has no split folder {split!r}; it has: {', '.join(splits) or 'no folders'}")
        classes = _folders(root / split)
        if not classes:
            raise InputError(f"{root / split} has no class folders; images go into {root / split}/CLASS/")
        images = {name: sorted(_images(root / split / name)) for name in classes}
        empty = [name for name in classes if not images[name]]
        if empty:
            raise InputError(
                f"no images in {root / split / empty[0]}; put images ({' '.join(EXTENSIONS)}) into it or remove it"
            )
        if class_index is None:
            found = {name for other in splits for name in _folders(root / other) if any(_images(root / other / name))}
            names = sorted(found)
            label = {name: names.index(name) for name in classes}
        else:
            label = {name: _index_of(name, class_index) for name in classes}
            names = [str(i) for i in range(1 + max(label.values()))]
            for name, index in label.items():
                names[index] = name
        files = [(f"{split}/{name}/{file}", label[name]) for name in classes for file in images[name]]
        super().__init__(root, [file for file, _ in files], [index for _, index in files], names)


class ImageTable(ImageFiles):
    """A CSV file with columns `file` (path relative to the CSV) and `label` (0-based); other columns are ignored."""

    def __init__(self, csv_path: str | os.PathLike):
        path = Path(csv_path)
        if not path.is_file():
            raise InputError(f"no such file: {path}; it must be a CSV file with the columns file and label")
        files, labels = [], []
        try:
            with path.open(newline="", encoding="utf-8-sig") as opened:
                table = csv.DictReader(opened)
                missing = [name for name in ("file", "label") if name not in (table.fieldnames or ())]
                if missing:
                    raise InputError(
                        f"{path} has no column {missing[0]!r}; it has: {', '.join(table.fieldnames or ())}"
                    )
                for row in table:
                    where = f"{path} line {table.line_num}"
                    if not (row["label"] or "").strip().isdecimal():
                        raise InputError(f"{where}: label is {row['label']!r}; labels are whole numbers from 0")
                    if not row["file"] or not (path.parent / row["file"]).is_file():
                        raise InputError(f"{where}: no such image file: {row['file']!r}, looked for in {path.parent}")
                    files.append(row["file"])
                    labels.append(int(row["label"]))
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{path} is not a CSV file in UTF-8: {error}") from error
        if not files:
            raise InputError(f"{path} lists no images; give one row per image")
        super().__init__(path.parent, files, labels, [str(i) for i in range(1 + max(labels))])


def _folders(folder: Path) -> list[str]:
    return sorted(x.name for x in os.scandir(folder) if x.is_dir() and not x.name.startswith("."))


def _images(folder: Path) -> list[str]:
    return [x.name for x in os.scandir(folder) if x.name.lower().endswith(EXTENSIONS) and not x.name.startswith(".")]


def _index_of(name: str, class_index: Mapping[str, int]) -> int:
    if name not in class_index:
        raise InputError(f"data.class_index has no entry for class folder {name!r}; add it, or remove the folder")
    index = class_index[name]
    if type(index) is not int or index < 0:
        raise InputError(f"data.class_index.{name} is {index!r}; it must be a whole number from 0")
    return index
