"""Which images are for training and which for the test: the splits that a folder has, or one that is made."""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from tif_jax.data.folder import class_folders, has_images, split_folders
from tif_jax.errors import InputError

logger = logging.getLogger(__name__)

AUTO = "auto"  # data.train_split, data.test_split: what the folder has
WHOLE = "."  # a split whose class folders lie in data.root itself

TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing", "val", "validation", "valid")  # the first of them that is there


def found_splits(root: str, train: str, test: str) -> tuple[str, str]:
    """The split folders of a root where `train` or `test` is 'auto'; the same one twice where nothing is kept for a test.

    Those are train/ with class folders in it, and test/ or val/ beside it; else the class folders lie in the root itself.
    Raises InputError where that can be read in two ways.
    """
    folders = [] if AUTO not in (train, test) else split_folders(root)
    holding = {name.lower(): name for name in reversed(folders) if _holds_classes(Path(root, name))}
    tests = [holding[name] for name in TEST_NAMES if name in holding]
    if train == AUTO:
        train = next((holding[name] for name in TRAIN_NAMES if name in holding), WHOLE)
        _check_alone(root, train, tests, [name for name in folders if name not in (train, test, *tests)])
    if test != AUTO:
        return train, test
    if train == WHOLE or not tests:
        return train, train
    if len(tests) > 1:
        logger.info("%s: the test images are those of %s; %s is left alone", root, tests[0], ", ".join(tests[1:]))
    return train, tests[0]


def held_out(ids: Sequence[str], labels: Sequence[int], fraction: float, seed: int) -> Bool[np.ndarray, " E"]:
    """Which examples are for the test: `fraction` of each class, at least one and never all; of a single one, none.

    A class's are those whose id, with the seed, has the smallest sha256. So a division depends on names alone, and images
    that are added move few others.
    """
    members: dict[int, list[tuple[bytes, int]]] = {}
    for i, (id, label) in enumerate(zip(ids, labels, strict=True)):
        members.setdefault(label, []).append((hashlib.sha256(f"{seed}/{id}".encode()).digest(), i))
    chosen = np.zeros(len(ids), bool)
    for of_class in members.values():
        number = min(len(of_class) - 1, max(1, round(fraction * len(of_class))))
        chosen[[i for _, i in sorted(of_class)[:number]]] = True
    return chosen


def _holds_classes(folder: Path) -> bool:
    return not has_images(folder) and bool(class_folders(folder, WHOLE))


def _check_alone(root: str, train: str, tests: list[str], others: list[str]) -> None:
    """Raises InputError where folders that look like splits may be classes, or the other way round."""
    if train == WHOLE and not tests:
        flat = {name.lower(): name for name in others if has_images(Path(root, name))}
        both = [next((flat[name] for name in names if name in flat), "") for names in (TRAIN_NAMES, TEST_NAMES)]
        if all(both):
            raise InputError(
                f"{root} has images right in {both[0]}/ and in {both[1]}/, where a folder for each class is looked for: move "
                f"stray ones away, or say data.train_split={WHOLE} if these are two classes"
            )
        return
    classes = [name for name in others if has_images(Path(root, name)) or _holds_classes(Path(root, name))]
    if train == WHOLE or classes:
        beside = f"beside {', '.join(classes[:3])}" if classes else "and no train/"
        raise InputError(
            f"{root} has {(tests if train == WHOLE else [train])[0]}/ with folders of images in it {beside}: say which are "
            f"splits, as in data.train_split=train, or data.train_split={WHOLE} if all of them are classes"
        )
