"""Image files with a label map each."""

import os
from collections.abc import Sequence
from pathlib import Path

from tif_jax.data.folder import as_id, image_files, split_folders
from tif_jax.data.label_maps import LabelMaps, read_numbers
from tif_jax.data.pictures import read_image
from tif_jax.data.source import Example, LabelMap
from tif_jax.errors import InputError
from tif_jax.runtime import records
from tif_jax.tasks import DEPTH

IMAGES = "image"  # the folder of a split that holds the images


class ImagePairs:
    """`root/split/image/NAME.jpg` (or another kind of image) with `root/split/label_folder/NAME.png`, sorted as text.

    Both may lie in folders below, the same in both; '.' is the split whose folders are `root/image` and so on. An
    example's id is the image's path below root. Raises InputError for an image without a label map or a label map without an
    image; reading one raises it for a pair of two sizes, and UnreadableImage for a file that can not be read.
    """

    def __init__(self, root: str | os.PathLike, split: str, label_folder: str, label_maps: LabelMaps):
        self.root = Path(root)
        self.num_classes = label_maps.num_outputs
        self.class_names = label_maps.class_names
        self._label_maps = label_maps
        self._label_folder = label_folder
        images, labels = self.root / split / IMAGES, self.root / split / label_folder
        _check_folders(self.root, split, label_folder)
        label_maps.check(int, os.fspath(labels))
        names = _below(images)
        self._files = [os.path.normpath(os.path.join(split, IMAGES, name)) for name in names]
        self._maps = _partners(images, names, labels)

    @property
    def ids(self) -> list[str]:
        return [as_id(file) for file in self._files]

    @property
    def labels(self) -> Sequence[int]:
        """-1 for every image: none is of a class."""
        return [-1] * len(self)

    @property
    def fingerprint(self) -> str:
        maps = self._label_maps
        meaning = (
            [maps.kind, maps.scale] if maps.kind == DEPTH.name else [maps.kind, maps.num_classes, maps.class_index]
        )
        return records.digest([self.ids, self._label_folder, meaning])

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Example:
        file, path = self._files[index], self._maps[index]
        name = as_id(os.fspath(path))
        numbers = read_numbers(path, name, self._label_maps.kind)
        label_map: LabelMap = self._label_maps.read(numbers, name)
        image = read_image(self.root / file)
        if (image.height, image.width) != label_map.shape:
            rows, columns = label_map.shape
            raise InputError(
                f"label map {name} has {rows} x {columns} pixels (rows x columns), and its image {image.height} x "
                f"{image.width}: give both the same size, or remove the pair"
            )
        return Example(id=as_id(file), image=image, label=-1, label_map=label_map)


def found_pair_splits(root: str, train: str, test: str, names: tuple[Sequence[str], Sequence[str]]) -> tuple[str, str]:
    """The split folders of a root where `train` or `test` is 'auto'; the same one twice where nothing is kept for a test.

    names: what the folders of training and of test images may be called; the first that is there is taken.
    """
    holding = {name.lower(): name for name in split_folders(root) if Path(root, name, IMAGES).is_dir()}
    if train == "auto":
        train = next((holding[name] for name in names[0] if name in holding), ".")
    if test == "auto":
        test = next((holding[name] for name in names[1] if name in holding and train != "."), train)
    return train, test


def _check_folders(root: Path, split: str, label_folder: str) -> None:
    splits = [name for name in split_folders(root) if (root / name / IMAGES).is_dir()]
    if not (root / split / IMAGES).is_dir():
        raise InputError(
            f"{root} has no split {split!r}, a folder with {IMAGES}/ in it; it has: {', '.join(splits) or 'none'}"
        )
    if not label_folder or os.path.normpath(label_folder) in (".", IMAGES):
        raise InputError(
            f"data.label_folder is {label_folder!r}; it is the folder beside {IMAGES}/ that holds the label maps"
        )
    if not (root / split / label_folder).is_dir():
        beside = sorted(x.name for x in (root / split).iterdir() if x.is_dir() and x.name != IMAGES)
        raise InputError(
            f"there is no folder {root / split / label_folder} with label maps: set data.label_folder; beside {IMAGES}/ "
            f"there are: {', '.join(beside) or 'no folders'}"
        )


def _below(folder: Path) -> list[str]:
    return [os.path.relpath(file, folder) for file in image_files(os.fspath(folder))]


def _partners(images: Path, names: Sequence[str], labels: Path) -> list[Path]:
    """The label map of each of the images with these names, in order."""
    maps = {os.path.splitext(name)[0]: name for name in _below(labels) if name.lower().endswith(".png")}
    named: dict[str, str] = {}
    for name in names:
        stem = os.path.splitext(name)[0]
        if stem not in maps:
            raise InputError(
                f"image {as_id(os.fspath(images / name))} has no label map {as_id(os.fspath(labels / stem))}.png; add it, or "
                "remove the image"
            )
        if stem in named:
            raise InputError(
                f"images {named[stem]} and {name} in {images} would have the same label map, {maps[stem]}; rename "
                "or remove one"
            )
        named[stem] = name
    if lonely := sorted(maps.keys() - named.keys()):
        raise InputError(
            f"label map {as_id(os.fspath(labels / maps[lonely[0]]))} has no image in {images}, nor have {len(lonely) - 1} "
            "others; add it, or remove the label map"
        )
    return [labels / maps[stem] for stem in named]
