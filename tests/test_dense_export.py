"""Exported depth and segmentation models compute what the models compute; their loader writes maps of pixels."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from cases import call, lively, mostly_long, numpy_images
from pictures import picture
from PIL import Image
from test_export import run_onnx

from tif_jax import InputError
from tif_jax.export import to_onnx, to_stablehlo, to_timm

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

FIELDS = dict(image_size=(16, 32), patch_size=8, width=16, depth=4, num_heads=2)
DEPTH = FIELDS | dict(task="depth", decoder_width=4)
LINEAR = FIELDS | dict(depth=2, decoder="linear", decoder_blocks=(0, 1))  # where the decoder is not the point
CLASSES = LINEAR | dict(task="segmentation", num_classes=3)
REDUCERS = {
    "evo_vit": dict(keep_ratio=0.5, stages=(1, 2)),  # waits beside x for two blocks that are read
    "tome": dict(num_merged=1),
    "full": {},
    "tif": dict(keep_ratio=0.5, adapter=4),
    "tosa": dict(keep_ratio=0.5, layers=(1,)),
    "evit": dict(sites=(1,)),
    "bat": dict(keep_ratio=0.5, sites=(1,)),
    "dynamic_vit": dict(sites=(1,)),
    "norm": {},
    "prior": {},
}


@pytest.mark.parametrize(("name", "options"), mostly_long([*REDUCERS.items()]))
def test_onnx_of_depth(tmp_path, name, options):
    model = lively(DEPTH, reducer=name, **options)
    manifest = to_onnx(model, tmp_path / "made")
    assert manifest["check"]["same_tokens"] == 4 and "same_class" not in manifest["check"]
    assert manifest["task"] == "depth" and manifest["outputs"][0] == {
        "name": "depth", "shape": ["batch", 16, 32], "meaning": "of each pixel, metres",
    }  # fmt: skip
    depth, aux = call(model, numpy_images(3, (16, 32)))
    found = run_onnx(tmp_path / "made" / "model.onnx", numpy_images(3, (16, 32)))
    assert float(np.std(depth)) > 0.3  # metres: the maps are not all the same
    np.testing.assert_allclose(found.pop("depth"), depth, atol=1e-3)
    assert [*found] == [one for one in ("kept", "source") if one in aux][:1]


def test_stablehlo_of_depth(tmp_path):
    model = lively(LINEAR | dict(task="depth"), reducer="tif", keep_ratio=0.5)
    to_stablehlo(model, tmp_path / "made")
    loaded = jax.export.deserialize(bytearray((tmp_path / "made" / "model.stablehlo").read_bytes()))
    found = np.asarray(loaded.call(numpy_images(3, (16, 32)))["depth"])
    np.testing.assert_allclose(found, call(model, numpy_images(3, (16, 32)))[0], atol=1e-5)
    with pytest.raises(InputError, match="timm has no models of depth; StableHLO and ONNX take any"):
        to_timm(model, tmp_path / "other")


def loader(folder, *words):
    program = f"import sys, runpy; sys.modules['tif_jax'] = None; sys.argv[1:] = {[*map(str, words)]!r}; "
    program += f"runpy.run_path({str(folder / 'predict.py')!r}, run_name='__main__')"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


def test_the_loader_writes_depth(tmp_path):
    model = lively(LINEAR | dict(task="depth"))
    to_onnx(model, tmp_path / "made")
    file, out = tmp_path / "room.png", tmp_path / "maps"
    picture(0, 40, 60).save(file)
    done = loader(tmp_path / "made", "--out", out, file)
    depth = np.asarray(call(model, model.preprocess([file]))[0][0])
    said = f"  {depth.min():.2f} m nearest, {np.median(depth):.2f} m median, {depth.max():.2f} m farthest"
    assert (done.returncode, done.stdout.splitlines()) == (0, [str(file), said])
    written = Image.open(out / "room.png.depth.png")
    assert written.mode == "I;16" and np.abs(np.asarray(written) / 1000 - depth).max() <= 1e-3
    (out / "room.png.depth.png").write_text("mine")
    done = loader(tmp_path / "made", "--out", out, file)
    assert done.returncode == 1 and "room.png.depth.png is not written: File exists" in done.stderr
    assert (out / "room.png.depth.png").read_text() == "mine"
    assert loader(tmp_path / "made", file).returncode == 0 and [*tmp_path.glob("*.depth.png")] == []


def test_the_loader_writes_classes(tmp_path):
    model = lively(CLASSES, reducer="tome", num_merged=1)
    model.class_names = ("wall", "floor", "rest")
    manifest = to_onnx(model, tmp_path / "made")
    assert manifest["outputs"][0]["meaning"] == "of each pixel's classes, before the softmax"
    assert manifest["check"]["same_class"] > 0.99 and json.loads((tmp_path / "made" / "manifest.json").read_text())
    picture(1, 40, 60).save(tmp_path / "room.png")
    done = loader(tmp_path / "made", tmp_path / "room.png", "--out", tmp_path / "maps")
    expected = np.asarray(call(model, model.preprocess([tmp_path / "room.png"]))[0][0]).argmax(axis=-1)
    written = np.asarray(Image.open(tmp_path / "maps" / "room.png.classes.png"))
    assert written.dtype == np.uint8 and (written == expected).mean() > 0.99 and done.returncode == 0
    largest = np.bincount(written.reshape(-1)).argmax()
    share = 100 * (written == largest).mean()
    assert done.stdout.splitlines()[1] == f"  {share:5.1f} %  {model.class_names[largest]}"
