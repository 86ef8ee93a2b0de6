"""`tif ladder`: the file it writes, who takes it, as an export and to be evaluated, and mistakes."""

import hashlib
import json
import runpy
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from small_project import forget_handlers, last_line
from test_calibration import photos as photos  # a fixture

from tif_jax import Adaptive, cost, load, load_ladder, preprocess
from tif_jax.__main__ import main
from tif_jax.adaptive.routing import ALWAYS, Route, confidence
from tif_jax.data.folder import image_files
from tif_jax.errors import InputError
from tif_jax.models.params import backbone_digest, params_of
from tif_jax.serving.classifier import Classifier
from tif_jax.weights.ladder import described

REDUCERS = "--reducer random:keep_ratio=0.9 --reducer random:keep_ratio=0.5"
LINE = f"ladder --weights w.safetensors --images photos {REDUCERS} --out ladder.json"


def run(line):
    forget_handlers()
    return main(line.split())


def test_the_program_and_who_takes_its_file(photos, capsys):
    assert not run(f"{LINE} --agreement 0.8")
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == "ladder.json" and "to expect of other pictures: agreement" in printed[-2]
    files = [path for path in image_files("photos") if not path.endswith("zz.png")]
    model = load("w.safetensors")
    images = np.asarray(preprocess(files, model))
    direct = Adaptive(
        model, [load("w.safetensors", reducer="random", keep_ratio=k) for k in (0.9, 0.5)], 0.8, images
    )  # the damaged picture is left out
    ladder = load_ladder("w.safetensors", "ladder.json")
    assert len({id(m.block_0.mlp.up.kernel[...]) for m in ladder.models}) == 1  # one copy in memory
    assert [cost(ladder.models[rung]).gmac for rung in ladder.route.rungs] == [
        direct.costs[rung] for rung in direct.route.rungs
    ]
    np.testing.assert_allclose(ladder.route.thresholds, direct.route.thresholds, atol=1e-4)
    said = json.loads(Path("ladder.json").read_text())["calibration"]
    assert said["expected"]["agreement"] == pytest.approx(direct.expected.agreement) and said["num_images"] == 80
    expected, found = direct(images[:8]), Classifier(ladder, [8])([*images[:8]])
    np.testing.assert_allclose([one.gmac for one in found], expected.gmac, rtol=1e-6)
    np.testing.assert_array_equal([one.probabilities.argmax() for one in found], expected.logits.argmax(axis=1))


def test_pictures_that_a_schedule_was_found_from_are_told(photos, capsys):
    calibrate = "calibrate --weights w.safetensors --images photos --budget"
    assert not run(f"{calibrate} {0.9 * cost(load('w.safetensors')).gmac} --out schedule.json")
    assert not run(f"{LINE} --reducer schedule.json --agreement 0.8 --num-images 80")
    assert "found from these very pictures" not in capsys.readouterr().err
    assert not run(f"{LINE} --reducer schedule.json --agreement 0.8")
    assert "schedule.json: found from these very pictures, and will look better on them" in capsys.readouterr().err


@pytest.fixture
def ladder_file(photos):
    """Two models, and an answer of the first is good enough for about half of the pictures."""
    model, images = load("w.safetensors"), some_images()
    first = load("w.safetensors", reducer="norm", keep_ratio=0.5)
    sure = np.sort(confidence(np.asarray(first(jnp.asarray(images))[0])))
    route = Route((0, 1), (float(sure[len(sure) // 2 - 1 : len(sure) // 2 + 1].mean()), ALWAYS))
    found = Adaptive.with_route(model, [first], route)
    Path("half.json").write_text(json.dumps(described(found, [{"name": "norm", "keep_ratio": 0.5}])))
    return found


def some_images(number=9):
    return np.random.default_rng(0).standard_normal((number, 16, 16, 3), np.float32)


@pytest.mark.parametrize("form", ["stablehlo", "onnx"])
def test_a_ladder_exported_says_what_the_ladder_says(ladder_file, capsys, form):
    if form == "onnx":
        pytest.importorskip("onnxruntime")
    assert not run(f"export --weights w.safetensors --ladder half.json --to {form} --output served")
    assert capsys.readouterr().out.startswith("served: a ladder of ")
    manifest = json.loads(Path("served/manifest.json").read_text())
    for name, digest in manifest["files"].items():
        assert hashlib.sha256(Path("served", name).read_bytes()).hexdigest() == digest
    served = runpy.run_path("served/predict.py")
    images, expected = some_images(), ladder_file(some_images())
    assert 0 < expected.rung.sum() < len(images)  # some climb, some do not
    call = served["loaded"](manifest)
    np.testing.assert_allclose(call(images), expected.logits, atol=1e-4)
    for image, row in zip(images, expected.logits, strict=True):
        np.testing.assert_allclose(call(image[None])[0], row, atol=1e-4)
    picture = next(path for path in image_files("photos") if not path.endswith("zz.png"))
    command = [sys.executable, "served/predict.py", picture]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.startswith(picture) and "%" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--ladder half.json --to timm", "a ladder goes to onnx or stablehlo"),
        ("--ladder half.json --reducer tome --to stablehlo", "a ladder says its reducers itself"),
        ("--ladder none.json --to stablehlo", "the ladder none.json can not be read"),
    ],
)
def test_mistakes_of_an_export(ladder_file, capsys, flags, message):
    assert run(f"export --weights w.safetensors --output served {flags}") == 2
    assert message in last_line(capsys)
    assert not Path("served").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{LINE} --agreement 1.5", "--agreement is 1.5; it is a share, above 0 and at most 1"),
        (f"{LINE} --agreement 0.9 --num-images 20", "20 images are too few to calibrate with"),
        (LINE.replace("ladder.json", "ladder") + " --agreement 0.9", "--out is 'ladder'; it is a file on this machine"),
        (LINE.replace("0.5", "2") + " --agreement 0.9", "keep_ratio"),
        (
            LINE.replace("ladder.json", "gs://b/l.json") + " --agreement 0.9",
            "gs:/b is a URL, but what is written goes to",
        ),
        (LINE.replace("ladder.json", "config.json") + " --agreement 0.9", "config.json is there already and no such"),
    ],
)
def test_mistakes_of_the_program(photos, capsys, line, message):
    assert run(line) == 2
    assert message in last_line(capsys)
    assert not Path("ladder.json").exists()


def test_files_that_are_no_ladder(photos):
    with pytest.raises(InputError, match="can not be read"):
        load_ladder("w.safetensors", "none.json")
    good = {"ladder": [], "route": {"rungs": [0], "thresholds": ["-inf"]}, "backbone": "x", "learned": []}
    for bad in ("[]", "no", json.dumps({**good, "route": {}}), json.dumps({**good, "ladder": [{}]})):
        Path("bad.json").write_text(bad)
        with pytest.raises(InputError, match="no ladder as `tif ladder` writes it"):
            load_ladder("w.safetensors", "bad.json")
    backbone = backbone_digest(params_of(load("w.safetensors")))
    unsure = {"rungs": [0, 1], "thresholds": ["nan", "-inf"]}
    random = [{"name": "random", "keep_ratio": 0.5}]
    Path("bad.json").write_text(json.dumps({"ladder": random, "route": unsure, "backbone": backbone, "learned": [""]}))
    with pytest.raises(InputError, match="image_size is given, and a ladder is for the size"):
        load_ladder("w.safetensors", "bad.json", image_size=32)
    with pytest.raises(InputError, match="they are log-odds"):
        load_ladder("w.safetensors", "bad.json")
    learned = {**good, "backbone": backbone, "ladder": [{"name": "norm", "keep_ratio": 0.5}], "learned": ["x"]}
    Path("bad.json").write_text(json.dumps(learned))
    with pytest.raises(InputError, match="learned something else"):
        load_ladder("w.safetensors", "bad.json")
    untrained = {**learned, "ladder": [{"name": "tif", "keep_ratio": 0.5}]}
    Path("bad.json").write_text(json.dumps(untrained))
    with pytest.raises(InputError, match="has to learn"):
        load_ladder("w.safetensors", "bad.json")
    Path("bad.json").write_text(json.dumps(good))
    with pytest.raises(InputError, match="found for other weights"):
        load_ladder("w.safetensors", "bad.json")
