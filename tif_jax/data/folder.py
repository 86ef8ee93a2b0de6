"""Labelled image files on disk."""

import csv
import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from tif_jax.data.classes import MAX_CLASSES, ClassIndex, names_by_output, outputs
from tif_jax.data.pictures import read_image
from tif_jax.data.source import Example
from tif_jax.errors import InputError
from tif_jax.runtime import once, records

logger = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")

_MOST_TOLD = 8  # kinds of files
_NO_PICTURES = ("thumbs.db", "desktop.ini")  # that systems leave in folders


class ImageFiles:
    """Image files with labels. The id of an example is its path relative to `root`, by `as_id`."""

    def __init__(self, root: Path, files: Sequence[str], labels: Sequence[int], class_names: Sequence[str]):
        self.root = root
        self.num_classes = len(class_names)
        self.class_names = tuple(class_names)
        self._files = files
        self._labels = labels

    @property
    def files(self) -> Sequence[str]:
        """Paths relative to `root`."""
        return self._files

    @property
    def ids(self) -> list[str]:
        return [as_id(file) for file in self._files]

    @property
    def labels(self) -> Sequence[int]:
        return self._labels

    @property
    def fingerprint(self) -> str:
        return records.digest([self.ids, list(self._labels)])

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Example:
        file = self._files[index]
        return Example(id=as_id(file), image=read_image(self.root / file), label=self._labels[index])


class ImageFolder(ImageFiles):
    """`root/split/class/image`, sorted as text by class folder, then by file name; '.' is the split of `root/class/image`.

    Images in folders below a class folder are of that class, too; links to such folders are not followed.

    A label is the position of its folder among the class folders of all splits (as TFDS's ImageFolder counts), or
    `class_index[folder]` where the classification head was trained with other numbers; extra entries are ignored. The
    folders are sorted as text, or by size where all their names are whole numbers.
    """

    def __init__(self, root: str | os.PathLike, split: str, class_index: ClassIndex | None = None):
        root = Path(root)
        splits = [] if split == "." else _splits(root, split)
        classes = _folders(_folder(root) / split)
        if not classes:
            raise InputError(f"{root / split} has no class folders; images go into {root / split}/CLASS/")
        outside = sum(map(_is_image, os.listdir(root / split)))
        passed_over = Counter({"images outside of the class folders": outside}) if outside else Counter()
        images = {name: sorted(_images(root / split / name, passed_over)) for name in classes}
        if passed_over:
            found = ", ".join(f"{count} {kind}" for kind, count in sorted(passed_over.most_common(_MOST_TOLD)))
            found += f" and {len(passed_over) - _MOST_TOLD} other kinds" if len(passed_over) > _MOST_TOLD else ""
            once.warn(logger, f"{root / split}: passed over {found}; images are {' '.join(EXTENSIONS)}")
        if empty := [name for name in classes if not images[name]]:
            raise InputError(
                f"no images in {root / split / empty[0]}; put images ({' '.join(EXTENSIONS)}) into it or remove it"
            )
        _warn_of_case(root / split, classes)
        others = {name for other in splits if other != split for name in class_folders(root, other)}
        if class_index is not None:
            others.intersection_update(class_index)
        label = outputs({*classes, *others}, class_index)
        files = [(os.path.normpath(f"{split}/{name}/{file}"), label[name]) for name in classes for file in images[name]]
        super().__init__(root, [file for file, _ in files], [index for _, index in files], names_by_output(label))


class ImageTable(ImageFiles):
    """A CSV file with columns `file` (path relative to the CSV) and `label`; other columns are ignored.

    A label is a whole number from 0, or what `class_index` has an entry for.
    """

    def __init__(self, csv_path: str | os.PathLike, class_index: ClassIndex | None = None):
        path = Path(csv_path)
        rows = _rows(path)
        for line, file, _ in rows:
            if not file or not _is_file(path.parent / file):
                raise InputError(f"{path} line {line}: no such image file: {file!r:.200}, looked for in {path.parent}")
        files = [file for _, file, _ in rows]
        if again := [file for file, count in Counter(files).items() if count > 1]:
            once.warn(logger, f"{path} lists {len(again)} files more than once, the first: {again[0]}")
        if class_index is None:
            label = _numbers(path, rows)
            names = names_by_output({str(number): number for number in label.values()})
        else:
            label = outputs({text for _, _, text in rows}, class_index, what="label")
            names = names_by_output(label)
        super().__init__(path.parent, files, [label[text] for _, _, text in rows], names)


def class_folders(root: str | os.PathLike, split: str) -> list[str]:
    """Names of the folders of a split that hold images."""
    return [name for name in _folders(Path(root, split)) if any(True for _ in _images(Path(root, split, name)))]


def has_images(folder: str | os.PathLike) -> bool:
    """Whether images lie in the folder itself."""
    return any(map(_is_image, os.listdir(folder)))


def split_folders(root: str | os.PathLike) -> list[str]:
    """Names of the folders that a root holds. Raises InputError if there is no such root."""
    return _folders(_folder(Path(root)))


def table_labels(csv_path: str | os.PathLike) -> set[str]:
    """The labels that a table has, as they are written."""
    return {label for _, _, label in _rows(Path(csv_path))}


def image_files(folder: str, linked: bool = False) -> list[str]:
    """Paths of the images in a folder and in those below it, sorted as text; what is hidden is passed over.

    linked: also of the folders that links right below the folder lead to, out of it, as classes may be links. Raises
    InputError if there are none, or a folder can not be read.
    """
    found = [os.path.join(folder, name) for name in _images(Path(folder))]
    whole = Path(folder).resolve()
    for path in [Path(folder, name) for name in _folders(Path(folder))] if linked else []:
        target = path.resolve()
        if path.is_symlink() and not (target.is_relative_to(whole) or whole.is_relative_to(target)):
            found += [os.path.join(folder, path.name, name) for name in _images(path)]
    if not found:
        raise InputError(f"no images in {as_id(folder)} or below; images are {' '.join(EXTENSIONS)}")
    return sorted(found)


def as_id(file: str) -> str:
    r"""A file name as text that every file format can hold, and that no other name has.

    Backslashes are doubled, and bytes that are not UTF-8 become \xHH.
    """
    doubled = file.replace("\\", "\\\\") if os.sep == "/" else file
    return doubled.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _folder(root: Path) -> Path:
    if not root.is_dir():
        seen_from = "" if root.is_absolute() else f", seen from {Path.cwd()}"
        raise InputError(f"data.root {root} is not a folder{seen_from}; it must hold root/split/class/image.jpg")
    return root


def _splits(root: Path, split: str) -> list[str]:
    """The folders of a root, of which `split` must be one."""
    splits = split_folders(root)
    if split not in splits:
        raise InputError(f"{root} has no split folder {split!r}; it has: {', '.join(splits) or 'no folders'}")
    return splits


def _folders(folder: Path) -> list[str]:
    return sorted(x.name for x in os.scandir(folder) if x.is_dir() and not x.name.startswith("."))


def _images(folder: Path, passed_over: Counter[str] | None = None) -> Iterator[str]:
    """Paths of the images in a folder and below it, as seen from it. passed_over: counts what else is there, by suffix."""
    for at, folders, names in os.walk(folder, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = os.path.relpath(at, folder)
        for name in names:
            if _is_image(name):
                yield name if below == "." else os.path.join(below, name)
            elif passed_over is not None and not name.startswith(".") and name.lower() not in _NO_PICTURES:
                passed_over[os.path.splitext(name.lower())[1] or "files without a suffix"] += 1


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def _warn_of_case(folder: Path, classes: Sequence[str]) -> None:
    by_form: dict[str, str] = {}
    for name in classes:
        other = by_form.setdefault(unicodedata.normalize("NFKC", name).casefold(), name)
        if other != name:
            once.warn(
                logger, f"{folder}: {other!r} and {name!r} are two classes; put them into one folder if they are not"
            )


def _refuse(error: OSError) -> NoReturn:
    raise InputError(f"can not read {as_id(str(error.filename))}: {error.strerror}") from error


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _rows(path: Path) -> list[tuple[int, str, str]]:
    """Line number, file and label of each row of a table."""
    if not _is_file(path):
        raise InputError(f"no such file: {path}; it must be a CSV file with the columns file and label")
    rows = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as opened:
            table = csv.DictReader(opened)
            missing = [name for name in ("file", "label") if name not in (table.fieldnames or ())]
            if missing:
                found = " ".join(", ".join(table.fieldnames or ()).split())
                raise InputError(f"{path} has no column {missing[0]!r}; it has: {found:.200}")
            for row in table:
                if row["file"] is None or row["label"] is None:
                    raise InputError(f"{path} line {table.line_num}: label is None; the line has too few columns")
                rows.append((table.line_num, row["file"], row["label"].strip()))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is not a CSV file in UTF-8: {error}") from error
    except OSError as error:
        raise InputError(f"{path} can not be read: {error.strerror}") from error
    if not rows:
        raise InputError(f"{path} lists no images; give one row per image")
    return rows


def _numbers(path: Path, rows: Sequence[tuple[int, str, str]]) -> dict[str, int]:
    """The number that each label of a table is."""
    found: dict[str, int] = {}
    for line, _, label in rows:
        if label not in found:
            if not label.isdecimal() or len(label) > 9 or int(label) >= MAX_CLASSES:
                raise InputError(
                    f"{path} line {line}: label is {label!r:.40}; labels are whole numbers from 0 to {MAX_CLASSES - 1}, "
                    "or what data.class_index has an entry for"
                )
            found[label] = int(label)
    return found
