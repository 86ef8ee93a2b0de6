"""The classes of pictures: `tif predict` and `model.predict_images`."""

import csv
import json
import os
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from cases import lively
from pictures import encode, picture
from reference import random_timm_tensors
from small_project import forget_handlers, last_line

import tif_jax
from tif_jax.__main__ import main
from tif_jax.commands.predict import COLUMNS
from tif_jax.errors import InputError, WorkError
from tif_jax.models import predictions
from tif_jax.models.model import carried
from tif_jax.models.params import params_of
from tif_jax.training.checkpoints import Checkpoints
from tif_jax.training.state import State

FIELDS = dict(image_size=16, patch_size=4, width=16, depth=1, num_heads=2, num_classes=3)
NAMES = ("ant", "bee", "cat")
PICTURES = ("b.JPG", "a.png", "below/c.webp", "below/d.gif")


@pytest.fixture(scope="module")
def model():
    model = lively(FIELDS, reducer="evit", keep_ratio=0.5)
    model.class_names = NAMES
    return model


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Pictures, one that is damaged, and what is none."""
    monkeypatch.chdir(tmp_path)
    Path("photos/below").mkdir(parents=True)
    Path("photos/.hidden").mkdir()
    for seed, name in enumerate([*PICTURES, ".hidden/e.png"]):
        picture(seed).save(Path("photos", name))
    Path("photos/notes.txt").write_text("no picture")
    return tmp_path


def in_order():
    return [os.path.join("photos", name) for name in sorted(PICTURES)]


def expected(model, files):
    """Softmax of the plain forward pass of each picture alone, in numpy."""
    apply = jax.jit(lambda images: model(images)[0])
    logits = np.concatenate([apply(model.preprocess([file])) for file in files]).astype(np.float64)
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)


def check(found, shares):
    for prediction, share in zip(found, shares, strict=True):
        assert prediction.classes == tuple(np.argsort(-share)[: len(prediction.classes)])
        np.testing.assert_allclose(prediction.probabilities, share[list(prediction.classes)], rtol=1e-4)


def run(line):
    forget_handlers()
    return main(["predict", *line.split()])


def save(directory, model):
    described = {"model": FIELDS, "reducer": {"name": "evit", "keep_ratio": 0.5}, "config": {}, **carried(model)}
    with Checkpoints(directory / "checkpoints") as checkpoints:
        checkpoints.save(State(np.int32(7), params_of(model), ()), described, {})


@pytest.mark.parametrize("options", [dict(reducer="random"), dict(reducer="tome", num_merged=3), dict(reducer="full")])
def test_probabilities_are_the_softmax(photos, options):
    model = lively(FIELDS, **options)
    found = model.predict_images(in_order(), top=2)
    check(found, expected(model, in_order()))
    assert {len(prediction.classes) for prediction in found} == {2}
    assert [prediction.names for prediction in found] == [tuple(map(str, p.classes)) for p in found]


def test_folders_order_and_names(photos, model):
    files = ["photos/below/d.gif", "photos", Path("photos/b.JPG")]
    found = model.predict_images(files)
    listed = [files[0], *in_order(), "photos/b.JPG"]
    assert [prediction.file for prediction in found] == listed
    check(found, expected(model, listed))
    assert [p.names for p in found] == [tuple(NAMES[output] for output in p.classes) for p in found]
    assert tif_jax.predict_images(model, "photos") == found[1:-1]
    assert len({p.probabilities for p in found}) == len(PICTURES)


def test_what_is_in_memory(model):
    image = picture(3)
    found = model.predict_images([np.asarray(image), image, encode(image, "PNG")])
    assert [prediction.file for prediction in found] == ["image 0", "image 1", "image 2"]
    check([*found, *model.predict_images(image)], np.repeat(expected(model, [image]), 4, axis=0))


def test_batches_are_filled_up_and_compiled_once_a_size(model, monkeypatch):
    """35 pictures, one damaged, in batches of at most 4, beside the same one by one."""
    monkeypatch.setattr(predictions, "_BATCH_SIZES", (1, 3, 4))
    images = [np.asarray(picture(seed)) for seed in range(35)]
    listed = [*images[:5], b"damaged", *images[5:]]
    before = predictions._probabilities._cache_size()
    found = model.predict_images(listed)
    assert predictions._probabilities._cache_size() - before <= 3
    again = predictions._probabilities._cache_size()
    model.predict_images(listed)
    assert predictions._probabilities._cache_size() == again
    assert [bool(p.error) for p in found] == [i == 5 for i in range(36)]
    check([p for p in found if not p.error], expected(model, images))


def test_one_damaged_picture(photos, model, caplog):
    Path("photos/below/d.gif").write_bytes(b"GIF89a")
    found = model.predict_images("photos")
    assert [prediction.file for prediction in found] == in_order()
    (damaged,) = [prediction for prediction in found if prediction.error]
    assert damaged.file == "photos/below/d.gif" and damaged.classes == damaged.names == damaged.probabilities == ()
    assert [r.getMessage() for r in caplog.records if "d.gif" in r.getMessage()] == [f"{damaged.error}; it is left out"]


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        (["photos/notes.txt", "missing.jpg"], {}, r"none of the pictures can be read \(2\).*missing.jpg"),
        ("photos/.hidden/empty", {}, "no images in photos/.hidden/empty or below; images are .jpg"),
        ([], {}, "there are no pictures"),
        ("photos", {"top": 0}, "top is 0"),
    ],
)
def test_mistakes(photos, model, files, options, message):
    Path("photos/.hidden/empty").mkdir()
    with pytest.raises(InputError, match=message):
        model.predict_images(files, **options)


@pytest.mark.parametrize("files, message", [([7], "a file is 7"), (7, "files are 7")])
def test_what_is_no_picture(files, message):
    with pytest.raises(InputError, match=message):
        predictions.pictures_of.__wrapped__(files)  # without the types that only the tests check


def test_weights_that_give_no_numbers(photos):
    model = lively(FIELDS)
    model.head.bias[...] = np.nan
    with pytest.raises(WorkError, match=r"outputs for photos/a.png are no numbers"):
        model.predict_images("photos")


# The command


def test_a_workdir_and_its_table(photos, model, capsys):
    save(photos / "run", model)
    Path("photos/below/d.gif").write_bytes(b"")
    assert run("--workdir run photos --top 2 --csv out/table.csv") == 0
    captured = capsys.readouterr()
    whole = [file for file in in_order() if not file.endswith("d.gif")]
    found, shares = model.predict_images(whole, top=2), expected(model, whole)
    with open("out/table.csv", newline="", encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened))
    assert tuple(rows[0]) == COLUMNS == ("file", "rank", "class", "name", "probability")
    assert [row for row in rows if not row["rank"]] == [dict.fromkeys(COLUMNS, "") | {"file": "photos/below/d.gif"}]
    ranked = [row for row in rows if row["rank"]]
    assert [(row["file"], row["rank"]) for row in ranked] == [(file, rank) for file in whole for rank in "12"]
    assert [row["name"] for row in ranked] == [NAMES[int(row["class"])] for row in ranked]
    told = np.float32([row["probability"] for row in ranked]).reshape(3, 2)
    np.testing.assert_allclose(told, -np.sort(-shares, axis=1)[:, :2], rtol=1e-4)
    lines = captured.out.splitlines()
    assert lines[0] == "photos/a.png" and "photos/below/d.gif: could not be read" in lines
    assert lines[1] == f"  {100 * found[0].probabilities[0]:5.1f} %  {found[0].names[0]}"
    assert len(lines) == 4 + 3 * 2
    assert "1 of 4 pictures could not be read" in captured.err


def test_a_weight_file(photos, capsys):
    tensors = random_timm_tensors(np.random.default_rng(0), width=64, depth=1, patch_size=8, grid=(2, 2), num_classes=3)
    safetensors.numpy.save_file(tensors, "w.safetensors")
    how = {"input_size": [3, 16, 16], "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.5, 0.5)}
    described = {"architecture": "vit_of_mine", "num_classes": 3, "model_args": {"num_heads": 4}, "pretrained_cfg": how}
    Path("config.json").write_text(json.dumps(described))
    assert run("--weights w.safetensors photos/a.png --top 9") == 0
    lines = capsys.readouterr().out.splitlines()
    loaded = tif_jax.load("w.safetensors")
    assert loaded.preprocessing.mean == (0.5, 0.5, 0.5)
    (found,) = loaded.predict_images("photos/a.png")
    check([found], expected(loaded, ["photos/a.png"]))
    assert lines == ["photos/a.png"] + [
        f"  {100 * share:5.1f} %  class {output}"
        for output, share in zip(found.classes, found.probabilities, strict=True)
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are UTF-8")
def test_names_that_are_not_utf_8(photos, model, capsys):
    save(photos / "run", model)
    name = os.fsdecode(b"photos/\xff.png")
    picture(0).save(name)
    assert run("--workdir run photos --csv table.csv --top 1") == 0
    assert r"photos/\xff.png" in capsys.readouterr().out
    assert r"photos/\xff.png,1," in Path("table.csv").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("photos", "one of the arguments --workdir --weights is required"),
        ("--workdir run --weights w.safetensors photos", "not allowed with argument"),
        ("--workdir nowhere photos", "nowhere"),
        ("--weights nowhere.safetensors photos", "nowhere.safetensors"),
        ("--workdir run", "the following arguments are required: IMAGE|FOLDER"),
        ("--workdir run photos --top 0", "--top is 0; it is at least 1"),
        ("--workdir run photos --top few", "--top: invalid int value"),
        ("--workdir run photos --csv photos/notes.txt/table.csv", "notes.txt is no folder that can be written to"),
        ("--workdir run photos --csv photos", "--csv is 'photos'; it is the name of a file"),
        ("--workdir run photos --csv photos/notes.txt", "'photos/notes.txt', a file that is no table of `tif predict`"),
        ("--workdir run photos/notes.txt", "none of the pictures can be read"),
    ],
)
def test_mistakes_of_the_line(photos, model, capsys, line, message):
    if line.endswith("notes.txt"):
        save(photos / "run", model)
    assert run(line) == 2
    told = last_line(capsys)
    assert told.startswith("tif predict: ") and message in told
    assert not list(photos.rglob("*.csv"))


def test_a_prediction_is_plain_data(model):
    found = model.predict_images(picture(0))[0]
    assert [type(x) for x in (found.classes[0], found.names[0], found.probabilities[0])] == [int, str, float]
