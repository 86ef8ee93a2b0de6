"""`tif view` of depth and segmentation models: maps on one scale, errors where a truth is known, tokens, impact."""

import re

import numpy as np
import pytest
from cases import call, lively
from pictures import picture
from PIL import Image
from small_project import forget_handlers

import tif_jax
from tif_jax.__main__ import main
from tif_jax.errors import InputError
from tif_jax.figures.panels import Maps, first_panels, way_panels
from tif_jax.figures.view import seen_in
from tif_jax.models.trace import trace
from tif_jax.training.checkpoints import Checkpoints
from tif_jax.training.state import State

FIELDS = dict(
    image_size=(16, 24), patch_size=8, width=16, depth=2, num_heads=2, task="depth", decoder="linear",
    decoder_blocks=(0, 1),
)  # fmt: skip
CLASSES = FIELDS | dict(task="segmentation", num_classes=3)
DPT = dict(image_size=(16, 24), patch_size=8, width=16, depth=4, num_heads=2, task="depth", decoder_width=4)
TRUTH = np.array([[0, 1.0], [2.0, 4.0]], np.float32)


def test_panels_of_depth():
    full, way = np.array([[3, 1.0], [2.0, 7.0]], np.float32), np.array([[3, 1.0], [1.0, 4.0]], np.float32)
    true, found, error = first_panels(Maps(full, {"way": way}, TRUTH, 0))
    assert (true.title, found.title, error.title) == ("true depth", "depth, from all tokens", "error, RMSE 1.73 m")
    assert (found.scale.least, found.scale.most) == (1, 7) and found.scale.label == "depth (m)"
    assert [*true.picture[0, 0]] == [*error.picture[0, 0]] == [209] * 3  # unknown: grey
    assert np.array_equal(true.picture[0, 1], found.picture[0, 1])  # 1 m in both
    assert not np.array_equal(true.picture[1, 1], found.picture[1, 1])
    assert error.picture[0, 1].min() > 240 and error.picture[1, 1][0] > error.picture[1, 1][2] + 80  # white; orange
    depth, wrong = way_panels(Maps(full, {"way": way}, TRUTH, 0), "way")
    assert wrong.title == "error, RMSE 0.58 m" and np.array_equal(depth.picture[0], found.picture[0])
    assert wrong.picture[1, 0][2] > wrong.picture[1, 0][0]  # too near: purple
    (alone,) = first_panels(Maps(full, {"way": way, "other": full}, None, 0))
    assert alone.title == found.title
    changes = [way_panels(Maps(full, {"way": way, "other": full}, None, 0), name)[1] for name in ("way", "other")]
    assert [one.title for one in changes] == ["change, 1.58 m (RMS)", "change, 0.00 m (RMS)"]
    assert changes[0].scale.label.startswith("change (m)") and changes[1].scale is None


def test_panels_of_classes():
    full, way = np.array([[0, 1], [2, 2]]), np.array([[0, 1], [2, 1]])
    labels, found = first_panels(Maps(full, {"way": way}, np.array([[-1, 1], [2, 0]]), 3))
    assert [*labels.picture[0, 0]] == [209] * 3 and np.array_equal(labels.picture[0, 1], found.picture[0, 1])
    assert len({tuple(colour) for colour in found.picture.reshape(-1, 3)}) == 3
    assert way_panels(Maps(full, {"way": way}, None, 3), "way")[0].title == "classes, 75.0% as from all tokens"


def test_a_trace_has_the_map():
    model = lively(FIELDS, reducer="evo_vit", keep_ratio=0.5)
    images = np.random.default_rng(0).standard_normal((2, 16, 24, 3)).astype(np.float32)
    found = trace(model, images)
    np.testing.assert_allclose(found.prediction, call(model, images)[0], atol=1e-4)
    assert len(found.sources) == 2 and found.counts[0] == 6 and found.counts[-1] < 6


def test_the_truth_lies_beside(tmp_path, monkeypatch):
    """Of a picture of a data set like the one that the run was trained on."""
    monkeypatch.chdir(tmp_path)
    forget_handlers()
    data = {"name": "image_pairs", "label_kind": "depth", "label_folder": "far", "label_scale": 0.5}
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        said = {"model": FIELDS, "reducer": {"name": "tosa", "keep_ratio": 0.5}, "config": {"data": data}}
        said |= {
            "preprocessing": {"crop_fraction": 1.0, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
        }
        model = lively(FIELDS, reducer="tosa", keep_ratio=0.5)
        checkpoints.save(
            State(np.int32(7), tif_jax.models.params.params_of(model), ()), {**said, "class_names": None}, {}
        )
    for kind in ("image", "far"):
        (tmp_path / "val" / kind).mkdir(parents=True)
    picture(0, 16, 24).save(tmp_path / "val" / "image" / "a.jpg")
    picture(1, 16, 24).save(tmp_path / "val" / "image" / "b.jpg")
    Image.fromarray(np.full((16, 24), 6, np.uint8)).save(tmp_path / "val" / "far" / "a.png")  # 3 m
    assert main(["view", "--workdir", "run", "val/image"]) == 0
    page = (tmp_path / "run" / "view" / "index.html").read_text()
    first, second = re.findall(r"<section>.*?</section>", page, re.DOTALL)
    depth = tif_jax.load("run", reducer="full").predict_maps("val/image/a.jpg")[0].pixels
    assert "true depth" in first and f"error, RMSE {np.sqrt(np.square(depth - 3).mean()):.2f} m" in first
    assert "true depth" not in second and "change, " in second and first.count("impact of each patch") == 2
    assert "impact (of ln depth squared)" in first
    assert {path.name for path in (tmp_path / "run" / "view").iterdir()} == {"a.png", "b.png", "index.html"}


def test_in_python():
    model = lively(CLASSES)
    figure = tif_jax.view(model, picture(0), reducers=["tome"])
    assert [axes.get_title() for axes in figure.subfigs[0].axes if axes.get_title()][:3] == [
        "as the model sees it", "impact of each patch", "classes, from all tokens",
    ]  # fmt: skip
    assert len(figure._repr_png_()) > 1000
    with pytest.raises(
        InputError, match="a model among the reducers is one of depth, the model that is viewed of segm"
    ):
        tif_jax.view(model, picture(0), reducers=[lively(FIELDS, reducer="tome", num_merged=1)])
    assert len([*seen_in(model, {}, [("a", picture(0))], 3)]) == 1


def test_a_depth_model_as_a_folder(tmp_path):
    model = lively(DPT, reducer="tif", keep_ratio=0.5)
    tif_jax.save_pretrained(model, tmp_path / "shared")
    loaded = tif_jax.load(tmp_path / "shared")
    images = np.random.default_rng(0).standard_normal((1, 16, 24, 3)).astype(np.float32)
    np.testing.assert_allclose(call(loaded, images)[0], call(model, images)[0], atol=1e-5)
    card = (tmp_path / "shared" / "README.md").read_text()
    assert "depth-estimation" in card and "timm has no model of this kind" in card
