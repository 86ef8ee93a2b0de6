"""What depth and segmentation models say of pictures: `tif predict --out`, `model.predict_maps`, and what is refused."""

import jax
import numpy as np
import pytest
from cases import lively
from flax import nnx
from pictures import picture
from PIL import Image
from small_project import last_line
from test_convert import save
from test_predict import run

import tif_jax
from tif_jax.errors import InputError, WorkError
from tif_jax.models.fresh_heads import with_fresh_heads
from tif_jax.models.params import params_of

FIELDS = dict(image_size=(16, 24), patch_size=8, width=16, depth=4, num_heads=2, task="depth", decoder_width=4)
CLASSES = dict(
    image_size=16, patch_size=8, width=16, depth=1, num_heads=2, task="segmentation", decoder="linear",
    decoder_blocks=(0,), num_classes=3,
)  # fmt: skip


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos" / "more").mkdir(parents=True)
    for i, name in enumerate(("room.png", "more/room.jpg", "hall.png")):
        picture(i, 30, 40).save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "bad.png").write_text("no picture")
    return tmp_path


def expected(model, files):
    apply = jax.jit(lambda images: model(images)[0])
    return np.concatenate([apply(model.preprocess([file])) for file in files])


def test_depth_as_files(photos, capsys):
    model = lively(FIELDS, reducer="tosa", keep_ratio=0.5)
    save(photos / "run", model, FIELDS, "tosa")
    assert run("--workdir run photos --out maps") == 0
    files = ["photos/hall.png", "photos/more/room.jpg", "photos/room.png"]
    depth = expected(tif_jax.load("run"), files)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "photos/bad.png: could not be read" and said[1::2] == files
    assert (
        said[2]
        == f"  {depth[0].min():.2f} m nearest, {np.median(depth[0]):.2f} m median, {depth[0].max():.2f} m farthest"
    )
    assert sorted(path.name for path in (photos / "maps").iterdir()) == [
        "hall.depth.png", "hall.preview.png", "room-2.depth.png", "room-2.preview.png", "room.depth.png", "room.preview.png"
    ]  # fmt: skip
    for name, one in zip(("hall", "room", "room-2"), depth, strict=True):
        written = Image.open(photos / "maps" / f"{name}.depth.png")
        assert written.mode == "I;16" and np.abs(np.asarray(written) / 1000 - one).max() < 1.1e-3
        preview = np.asarray(Image.open(photos / "maps" / f"{name}.preview.png")).sum(axis=2, dtype=int)
        assert preview.shape == one.shape and preview[one == one.min()].mean() > 500 > preview[one == one.max()].mean()
    assert run("--workdir run photos --out maps") == 0  # its own files are made anew
    (photos / "maps" / "hall.depth.png").write_text("mine")
    assert run("--workdir run photos --out maps") == 2
    assert "hall.depth.png is no file of `tif predict`, and would be overwritten; choose another --out" in last_line(
        capsys
    )
    assert run("--workdir run photos --csv table.csv") == 2
    assert "--csv is for classes of pictures, and this is a model of depth: --out DIR has its maps" in last_line(capsys)


def test_what_is_farther_than_a_file_can_say_is_told(photos, capsys):
    fields = FIELDS | dict(max_depth=500.0)
    save(photos / "far", lively(fields), fields)
    assert run("--workdir far photos --out maps") == 0
    assert "pixels are farther than 65.535 m, the most that the file can say, and have that" in capsys.readouterr().err


def test_classes_as_files(photos, capsys):
    model = lively(CLASSES)
    model.decoder.out.bias[...] -= expected(model, ["photos/room.png"]).mean(
        axis=(0, 1, 2)
    )  # or one class is everywhere
    save(photos / "run", model, CLASSES)
    assert run("--weights run photos/room.png --out maps") == 0
    (logits,) = expected(model, ["photos/room.png"])
    written = np.asarray(Image.open(photos / "maps" / "room.classes.png"))
    assert (written == logits.argmax(axis=-1)).mean() > 0.99 and len({*written.flat}) > 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len({*written.flat}) and lines[1].endswith(
        f"class {np.bincount(written.reshape(-1)).argmax()}"
    )


def test_outputs_that_are_no_numbers_are_no_class():
    model = lively(CLASSES)
    bias = params_of(model)["decoder"]["out"]["bias"]
    nnx.update(model, {"decoder": {"out": {"bias": bias.at[1].set(np.nan)}}})
    with pytest.raises(WorkError, match="are no numbers"):
        tif_jax.predict_maps(model, picture(0))


def test_in_python_and_what_is_refused(photos, capsys):
    model = lively(FIELDS)
    found = model.predict_maps(["photos/room.png", "photos/bad.png"])
    assert [one.file for one in found] == ["photos/room.png", "photos/bad.png"]
    assert found[1].pixels is None and "bad.png" in found[1].error
    np.testing.assert_allclose(found[0].pixels, expected(model, ["photos/room.png"])[0], atol=1e-4)
    assert (
        found[0].pixels.dtype == np.float32
        and tif_jax.predict_maps(lively(CLASSES), picture(0))[0].pixels.dtype == np.int32
    )
    with pytest.raises(
        InputError, match="a prediction needs classes of pictures, and this is a model of depth, which pred"
    ):
        model.predict_images("photos/room.png")
    with pytest.raises(InputError, match="new heads are for classes of pictures, and this is a model of depth"):
        with_fresh_heads(model, 3, 0)
    with pytest.raises(InputError, match="fit teaches classes of pictures, and this is a model of depth: `tif train`"):
        tif_jax.fit(model, [picture(0)] * 2, ["a", "b"])
    classifier = dict(image_size=16, patch_size=8, width=16, depth=1, num_heads=2, num_classes=3)
    with pytest.raises(
        InputError, match="a map of pixels needs a depth or segmentation model, and this is a classifier"
    ):
        lively(classifier).predict_maps("photos/room.png")
    save(photos / "plain", lively(classifier), classifier)
    capsys.readouterr()
    assert run("--workdir plain photos --out maps") == 2
    assert "--out is for models of depth or segmentation, and this is a classifier" in last_line(capsys)
