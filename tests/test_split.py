"""Folders of one's own pictures: which splits they have, which is made, and what a run says when pictures come or go."""

import hashlib
import json
import logging
import os

import numpy as np
import pytest
from pictures import one_line, picture, settings

from tif_jax.data import open_source, read_options, with_splits
from tif_jax.data.split import held_out
from tif_jax.errors import InputError
from tif_jax.experiment import plan
from tif_jax.experiment.schema import Backbone, Experiment
from tif_jax.experiment.sources import check_splits


def write(root, **classes):
    """So many pictures in each folder; a folder below another is written a__b."""
    for name, count in classes.items():
        folder = root.joinpath(*name.split("__"))
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            picture(i, 8, 8).save(folder / f"{i}.JPG")
    return root


def found(root, train="auto", test="auto"):
    options = with_splits(read_options(settings(root, train_split=train, test_split=test)))
    return options.train_split, options.test_split


def opened(root, split, **options):
    options = dict(train_split="auto", test_split="auto", test_fraction=0.25) | options
    return open_source(settings(root, **options), split)


def ids(source):
    return [source[i]["id"] for i in range(len(source))]


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (dict(cat=1, dog=1), (".", ".")),
        (dict(train__cat=1, val__cat=1), ("train", "val")),
        (dict(train__cat=1, test__cat=1), ("train", "test")),
        (dict(train__cat=1, val__cat=1, test__cat=1), ("train", "test")),
        (dict(Train__cat=1, Validation__cat=1), ("Train", "Validation")),
        (dict(train__cat=1), ("train", "train")),
        (dict(train=1, bus=1), (".", ".")),  # trains and buses
        (dict(train__cat=1, notes=0, val__cat=1), ("train", "val")),
        (dict(cat__old=1, cat__new=1, dog=1), (".", ".")),
    ],
)
def test_which_splits_a_folder_has(tmp_path, folders, expected):
    assert found(write(tmp_path, **folders)) == expected


def test_a_split_that_is_named_stands(tmp_path):
    write(tmp_path, train__cat=1, val__cat=1, more__cat=1)
    assert found(tmp_path, train="more") == ("more", "val")
    assert found(tmp_path, test="more") == ("train", "more")
    assert found(tmp_path, train=".") == (".", ".")
    assert found(tmp_path, "train", "val") == ("train", "val")


@pytest.mark.parametrize("folders", [dict(train__2020=1, bus__2020=1), dict(val__cat=1), dict(train__cat=1, dog=1)])
def test_folders_that_can_be_read_in_two_ways(tmp_path, folders):
    with pytest.raises(
        InputError, match=r"say which are splits, as in data.train_split=train, or data.train_split=\. if"
    ):
        found(write(tmp_path, **folders))
    assert found(tmp_path, train=".") == (".", ".")


@pytest.mark.parametrize(
    "folders", [dict(train=2, val=1), dict(train=1, train__cat=1, test=1, test__cat=1), dict(train=1, val=1, cat=1)]
)
def test_flat_splits_are_not_taken_for_classes(tmp_path, folders):
    """Else a network would learn to tell training images from test images."""
    with pytest.raises(InputError, match=r"images right in train/ and in (val|test)/.* data.train_split=\. if these"):
        found(write(tmp_path, **folders))
    assert found(tmp_path, train=".") == (".", ".")


def test_every_class_gives_its_share_and_names_alone_decide():
    names = [
        f"{name}/{i}.jpg" for name, count in {"a": 20, "b": 10, "c": 3, "d": 2, "e": 1}.items() for i in range(count)
    ]
    labels = ["abcde".index(name[0]) for name in names]
    chosen = held_out(names, labels, 0.2, 7)
    assert {name: int(chosen[np.array(labels) == i].sum()) for i, name in enumerate("abcde")} == dict(
        a=4, b=2, c=1, d=1, e=0
    )

    def rank(name):
        return hashlib.sha256(f"7/{name}".encode()).hexdigest()

    expected = set()
    for letter, number in dict(a=4, b=2, c=1, d=1).items():
        expected.update(sorted((name for name in names if name[0] == letter), key=rank)[:number])
    assert {name for name, is_test in zip(names, chosen, strict=True) if is_test} == expected
    order = np.random.default_rng(0).permutation(len(names))
    shuffled = held_out([names[i] for i in order], [labels[i] for i in order], 0.2, 7)
    np.testing.assert_array_equal(shuffled, chosen[order])
    assert (held_out(names, labels, 0.2, 8) != chosen).any()
    more = held_out([*names, "a/new.jpg"], [*labels, 0], 0.2, 7)
    assert (more[:-1] != chosen).sum() <= 1


def test_the_parts_are_apart_and_have_all(tmp_path):
    write(tmp_path, cat=8, dog__2024=2, dog__2023=2, emu=1, train=4)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "cat" / ".hidden.jpg").write_bytes(b"")
    (tmp_path / "cat" / "notes.txt").write_text("")
    train, test = opened(tmp_path, "train"), opened(tmp_path, "test")
    assert train.class_names == test.class_names == ("cat", "dog", "emu", "train")
    assert len(ids(train)) + len(ids(test)) == 17 and not {*ids(train)} & {*ids(test)}
    assert sorted(name.partition("/")[0] for name in ids(test)) == ["cat", "cat", "dog", "train"]
    assert {"emu/0.JPG"} | {f"dog/202{year}/{i}.JPG" for year in (3, 4) for i in (0, 1)} < {*ids(train), *ids(test)}
    assert len(opened(tmp_path, "train", num_validation=4)) == len(train) - 4
    whole = opened(tmp_path, "train", test_fraction=0.0)
    assert ids(whole) == sorted({*ids(train), *ids(test)})


def test_links_are_followed_to_classes_and_pictures_and_not_in_circles(tmp_path):
    write(tmp_path / "elsewhere", cats=4, one=1)
    root = write(tmp_path / "mine", dog=4)
    (root / "cat").symlink_to(tmp_path / "elsewhere" / "cats")
    (root / "dog" / "linked.jpeg").symlink_to(tmp_path / "elsewhere" / "one" / "0.JPG")
    (root / "dog" / "again").symlink_to(root)
    source = opened(root, "train", test_fraction=0.0)
    assert len(source) == 9 and source.class_names == ("cat", "dog")
    assert source[7]["id"] == "dog/3.JPG" and source[8]["id"] == "dog/linked.jpeg"


def test_names_that_nearly_collide_are_told(tmp_path, caplog):
    opened(write(tmp_path, Cat=2, cat=2, dog=2), "train")
    if len(os.listdir(tmp_path)) == 3:  # not where the disk takes both for one
        assert "'Cat' and 'cat' are two classes; put them into one folder if they are not" in caplog.text


def test_single_pictures_leave_nothing_for_the_test(tmp_path):
    with pytest.raises(
        InputError, match=r"test_fraction 0.25 leaves none of the 2 images in .* for 'test'; two of a class"
    ):
        opened(write(tmp_path, cat=1, dog=1), "test")


def experiment(root, **options):
    options = dict(train_split=".", test_split=".", test_fraction=0.25) | options
    return Experiment(data=read_options(settings(root, **options)), backbone=Backbone(head="fresh"))


def test_the_division_is_written_down_and_held_against_the_folder(tmp_path, caplog):
    root, workdir = write(tmp_path / "mine", cat=4, dog=8), tmp_path / "run"
    with caplog.at_level(logging.INFO):
        check_splits(experiment(root), workdir)
    assert "9 images for training, 3 for the test" in caplog.text
    noted = json.loads((workdir / "split.json").read_text())
    assert noted["test"] == ids(opened(root, "test")) and noted["train"] == ids(opened(root, "train"))
    check_splits(experiment(root, num_train=4), workdir)  # the division is the same
    (root / "cat" / "0.JPG").unlink()
    write(root, dog=10)
    with pytest.raises(
        InputError,
        match=r"mine has 2 images more \(the first: dog/8.JPG\) and 1 images fewer \(the first: cat/0.JPG\) than when .*run "
        "was begun.* put them back as they were, or choose another --workdir",
    ) as error:
        check_splits(experiment(root), workdir)
    assert one_line(error)
    check_splits(experiment(root), tmp_path / "other")
    with pytest.raises(InputError, match=r"run was made with test_fraction 0.25, not 0.5; choose another --workdir"):
        check_splits(experiment(root, test_fraction=0.5), workdir)
    (workdir / "split.json").write_text(json.dumps(noted).replace("cat/0", "cat/9"))
    with pytest.raises(InputError, match=r"split.json is damaged"):
        check_splits(experiment(root), workdir)


def test_testing_on_the_training_images_is_told(tmp_path, caplog):
    root = write(tmp_path / "mine", cat=4, dog=8)
    check_splits(experiment(root), tmp_path / "run")
    assert "are the training images" not in caplog.text
    check_splits(experiment(root, test_fraction=0.0), tmp_path / "run")
    assert "test images are the training images, those of '.'" in caplog.text and "data.test_fraction" in caplog.text


def test_of_a_refused_run_that_began_nothing_nothing_is_left(tmp_path):
    """Else another test_fraction would be refused, of a folder that holds nothing else."""
    root, workdir = write(tmp_path / "mine", cat=4, dog=8), tmp_path / "run"
    for fraction in (0.25, 0.5):
        with pytest.raises(InputError, match="a mistake"), plan.kept(workdir):
            check_splits(experiment(root, test_fraction=fraction), workdir)
            raise InputError("a mistake")
        assert not list(workdir.iterdir())
    (workdir / "backbone").mkdir()
    with pytest.raises(InputError, match="a mistake"), plan.kept(workdir):
        check_splits(experiment(root), workdir)
        raise InputError("a mistake")
    assert (workdir / "split.json").exists()


def test_a_folder_with_splits_of_its_own_gets_no_note(tmp_path):
    write(tmp_path / "mine", train__cat=1, train__dog=1, val__dog=1)
    check_splits(experiment(tmp_path / "mine", train_split="train", test_split="val"), tmp_path)
    assert not (tmp_path / "split.json").exists()


def test_one_class_is_refused(tmp_path):
    with pytest.raises(
        InputError, match=r"mine has one class alone, 'cat'.*data.root is the folder that holds a folder for"
    ):
        check_splits(experiment(write(tmp_path / "mine", cat=4)), tmp_path)
