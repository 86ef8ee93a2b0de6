"""The images that `tif compare`, `calibrate` and `ladder` are given: links in folders, and which class they are then."""

import os

import numpy as np
import pytest
from cases import numpy_model
from pictures import picture

from tif_jax.commands import _pictures
from tif_jax.data.listed import open_listed
from tif_jax.data.preprocess import Preprocessing
from tif_jax.errors import InputError


@pytest.fixture
def store(tmp_path):
    """Photographs that lie elsewhere."""
    for i in range(4):
        (tmp_path / "store" / "ab").mkdir(parents=True, exist_ok=True)
        picture(i, 8, 8).save(tmp_path / "store" / "ab" / f"{i}.png")
    return tmp_path / "store"


def link(path, target):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def read(folder, labels="folders", num_classes=2):
    files = open_listed([str(folder)], labels, num_classes, None)
    return {os.path.normpath(name): label for name, label in zip(files.ids, files.labels, strict=True)}


def test_a_link_is_of_the_class_of_the_folder_that_it_lies_in(store, tmp_path):
    for i, name in enumerate(["cat/a", "cat/b", "dog/c", "dog/d"]):
        link(tmp_path / "mine" / f"{name}.png", store / "ab" / f"{i}.png")
    link(tmp_path / "mine" / "dog" / "again.png", store / "ab" / "0.png")  # a file counts once
    found = read(tmp_path / "mine")
    assert found == {"cat/a.png": 0, "cat/b.png": 0, "dog/c.png": 1, "dog/d.png": 1}
    (tmp_path / "labels.csv").write_text("file,label\nstore/ab/3.png,1\n")
    assert read(tmp_path / "mine", str(tmp_path / "labels.csv")) == {"dog/d.png": 1}


def test_a_class_folder_may_be_a_link(store, tmp_path, monkeypatch):
    link(tmp_path / "mine" / "cat", store / "ab")
    link(tmp_path / "mine" / "dog" / "1.png", store / "ab" / "1.png")
    link(tmp_path / "mine" / "circle", tmp_path)
    link(tmp_path / "mine" / "dog" / "further", store)
    picture(9, 8, 8).save(tmp_path / "mine" / "dog" / "own.png")
    expected = {f"cat/{i}.png": 0 for i in range(4)} | {"dog/own.png": 1}
    assert read(tmp_path / "mine") == expected
    monkeypatch.chdir(tmp_path)
    assert read("mine") == expected
    link(tmp_path / "alias", tmp_path / "mine")
    assert read(tmp_path / "alias") == expected


def test_of_two_classes_with_one_name_it_has_to_be_said_which(store, tmp_path):
    for i, name in enumerate(["crane", "jay"]):
        link(tmp_path / "mine" / name / "a.png", store / "ab" / f"{i}.png")
    model = numpy_model(dict(image_size=8, patch_size=4, width=8, depth=1, num_heads=2, num_classes=3))
    model.preprocessing, model.class_names = Preprocessing(), ("crane", "jay", "crane")
    folders = [str(tmp_path / "mine")]
    with pytest.raises(InputError, match="folder 'crane' is none of the 1 known classes: say which in --class-index"):
        _pictures.opened(folders, "folders", model, None, None)
    found = _pictures.opened(folders, "folders", model, {"crane": 2, "jay": 1}, None)
    assert np.array_equal([found.source[i]["label"] for i in range(2)], [2, 1])
