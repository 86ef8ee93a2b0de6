"""Which class an image is: numbers of folders, tables and TFDS under a head, and what is refused or counted."""

import dataclasses
import logging
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from pictures import PLAIN, one_line, write_table, write_tfds
from PIL import Image

from tif_jax.commands.evaluate import accuracy
from tif_jax.data.folder import ImageFolder
from tif_jax.data.loader import training_batches
from tif_jax.data.options import DataOptions
from tif_jax.data.preprocess import Preprocessing
from tif_jax.errors import InputError
from tif_jax.experiment.schema import Backbone, Evaluate, Experiment
from tif_jax.experiment.sources import check_splits, open_for_model
from tif_jax.models import Model

SIDE, LEVEL = 8, 12  # class k is a picture of grey level 12 * k


class Reader(Model):
    """A model that reads the class off the grey level: right for every image whose label is its class."""

    def __init__(self, num_classes):
        self.dtype, self.preprocessing = jnp.float32, Preprocessing(crop_fraction=1.0, **PLAIN)
        self.head = nnx.Linear(1, num_classes, rngs=nnx.Rngs(0))

    def __call__(self, images):
        level = images.mean(axis=(1, 2, 3))[:, None] * 255 / LEVEL
        return -100 * (level - jnp.arange(self.head.out_features)[None]) ** 2, {}


def save(path, kind):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (SIDE, SIDE), (LEVEL * kind,) * 3).save(path)


def folders(root, train, val=None):
    """Class folders {name: class that the pictures show}, an image each."""
    for split, classes in (("train", train), ("val", train if val is None else val)):
        for name, kind in classes.items():
            save(root / split / name / "0.png", kind)
    return root


def experiment(root, name="image_folder", **options):
    splits = dict(train_split="train.csv", test_split="val.csv") if name == "image_table" else dict(test_split="val")
    options = (
        dict(name=name, root=str(root), image_size=SIDE, crop_fraction=1.0, num_workers=0, **PLAIN) | splits | options
    )
    return Experiment(data=DataOptions(**options), evaluate=Evaluate(batch_size=8))


def measured(of, num_classes):
    model = Reader(num_classes)
    source = open_for_model(of, "test", model)
    classes = [i for i, name in enumerate(source.class_names) if name] if of.data.class_index else ()
    return accuracy(model, source, of, classes)


@pytest.mark.parametrize(
    "names",
    [
        [str(i) for i in range(20)],  # as text 10 comes before 2
        [f"{i:02}" for i in range(20)],
        [str(i) if i % 2 else f"{i:03}" for i in range(20)],
        [str(i + 1) for i in range(20)],
        [f"{chr(ord('a') + i)}{20 - i}" for i in range(20)],  # not all numbers: as text
    ],
)
def test_folders_named_by_numbers_are_classes_in_the_order_of_the_numbers(tmp_path, names):
    folders(tmp_path, {name: i for i, name in enumerate(names)})
    assert measured(experiment(tmp_path), 20) == {"num_images": 20, "loss": 0, "top1": 1}
    assert ImageFolder(tmp_path, "train").class_names == tuple(names)


def test_folders_that_are_one_number_are_refused(tmp_path, caplog):
    folders(tmp_path, {"1": 0, "2": 1}, {"01": 0, "2": 1})
    with pytest.raises(InputError, match=r"'0?1' and '0?1' are the same number.*data\.class_index") as error:
        ImageFolder(tmp_path, "val")
    assert one_line(error)
    assert ImageFolder(tmp_path, "val", {"01": 0, "1": 0, "2": 1}).class_names == ("01 / 1", "2")
    assert "data.class_index makes one class of several class folders: 01 / 1" in caplog.text


def test_a_class_that_a_split_lacks_does_not_shift_the_others(tmp_path, caplog):
    for litter in (".ipynb_checkpoints", ".hidden"):
        save(tmp_path / "train" / litter / "0.png", 0)
    folders(tmp_path, {str(i): i for i in range(12)}, {"2": 2, "11": 11})
    save(tmp_path / "val" / "2" / ".1.png", 5)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert measured(experiment(tmp_path), 12) == {"num_images": 2, "loss": 0, "top1": 1}
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 1 and "test_split 'val' has no image of 10 of the classes" in said[0], said
    with pytest.raises(InputError, match=r"has 12 class folders and the model 13 classes: say in data\.class_index"):
        open_for_model(experiment(tmp_path), "test", Reader(13))


def test_what_deserves_a_word_is_said_once(tmp_path, caplog):
    folders(tmp_path, {"cat": 0})
    for name in ("a.HEIC", "b.heic", "c.jp2", "d", "Thumbs.db", ".e.heic", ".sub/f.png"):
        (tmp_path / "train" / "cat" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "train" / "cat" / name).write_bytes(b"")
    save(tmp_path / "train" / "outside.png", 0)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            source = open_for_model(experiment(tmp_path), "train", Reader(1))
    said = [r.getMessage() for r in caplog.records]
    assert sum("has one class alone, 'cat'" in line for line in said) == 1
    passed_over = "passed over 2 .heic, 1 .jp2, 1 files without a suffix, 1 images outside of the class folders;"
    assert sum(passed_over in line for line in said) == 1, said
    with caplog.at_level(logging.WARNING):
        for batch_size, text in (
            (2, "a batch of 2 shows some of the 1 images several times"),
            (1, "is one step with a batch"),
        ):
            training_batches(source, experiment(tmp_path).data, batch_size=batch_size, seed=0).close()
            assert text in caplog.text


TABLES = {  # of which labels under a head of 20: the words of the error, or None
    "numbered by themselves": (range(10), "val.csv", "labels and the model 20 classes: say in data.class_index"),
    "one missing": ([0, 1, 2, 4, 5], "val.csv", "say in data.class_index"),
    "from 1": (range(1, 10), "val.csv", "say in data.class_index"),
    "chosen from the head's": ([0, 7, 15], "val.csv", None),
    "all": (range(20), "val.csv", None),
    "one split has them all": (range(10), "all.csv", None),
}


@pytest.mark.parametrize("labels, other, message", TABLES.values(), ids=TABLES)
def test_a_table_of_few_labels_under_a_large_head(tmp_path, labels, other, message):
    for i in range(20):
        save(tmp_path / f"{i}.png", i)
    write_table(tmp_path / "val.csv", [(f"{i}.png", i, "") for i in labels])
    write_table(tmp_path / "all.csv", [(f"{i}.png", i, "") for i in range(20)])
    of = experiment(tmp_path, "image_table", train_split=other)
    if message is None:
        assert measured(of, 20) == {"num_images": len(list(labels)), "loss": 0, "top1": 1}
    else:
        with pytest.raises(InputError, match=message) as error:
            measured(of, 20)
        assert one_line(error)


def test_a_table_with_the_numbers_of_a_head(tmp_path):
    for kind in (3, 11, 17):
        save(tmp_path / f"{kind}.png", kind)
    write_table(tmp_path / "val.csv", [("3.png", "cat", ""), ("11.png", "dog", ""), ("17.png", "0", "")])
    of = experiment(
        tmp_path, "image_table", train_split="val.csv", class_index={"cat": 3, "dog": 11, "0": 17, "emu": 4}
    )
    assert measured(of, 20) == {"num_images": 3, "loss": 0, "top1": 1, "top1_among_classes": 1}
    lacking = dataclasses.replace(of, data=dataclasses.replace(of.data, class_index={"cat": 3}))
    with pytest.raises(InputError, match=r"data\.class_index has no entry for label '(dog|0)'"):
        measured(lacking, 20)


@pytest.mark.parametrize("keys", [("even", "odd"), ("0", "1"), ("even", "1")])
def test_tfds_under_the_head_of_another_data_set(tmp_path, keys):
    write_tfds(tmp_path)
    of = experiment(tmp_path, "tfds", tfds_name="tiny", test_split="test")
    with pytest.raises(
        InputError, match=r"has 2 labels and the model 20 classes: say in data\.class_index which label"
    ):
        open_for_model(of, "test", Reader(20))
    assert open_for_model(of, "test", Reader(2)).num_classes == 2
    given = dataclasses.replace(of, data=dataclasses.replace(of.data, class_index={keys[0]: 19, keys[1]: 4}))
    source = open_for_model(given, "train", Reader(20))
    found = {(int(np.asarray(x["image"])[0, 0, 0]) // 20 % 2, x["label"]) for x in (source[i] for i in range(7))}
    assert found == {(0, 19), (1, 4)} and source.class_names[4::15] == ("odd", "even")
    lacking = dataclasses.replace(of, data=dataclasses.replace(of.data, class_index={"even": 3}))
    with pytest.raises(InputError, match=r"data\.class_index has no entry for label 'odd'"):
        open_for_model(lacking, "test", Reader(20))


def test_images_without_labels_are_not_trained_or_judged_on(tmp_path):
    write_tfds(tmp_path, labelled=False)
    of = experiment(tmp_path, "tfds", tfds_name="tiny", test_split="test")
    for use in (lambda: open_for_model(of, "test", Reader(2)), lambda: check_splits(of, tmp_path)):
        with pytest.raises(InputError, match=r"data\.(test|train)_split '(test|train)' has no labels") as error:
            use()
        assert one_line(error)
    assert open_for_model(of, "test", Reader(2), labelled=False)[0]["label"] == -1  # a teacher needs none


class Unlabelled:
    """Three images, of which the last `count` have no label or one beyond the head."""

    num_classes, class_names = 4, tuple("abcd")

    def __init__(self, label, count):
        self.labels = [1] * (3 - count) + [label] * count

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return {"id": f"n{index}", "image": np.zeros((SIDE, SIDE, 3), np.uint8), "label": self.labels[index]}


@pytest.mark.parametrize("label, count, message", [
    (-1, 3, "data.test_split 'val' has no labels"),  # as in the test splits of TFDS
    (-1, 1, "data.test_split 'val' has images without a label, as n2"),
    (4, 1, r"n2 has label 4; the model has classes 0\.\.3"),
])  # fmt: skip
def test_a_label_that_is_none_ends_evaluation_and_training(monkeypatch, label, count, message):
    from tif_jax.experiment import sources

    monkeypatch.setattr(sources.data, "open_source", lambda *_: Unlabelled(label, count))
    of = experiment("", "tfds")
    with pytest.raises(InputError, match=message) as error:
        measured(of, 4)
    assert one_line(error)
    with pytest.raises(InputError, match=message.replace("test_split 'val'", "train_split 'train'")):
        batches = training_batches(open_for_model(of, "train", Reader(4)), of.data, batch_size=3, seed=0)
        try:
            next(batches)
        finally:
            batches.close()


def test_classes_in_another_order_than_the_models(tmp_path):
    folders(tmp_path, {"cat": 0, "dog": 1})
    model = Reader(2)
    for names in (None, ("cat", "dog"), ("hound", "tom")):  # others' names for them say nothing of the order
        model.class_names = names
        assert open_for_model(experiment(tmp_path), "test", model).class_names == ("cat", "dog")
    model.class_names = ("dog", "cat")
    with pytest.raises(
        InputError, match=r"class folder 'cat' would be class 0, and the model's class 'cat' is 1"
    ) as error:
        open_for_model(experiment(tmp_path), "test", model)
    assert one_line(error)
    assert open_for_model(experiment(tmp_path, class_index={"cat": 1, "dog": 0}), "test", model)[0]["label"] == 1


@pytest.mark.parametrize("names, how", [
    (("9", "10", "11"), r"by their numbers .9, 10, 11"), (("n10", "n2", "n9"), "as text .n10, n2, n9"),
    (("n1", "n2", "n3"), None), (("08", "09", "10"), None),
])  # fmt: skip
def test_an_order_that_other_programs_have_otherwise(tmp_path, caplog, names, how):
    """Of folders 1 ... 102 torchvision makes 1, 10, 100, and timm 1, 2, 3."""
    folders(tmp_path, {name: i for i, name in enumerate(names)})
    ours, imported = Reader(3), dataclasses.replace(experiment(tmp_path), backbone=Backbone(init_from="weights.pth"))
    named = Reader(3)
    named.class_names = names
    for of, model, warned in ((experiment(tmp_path), ours, None), (imported, named, None), (imported, ours, how)):
        caplog.clear()
        assert open_for_model(of, "test", model).class_names == names
        assert bool(caplog.records) == bool(warned) and (not warned or re.search(warned, caplog.text)), caplog.text


def test_class_index_beyond_the_head_and_none_at_all(tmp_path):
    folders(tmp_path, {"cat": 0, "dog": 1})
    with pytest.raises(InputError, match=r"data\.class_index\.emu is 20; the model has classes 0\.\.19"):
        measured(experiment(tmp_path, class_index={"cat": 0, "dog": 1, "emu": 20}), 20)
    for wrong in (-1, 10**8):
        with pytest.raises(
            InputError, match=rf"data\.class_index\.dog is {wrong}; it must be a whole number from 0 to"
        ):
            ImageFolder(tmp_path, "train", {"cat": 0, "dog": wrong})
    assert "top1_among_classes" not in measured(experiment(tmp_path, class_index=None), 2)


def test_only_classes_that_have_a_folder_are_chosen_among(tmp_path):
    """The pictures look most like classes that no folder is: among those that are, every one is right."""
    folders(tmp_path, {"a": 4, "b": 9}, {"a": 4})
    index = {"a": 3, "b": 10, **{f"none{i}": i for i in (4, 5, 9)}}
    assert measured(experiment(tmp_path, class_index=index), 20) == {
        "num_images": 1, "loss": pytest.approx(100, rel=1e-3), "top1": 0, "top1_among_classes": 1
    }  # fmt: skip


def test_only_images_that_can_be_read_are_counted(tmp_path):
    folders(tmp_path, {str(i): i for i in range(12)})
    of = experiment(tmp_path, on_error="skip")
    for name in ("3", "11"):
        (tmp_path / "val" / name / "0.png").write_bytes(b"cut")
    assert measured(of, 12) == {"num_images": 10, "loss": 0, "top1": 1}
    for path in Path(tmp_path, "val").rglob("*.png"):
        path.write_bytes(b"cut")
    with pytest.raises(InputError, match="none of the 12 images to evaluate on can be read") as error:
        measured(of, 12)
    assert one_line(error)
