"""Sources: folders and tables, the options that choose them, and what bad input is answered with."""

import math
import os
import random
import re

import ml_collections
import numpy as np
import pytest
from pictures import Numbers, one_line, picture, settings, write_folders, write_table
from PIL import Image
from small_shards import manifest

from tif_jax.data import open_source
from tif_jax.data.folder import ImageFolder, ImageTable
from tif_jax.data.options import read_options
from tif_jax.data.source import Subset, evenly_spaced
from tif_jax.errors import InputError
from tif_jax.impact.manifest import open_manifest
from tif_jax.impact.shards import read_impact, write_part


@pytest.fixture
def folder(tmp_path):
    return write_folders(tmp_path)


def test_image_folder_is_sorted_and_numbers_the_classes_of_all_splits(folder):
    (folder / "train" / "ant" / "notes.txt").write_text("not an image")
    (folder / "train" / ".cache").mkdir()
    (folder / "annotations" / "boxes").mkdir(parents=True)  # no images in it: not a class
    train, val = ImageFolder(folder, "train"), ImageFolder(folder, "val")
    assert train.class_names == val.class_names == ("ant", "bee", "cat") and val.num_classes == 3
    examples = [train[i] for i in range(len(train))]
    assert [x["id"] for x in examples] == sorted(x["id"] for x in examples)
    assert examples[0]["id"] == "train/ant/0.JPG" and examples[0]["image"].size == (32, 24)
    assert [x["label"] for x in examples] == [0] * 4 + [1] * 2 + [2] * 5
    assert [val[i]["label"] for i in range(4)] == [1, 1, 1, 2]  # val has no ants, and its labels still agree


def test_image_folder_with_the_numbers_of_a_head(folder):
    class_index = ml_collections.ConfigDict({"ant": 7, "cat": 0, "bee": 3, "cow": 900})
    source = open_source(settings(folder, class_index=class_index), "train")
    assert source.num_classes == 8 and len(source.class_names) == 8
    assert (source.class_names[7], source.class_names[0], source.class_names[5]) == ("ant", "cat", "")
    assert [source[i]["label"] for i in range(11)] == [7] * 4 + [3] * 2 + [0] * 5
    for wrong, message in {"7": "class_index.bee", None: "class_index.bee", -1: "class_index.bee"}.items():
        with pytest.raises(InputError, match=message):
            ImageFolder(folder, "train", {"ant": 7, "cat": 0, "bee": wrong})
    with pytest.raises(InputError, match="no entry for class folder 'bee'"):
        ImageFolder(folder, "train", {"ant": 7, "cat": 0})


def test_bad_folders(folder):
    with pytest.raises(InputError, match="is not a folder"):
        ImageFolder(folder / "nowhere", "train")
    with pytest.raises(InputError, match=r"no split folder 'test'; it has: train, val"):
        ImageFolder(folder, "test")
    (folder / "empty").mkdir()
    with pytest.raises(InputError, match="no class folders"):
        ImageFolder(folder, "empty")
    (folder / "train" / "dog").mkdir()
    (folder / "train" / "dog" / "notes.txt").write_text("")
    with pytest.raises(InputError, match=r"no images in .*train/dog"):
        ImageFolder(folder, "train")


def test_image_table_reads_paths_relative_to_the_csv(folder):
    write_table(folder / "all.csv", [("train/cat/1.JPG", 4, "x"), ("val/bee/0.JPG", 1, "y, z")])
    for source in (
        ImageTable(folder / "all.csv"),
        open_source({"name": "image_table", "root": str(folder), "train_split": "all.csv"}, "train"),
    ):
        assert len(source) == 2 and source.num_classes == 5 and source.class_names == ("", "1", "", "", "4")
        example = source[0]
        assert (example["id"], example["label"]) == ("train/cat/1.JPG", 4)
        np.testing.assert_array_equal(example["image"], Image.open(folder / "train/cat/1.JPG"))


def test_bad_tables(folder):
    path, good = folder / "bad.csv", ("train/cat/1.JPG", 4, "")
    with pytest.raises(InputError, match=r"no such file: .*bad\.csv"):
        ImageTable(path)
    for label in "cat", "-1", "1.5", "":
        write_table(path, [good, ("train/cat/0.JPG", label, "")])
        with pytest.raises(InputError, match=rf"bad\.csv line 3: label is '{label}'"):
            ImageTable(path)
    for label in ("99999999", "9" * 5000):  # no string per class, and no limit of Python's
        write_table(path, [good, ("train/cat/0.JPG", label, "")])
        with pytest.raises(
            InputError, match=r"bad\.csv line 3: label is '9+.*; labels are whole numbers from 0 to 999999"
        ) as error:
            ImageTable(path)
        assert len(str(error.value)) < 300
    for name in ("a" * 300 + ".jpg", "a\0b.jpg", ""):
        write_table(path, [(name, 1, "")])
        with pytest.raises(InputError, match=r"bad\.csv( line 2: no such image file| is not a CSV file)"):
            ImageTable(path)
    write_table(path, [good, ("train/cat/9.JPG", 1, "")])
    with pytest.raises(InputError, match=r"bad\.csv line 3: no such image file: 'train/cat/9.JPG'"):
        ImageTable(path)
    write_table(path, [good], header=("path", "label", "author"))
    with pytest.raises(InputError, match="no column 'file'; it has: path, label, author"):
        ImageTable(path)
    for rows in [], [("train/cat/1.JPG",)]:
        write_table(path, rows)
        with pytest.raises(InputError, match=r"lists no images|line 2: label is None"):
            ImageTable(path)
    for content in "", "file\0,label\n", "file,label\n\xff\xfe":
        path.write_bytes(content.encode("latin-1"))
        with pytest.raises(InputError) as error:
            ImageTable(path)
        assert "bad.csv" in str(error.value) and one_line(error)


@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
def test_tables_as_other_programs_write_them(folder, bom, end, caplog):
    rows = ["file,label", 'train/cat/1.JPG, 4 ,"x, y"', "val/bee/0.JPG,007", "train/cat/1.JPG,4", ""]
    (folder / "all.csv").write_bytes((bom + end.join(rows)).encode())
    table = ImageTable(folder / "all.csv")
    assert [(x["id"], x["label"]) for x in (table[i] for i in range(3))] == [
        ("train/cat/1.JPG", 4), ("val/bee/0.JPG", 7), ("train/cat/1.JPG", 4)
    ]  # fmt: skip
    assert table.class_names == ("", "", "", "", "4", "", "", "7")
    assert "all.csv lists 1 files more than once, the first: train/cat/1.JPG" in caplog.text


@pytest.mark.parametrize("class_index", [None, {"0": 5, "1": 6, "2": 7}])
def test_damaged_tables_are_read_or_refused_in_a_line(tmp_path, class_index):
    whole = b'file,label,author\r\n0.png,0,"x, y"\r\n1.png,1,z\r\n2.png,2,\r\n'
    pieces = [b'"', b",", b"\n", b"\r", b"\0", b"\xff", b"9" * 30, b"file", b"label", b"-", b" ", "²٣".encode(), b"../"]
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"")
    found = {"read": 0, "refused": 0}
    for seed in range(300):
        rng, changed = random.Random(seed), bytearray(whole)
        for _ in range(rng.choice((1, 2, 5))):
            at = rng.randrange(len(changed) + 1)
            if rng.random() < 0.6:
                changed[at:at] = rng.choice(pieces)
            else:
                del changed[at : at + rng.randrange(1, 6)]
        (tmp_path / "all.csv").write_bytes(changed)
        try:
            ImageTable(tmp_path / "all.csv", class_index)
            found["read"] += 1
        except InputError as error:
            assert "\n" not in str(error) and len(str(error)) < 500
            found["refused"] += 1
    assert min(found.values()) > 30


def test_names_that_are_not_utf_8_have_ids_of_their_own(tmp_path):
    """They come through a part of impacts, and back to the file."""
    names = [b"caf\xe9.png", b"caf\\xe9.png", "café.png".encode(), b"\xff\xfe.png", b"a b\\.png"]
    folder = os.fsencode(tmp_path) + b"/train/caf\xe9"
    os.makedirs(folder)
    for i, name in enumerate(names):
        picture(i).save(tmp_path / "a.png")
        os.rename(tmp_path / "a.png", folder + b"/" + name)
    source = ImageFolder(tmp_path, "train")
    ids = [source[i]["id"] for i in range(len(names))]
    assert r"train/caf\xe9/caf\xe9.png" in ids and r"train/caf\xe9/caf\\xe9.png" in ids and len(set(ids)) == len(names)
    (tmp_path / "impact").mkdir()
    open_manifest(tmp_path / "impact", manifest(num_examples=5, num_images=5, views=1, num_parts=1, num_tokens=2))
    columns = {name: np.arange(5) for name in ("index", "label", "prediction")} | {"view": np.zeros(5, int), "id": ids}
    write_part(tmp_path / "impact", 1, 1, columns | {"loss": np.ones(5), "impact": np.ones((5, 2), np.float32)})
    read = read_impact(tmp_path).id.tolist()
    assert read == ids
    unescaped = [
        re.sub(rb"\\(\\|x(..))", lambda m: bytes.fromhex(m[2].decode()) if m[2] else b"\\", x.encode()) for x in read
    ]
    assert sorted(unescaped) == sorted(b"train/caf\xe9/" + name for name in names)


def test_subset_is_evenly_spaced():
    assert [Subset(Numbers(), evenly_spaced(4, 10))[i]["label"] for i in range(4)] == [0, 2, 5, 7]
    assert (
        len(Subset(Numbers(), evenly_spaced(99, 10))) == 10
        and Subset(Numbers(), evenly_spaced(99, 10))[9]["label"] == 9
    )
    with pytest.raises(IndexError):
        Subset(Numbers(), evenly_spaced(4, 10))[4]


def test_num_train_and_num_test_limit_the_images(folder):
    data = settings(folder, num_train=6, num_test=2)
    train, test = open_source(data, "train"), open_source(data, "test")
    assert [train[i]["label"] for i in range(6)] == [0, 0, 0, 1, 2, 2] and train.num_classes == 3
    assert [test[i]["id"] for i in range(len(test))] == ["val/bee/0.JPG", "val/bee/2.JPG"]


def test_options_come_from_a_config_dict(folder):
    data = ml_collections.ConfigDict(settings(folder, image_size=(16, 24), num_workers=0))
    assert read_options(data).size == (16, 24) and read_options(data).on_error == "raise"
    assert len(open_source(data, "train")) == 11


@pytest.mark.parametrize(
    "wrong, message",
    [
        (
            {"name": "image_foldr"},
            r"data.name is 'image_foldr'; allowed: 'digits', 'image_folder', 'image_pairs', 'image_table', 'tfds'",
        ),
        ({"crop_fracton": 0.9}, r"no key 'data.crop_fracton'; the nearest is 'data.crop_fraction'"),
        ({"on_error": "ignore"}, r"data.on_error is 'ignore'; allowed: 'raise', 'skip'"),
        ({"augment": "flip"}, r"data.augment is 'flip'; allowed"),
        ({"num_train": -1}, r"data.num_train is -1"),
        ({"num_workers": "four"}, r"data.num_workers is 'four'; it is a whole number"),
        ({"root": ""}, r"data.root is empty"),
        ({"root": None}, r"data.root is None"),
        ({"image_size": 0}, r"image_size is 0"),
        ({"image_size": (1, 2, 3)}, r"image_size is \(1, 2, 3\)"),
        ({"crop_fraction": 0.0}, r"crop_fraction is 0.0"),
        ({"std": (1.0, 1.0, 0.0)}, r"data.std is .* numbers or none, above 0"),
        ({"mean": (123.7, 116.3, 103.5)}, r"data.mean is .* at most 1; .* divide by 255"),
        ({"std": (58.4, 57.1, 57.4)}, r"data.std is .* at most 1; .* divide by 255"),
        ({"mean": (0.5, 0.5, math.nan)}, r"data.mean is .*nan"),
        ({"interpolation": "cubic"}, r"data.interpolation is 'cubic'; allowed: None, 'nearest', 'bilinear', 'bicubic'"),
        ({"name": "digits", "num_train": 9, "class_index": {"0": 1}}, r"data.class_index renumbers .* 'digits'"),
        ({"name": "digits"}, r"data.num_train is 0"),
        ({"name": "digits", "num_train": 9, "image_size": (32, 64)}, r"the canvas of digits is square"),
    ],
)
def test_bad_options(folder, wrong, message):
    with pytest.raises(InputError, match=message) as error:
        open_source(settings(folder) | wrong, "train")
    assert one_line(error)


def test_validation_images_are_training_images_that_training_does_not_see(folder):
    data = settings(folder, num_validation=4)
    every, train, validation = (
        [source[i]["id"] for i in range(len(source))]
        for source in (
            open_source(settings(folder), "train"), open_source(data, "train"), open_source(data, "validation")
        )
    )  # fmt: skip
    assert len(validation) == 4 and sorted(train + validation) == sorted(every) and train == sorted(train)
    assert [every.index(name) for name in validation] == [0, 2, 5, 8]  # of 11: evenly spaced
    for number, split in ((0, "validation"), (11, "train"), (11, "validation")):
        with pytest.raises(InputError, match=f"data.num_validation is {number} of 11 training images"):
            open_source(settings(folder, num_validation=number), split)


def test_bad_split(folder):
    with pytest.raises(InputError, match="'train' or 'test'"):
        open_source(settings(folder), "val")
