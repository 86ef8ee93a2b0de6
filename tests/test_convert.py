"""`tif convert`: weights there and back, data sets from TFRecord to array_record, and what is refused."""

import errno
import io
import json
import logging
import resource
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from cases import lively, mostly_long, numpy_images, write_safetensors
from PIL import Image
from reference import COMPUTED, VARIANTS, random_timm_tensors
from reference_levit import random_levit_tensors

from benchmarks.tfds_folder import write_tfds_folder
from tif_jax import load
from tif_jax.__main__ import main
from tif_jax.data.tfds import Tfds
from tif_jax.errors import InputError
from tif_jax.models import with_defaults
from tif_jax.models.params import params_of
from tif_jax.training.checkpoints import Checkpoints
from tif_jax.training.state import State
from tif_jax.weights import pretrained

WIDE = dict(width=64, num_heads=2, mlp_dim=48, depth=6)  # as timm's test_vit: what a file need not say


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty folder as the current one and the home; the log goes to what is stderr now."""
    logging.getLogger("tif_jax").handlers.clear()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    yield tmp_path
    logging.getLogger("tif_jax").handlers.clear()


def convert(*words):
    return main(["convert", *map(str, words)])


def last_line(capsys):
    return capsys.readouterr().err.splitlines()[-1]


def vit(**variant):
    return random_timm_tensors(np.random.default_rng(0), **variant)


def levit(**variant):
    return random_levit_tensors(np.random.default_rng(0), **variant)


def logits(model):
    return jax.jit(lambda x: model(x)[0])(numpy_images(2, model.image_size))


def save(directory, model, fields, reducer="full"):
    with Checkpoints(directory / "checkpoints") as checkpoints:
        described = {"model": fields, "reducer": {"name": reducer}, "config": {}}
        checkpoints.save(State(np.int32(7), params_of(model), ()), described, {})


# Weights --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_layout_and_back(place, name):
    variant = VARIANTS[name]
    tensors = vit(**variant)
    given = {} if "qk_norm" in variant else {"num_heads": variant.get("num_heads", 2)}
    given |= {"gelu": COMPUTED[name]["gelu"]} if name in COMPUTED else {}
    given |= {} if variant.get("head", True) else {"num_classes": 0}
    fields, params = pretrained.read_weights(write_safetensors(place / "w.safetensors", tensors), **given)
    back, free = pretrained.to_tensors(params, fields)
    assert (
        back.keys() == tensors.keys() and free.items() <= with_defaults(fields).items() and free.keys() >= given.keys()
    )
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(back[key], tensor, err_msg=key)


@pytest.mark.parametrize("variant", [{}, dict(distilled=False), dict(convolutional=True)], ids=str)
def test_levit_layout_and_back(place, variant):
    path = write_safetensors(place / "w.safetensors", levit(**variant))
    fields, params = pretrained.read_weights(path)
    back, _ = pretrained.to_tensors(params, fields)
    theirs = {name: t for name, t in levit(**variant).items() if not name.endswith("num_batches_tracked")}
    assert back.keys() == theirs.keys()
    for key, tensor in theirs.items():
        is_1x1 = tensor.ndim == 4 and key.startswith("stages")
        np.testing.assert_array_equal(back[key], tensor[..., 0, 0] if is_1x1 else tensor, err_msg=key)


@pytest.mark.parametrize("tensors", mostly_long([vit(**WIDE), levit(depths=(1, 1))]), ids=["vit", "levit"])
def test_to_orbax_and_back(place, tensors):
    path = write_safetensors(place / "w.safetensors", tensors)
    assert convert(path, "runs/imported") == 0
    assert convert("runs/imported", "back.safetensors") == 0
    assert not list(place.rglob(".*partial"))
    models = [load(source) for source in (path, "runs/imported", "runs/imported/checkpoints/0", "back.safetensors")]
    expected = logits(models[0])
    assert np.abs(expected).max() > 0.1
    for model in models[1:]:
        for a, b in zip(*(jax.tree.leaves(params_of(m)) for m in (models[0], model)), strict=True):
            np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(logits(models[-1]), expected)


def test_npz_to_safetensors(place):
    np.savez(place / "w.npz", **vit(**WIDE))
    assert convert("w.npz", "w.safetensors", "--to=safetensors") == 0
    read = pretrained.read_tensors(place / "w.safetensors")
    for name, tensor in vit(**WIDE).items():
        np.testing.assert_array_equal(read[name], tensor)


def test_of_a_checkpoint_with_a_filter_the_backbone_is_written(place, capsys):
    fields = dict(
        image_size=16, patch_size=8, width=64, depth=6, num_heads=2, num_classes=3, pool="mean", class_head=True
    )
    model = lively(fields, reducer="tif", keep_ratio=0.5)
    save(place / "run", model, fields, "tif")
    assert convert("run", "w.safetensors") == 0
    err = capsys.readouterr().err
    assert "left out" in err and all(name in err for name in ("reducer", "class_head", "class_norm"))
    loaded, original = load("w.safetensors"), load("run", reducer="full")
    np.testing.assert_allclose(logits(loaded), logits(original), atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            dict(family="levit", image_size=48, widths=(16,), depths=(1,), num_heads=(2,), key_dim=8, num_classes=5,
                 positions="absolute", class_token=True),
            "no place for class_token, position_embedding",
        ),
    ],
)  # fmt: skip
def test_model_that_timm_does_not_have(place, capsys, fields, message):
    save(place / "run", lively(fields), fields)
    assert convert("run", "w.safetensors") == 2
    with pytest.raises(InputError, match=message):
        pretrained.to_tensors(params_of(lively(fields)), fields)
    assert not list(place.glob("*w.safetensors*"))


def test_timm_takes_the_file(place):
    timm, torch = pytest.importorskip("timm"), pytest.importorskip("torch")
    from safetensors.torch import load_file

    fields = dict(image_size=32, patch_size=8, width=64, depth=2, num_heads=1, num_classes=3, mlp_dim=256)
    model = lively(fields)
    save(place / "run", model, fields)
    assert convert("run", "w.safetensors") == 0
    theirs = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=1, num_classes=3
    )
    theirs.load_state_dict(load_file("w.safetensors"))
    with torch.no_grad():
        expected = theirs.eval()(torch.from_numpy(np.array(numpy_images(2, (32, 32))).transpose(0, 3, 1, 2)))
    np.testing.assert_allclose(logits(model), expected.numpy(), atol=1e-4)


# Data -----------------------------------------------------------------------------------------------------------------


def write_tiny(folder, size=(6, 5)):
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict(
        {"image": tfds.features.Image(encoding_format="jpeg"), "label": tfds.features.ClassLabel(names=["a", "b"])}
    )

    def example(i):
        buffer = io.BytesIO()
        noise = np.random.default_rng(i).integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(noise).save(buffer, "JPEG", quality=95)
        return {"image": buffer.getvalue(), "label": i % 2}

    splits = {"train": [range(3), range(3, 7)], "test": [range(7, 9)]}
    splits = {name: [[example(i) for i in shard] for shard in shards] for name, shards in splits.items()}
    return write_tfds_folder(folder, "tfrecord", splits, features)


@contextmanager
def changed_info(folder):
    """dataset_info.json's content, written back."""
    info = json.loads((folder / "dataset_info.json").read_text())
    yield info
    (folder / "dataset_info.json").write_text(json.dumps(info))


def test_tfrecord_becomes_array_record(place, capsys):
    files = write_tiny(place / "old" / "tiny" / "1.0.0")
    with changed_info(files[0].parent) as info:
        info["splits"].append({"name": "empty", "filepathTemplate": info["splits"][0]["filepathTemplate"]})
    (place / "old" / "tiny" / "1.0.0" / "NOTES.txt").write_text("kept")
    before = {path.name: path.read_bytes() for path in files[0].parent.iterdir()}
    assert convert("old/tiny/1.0.0", "new/any_name") == 0
    assert "9 of 9 record" in capsys.readouterr().err
    for split in "train", "test[1:]+train[2:5]":
        old, new = Tfds("tiny", "old", split), Tfds("", "new/any_name", split)
        assert [old._records[i] for i in range(len(old))] == [new._records[i] for i in range(len(new))]
        assert [old[i]["id"] for i in range(len(old))] == [new[i]["id"] for i in range(len(new))]
        assert new.class_names == ("a", "b")
    assert (place / "new" / "any_name" / "NOTES.txt").read_text() == "kept"
    for path in (place / "new" / "any_name").glob("*array_record*"):
        assert "group_size:1," in ArrayRecordReader(str(path)).writer_options_string()
    assert {path.name for path in (place / "new").rglob("*")} == {"any_name"} | {
        name.replace("tfrecord", "array_record") for name in before
    }
    assert {path.name: path.read_bytes() for path in files[0].parent.iterdir()} == before


def test_folder_from_before_formats_were_noted(place):
    folder = write_tiny(place / "old")[0].parent
    with changed_info(folder) as info:
        del info["fileFormat"]
    assert len(Tfds("", folder, "train")) == 7
    assert convert("old", "new") == 0
    assert len(Tfds("", "new", "train")) == 7


@pytest.mark.parametrize("byte", [3, 40])  # of a length, of data
def test_damaged_source_leaves_nothing(place, capsys, byte):
    path = write_tiny(place / "old")[1]
    content = bytearray(path.read_bytes())
    content[byte] ^= 1
    path.write_bytes(content)
    assert convert("old", "new") == 2
    assert "tiny-train.tfrecord-00001-of-00002" in last_line(capsys)
    assert {path.name for path in place.iterdir()} == {"old", "home"}


def test_full_disk_leaves_nothing(place, capsys):
    write_tiny(place / "old", size=(60, 80))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))  # no file can grow beyond this
    try:
        assert convert("old", "new") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "tiny-train.array_record-00000-of-00002 was not written: " in last_line(capsys)
    assert {path.name for path in place.iterdir()} == {"old", "home"}
    assert convert("old", "new") == 0


def test_full_disk_leaves_no_weights(place, capsys, monkeypatch):
    def full(self, *_):
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    path = write_safetensors(place / "w.npz", {})
    np.savez(path, **vit(**WIDE))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert convert("w.npz", "w.safetensors", "--to=safetensors") == 1
    assert "make room" in last_line(capsys) and {path.name for path in place.iterdir()} == {"w.npz"}


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.fixture
def sources(place):
    write_safetensors(place / "w.safetensors", vit(**WIDE))
    write_tiny(place / "data" / "tiny" / "1.0.0")
    (place / "folder").mkdir()
    (place / "notes.txt").write_text("")
    fields = dict(image_size=16, patch_size=8, width=64, depth=1, num_heads=1, num_classes=3)
    save(place / "run", lively(fields), fields)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("", "required: SRC, DST"),
        ("w.safetensors", "required: DST"),
        ("missing.pth new", "no such file or folder: missing.pth"),
        ("w.safetensors new --to=onnx", "--to: invalid choice: 'onnx' (choose from"),
        ("w.safetensors new --form=orbax", "unrecognized arguments: --form=orbax; `tif convert --help`"),
        ("w.safetensors run", "run exists already; choose another name"),
        ("w.safetensors notes.txt/new", "notes.txt"),
        ("data/tiny/1.0.0 folder", "folder exists already"),
        ("w.safetensors new --to=array_record", "can not be converted to array_record; allowed: orbax, safetensors"),
        ("run new --to=orbax", "can not be converted to orbax; allowed: safetensors"),
        ("data/tiny/1.0.0 new --to=safetensors", "can not be converted to safetensors; allowed: array_record"),
        ("run new", "new has to end in .safetensors"),
        ("folder new", "folder holds neither a checkpoint nor, prepared by TFDS, a data set"),
        ("data new", "data holds data sets; give the folder of one: data/tiny/1.0.0"),
        ("notes.txt new", "notes.txt is not a weight file by its name; allowed: .safetensors"),
        ("gs://bucket/tiny new", "gs://bucket/tiny: convert works on local files; mount the bucket"),
    ],
)
def test_refused(sources, place, capsys, line, named):
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    assert convert(*line.split()) == 2
    assert named in last_line(capsys)
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


def test_array_record_needs_no_conversion(sources, capsys):
    assert convert("data/tiny/1.0.0", "new") == 0
    assert convert("new", "newer") == 2
    assert "new is prepared as array_record; only TFRecord is converted" in last_line(capsys)


def test_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["convert", "--help"])
    assert stopped.value.code == 0 and "SRC DST" in capsys.readouterr().out
