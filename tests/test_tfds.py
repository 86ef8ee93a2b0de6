"""Data sets of TensorFlow Datasets as array_record: read without TensorFlow, and damage that is named."""

import json

import numpy as np
import pytest
from pictures import one_line, write_tfds

from tif_jax.data import open_source
from tif_jax.data.source import UnreadableImage
from tif_jax.data.tfds import Tfds
from tif_jax.errors import InputError


def test_tfds_round_trip(tmp_path):
    write_tfds(tmp_path)
    source = open_source({"name": "tfds", "root": str(tmp_path), "tfds_name": "tiny", "train_split": "train"}, "train")
    assert len(source) == 7 and source.num_classes == 2 and source.class_names == ("even", "odd")
    examples = [source[i] for i in range(7)]
    levels = [np.asarray(x["image"])[0, 0, 0] // 20 for x in examples]
    assert sorted(levels) == list(range(7)) and [x["label"] for x in examples] == [v % 2 for v in levels]
    assert examples[2]["id"] == "tiny-train.array_record-00000-of-00001__2" and examples[0]["image"].size == (6, 5)
    part = Tfds("tiny:1.0.0", tmp_path, "train[2:5]+test")
    assert [x["id"] for x in (part[i] for i in range(len(part)))] == [x["id"] for x in examples[2:5]] + [
        f"tiny-test.array_record-00000-of-00001__{i}" for i in range(3)
    ]


def test_tfds_without_labels(tmp_path):
    write_tfds(tmp_path, labelled=False)
    source = Tfds("", tmp_path / "tiny" / "1.0.0", "test")
    assert [source[i]["label"] for i in range(3)] == [-1, -1, -1] and source.num_classes == 0


def test_bad_tfds(tmp_path):
    for data_dir in tmp_path / "nowhere", tmp_path:
        with pytest.raises(InputError, match=r"is not a folder|no data set prepared"):
            Tfds("tiny", data_dir, "train")
    write_tfds(tmp_path)
    for split in "val", "train[7", "train[20:30]", "train[:0]":
        with pytest.raises(InputError, match=r"split 'val'; it has: train, test|no split|no examples") as error:
            Tfds("tiny", tmp_path, split)
        assert one_line(error)
    write_tfds(tmp_path, version="2.0.0")
    with pytest.raises(InputError, match=r"tiny/1\.0\.0, tiny/2\.0\.0"):
        Tfds("tiny", tmp_path, "train")
    assert len(Tfds("tiny:2.0.0", tmp_path, "train")) == 7
    folder = tmp_path / "tiny" / "2.0.0"
    (folder / "tiny-train.array_record-00000-of-00001").unlink()
    with pytest.raises(InputError, match=r"no such file: .*array_record-00000"):
        Tfds("tiny:2.0.0", tmp_path, "train")
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "riegeli"}))
    with pytest.raises(InputError, match=r"2\.0\.0 is prepared as riegeli.*file_format='array_record'"):
        Tfds("tiny:2.0.0", tmp_path, "train")


ODD = {  # where in dataset_info.json or features.json, and what stands there
    "no JSON": ("dataset_info.json", (), None),
    "a list": ("dataset_info.json", (), []),
    "splits are a number": ("dataset_info.json", ("splits",), 7),
    "a split is a text": ("dataset_info.json", ("splits", 0), "train"),
    "no name": ("dataset_info.json", ("splits", 0, "name"), None),
    "no lengths": ("dataset_info.json", ("splits", 0, "shardLengths"), "x"),
    "negative length": ("dataset_info.json", ("splits", 0, "shardLengths", 0), -1),
    "huge length": ("dataset_info.json", ("splits", 0, "shardLengths", 0), "99999999999"),
    "format": ("dataset_info.json", ("fileFormat",), 1.5),
    "keys": ("dataset_info.json", ("supervisedKeys",), {"tuple": {"items": [1]}}),
    "features are a list": ("features.json", (), [1]),
    "classes": ("features.json", ("featuresDict", "features", "label", "classLabel", "numClasses"), {}),
    "code": ("features.json", ("pythonClassName",), "payload.Feature"),
    "code inside": ("features.json", ("featuresDict", "features", "label", "pythonClassName"), "payload.Feature"),
}


@pytest.mark.parametrize("file, path, value", ODD.values(), ids=ODD)
def test_tfds_files_with_odd_entries(tmp_path, monkeypatch, file, path, value):
    write_tfds(tmp_path)
    (tmp_path / "payload.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    where = tmp_path / "tiny" / "1.0.0" / file
    content = {"": json.loads(where.read_text())}
    inside = content
    for key in ("", *path)[:-1]:
        inside = inside[key]
    inside[("", *path)[-1]] = value
    where.write_text("{" if value is None and not path else json.dumps(content[""]))
    with pytest.raises(InputError, match=r"1\.0\.0.*(is damaged|no examples|no split|can not hold)") as error:
        Tfds("tiny", tmp_path, "train")
    assert one_line(error)


def test_damaged_array_record(tmp_path):
    """A record that is damaged is an unreadable image, which on_error may leave out."""
    write_tfds(tmp_path)
    file = tmp_path / "tiny" / "1.0.0" / "tiny-train.array_record-00000-of-00001"
    content = file.read_bytes()
    at = content.index(b"IHDR")
    for damaged in (content[:at] + b"\xff" + content[at + 1 :], content[: len(content) // 2]):
        file.write_bytes(damaged)
        source = Tfds("tiny", tmp_path, "train")
        with pytest.raises(
            UnreadableImage, match=r"can not read tiny-train\.array_record.*__\d: the record is dam"
        ) as error:
            [source[i] for i in range(7)]
        assert one_line(error)
