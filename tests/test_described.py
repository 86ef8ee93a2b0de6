"""What weights say of themselves: how images are prepared, classes, fields that no shape tells. It travels with them."""

import inspect
import json
import logging
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
from cases import lively, mostly_long, numpy_images
from pictures import picture
from reference import random_timm_tensors
from small_project import CONFIG, last_line, tif

import tif_jax
from tif_jax.__main__ import main
from tif_jax.data.preprocess import Preprocessing, evaluation_view
from tif_jax.errors import InputError
from tif_jax.experiment import config as config_file
from tif_jax.models.model import carried
from tif_jax.models.params import params_of
from tif_jax.runtime import records
from tif_jax.training.checkpoints import Checkpoints
from tif_jax.training.state import State

HALF = (0.5, 0.5, 0.5)
HOW = Preprocessing(crop_fraction=0.9, mean=HALF, std=(0.25, 0.5, 0.5), interpolation="bilinear")
SIZE = dict(width=32, depth=1, patch_size=8, grid=(2, 2), num_classes=3)
WEIGHTS = {"input_size": [3, 16, 16], "crop_pct": 0.9, "mean": HALF, "std": HOW.std, "interpolation": "bilinear"}
TIMMS = {"architecture": "vit_of_mine", "num_classes": 3, "num_features": 32, "global_pool": "token"}
TIMMS |= {"model_args": {"num_heads": 4}, "pretrained_cfg": WEIGHTS}


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder, config=None, **variant):
    """A weight file that says nothing, and timm's config.json beside it."""
    folder.mkdir(exist_ok=True)
    tensors = random_timm_tensors(np.random.default_rng(0), **{**SIZE, **variant})
    safetensors.numpy.save_file(tensors, folder / "w.safetensors")
    if config is not None:
        (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder / "w.safetensors"


def save(directory, model, fields, changed=None):
    described = {"model": fields, "reducer": {"name": "full"}, "config": {}, **carried(model), **(changed or {})}
    with Checkpoints(directory / "checkpoints") as checkpoints:
        checkpoints.save(State(np.int32(7), params_of(model), ()), described, {})


def logits(model):
    return jax.jit(lambda x: model(x)[0])(numpy_images(2, model.image_size))


FLAT = {"architecture": "vit_of_mine", "num_classes": 3, **WEIGHTS}  # as timm's files were before 2023
NAMES = {"label_names": ["n1", "n2", "n3"]}
DESCRIBED = {"label_descriptions": {"n1": "cat", "n3": "dog"}}


@pytest.mark.parametrize(
    ("config", "how", "names"),
    [
        (TIMMS, HOW, None),
        (FLAT | {"num_heads": 4}, HOW, None),
        (TIMMS | NAMES, HOW, ("n1", "n2", "n3")),
        (TIMMS | {"pretrained_cfg": WEIGHTS | NAMES | DESCRIBED}, HOW, ("cat", "n2", "dog")),
        (TIMMS | {"label_names": {"2": "c", "0": "a", "1": "b"}}, HOW, ("a", "b", "c")),
        (TIMMS | {"pretrained_cfg": {"mean": HALF, "std": HALF}}, Preprocessing(mean=HALF, std=HALF), None),
    ],
)
def test_timms_description_beside_the_file(tmp_path, caplog, config, how, names):
    path = write(tmp_path, config)
    model = tif_jax.load(path, num_heads=4)
    assert (model.preprocessing, model.class_names) == (how, names)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    image = picture(rows=40, columns=30)
    expected = evaluation_view(image, (16, 16), how.crop_fraction, how.mean, how.std, how.interpolation)
    for prepared in (model.preprocess([image]), tif_jax.preprocess([image], model)):
        np.testing.assert_array_equal(prepared[0], expected)


def test_heads_and_gelu_are_timms(tmp_path):
    path = write(tmp_path, TIMMS | {"model_args": {"num_heads": 4, "act_layer": "gelu_tanh"}})
    np.testing.assert_array_equal(
        logits(tif_jax.load(path)), logits(tif_jax.load(write(tmp_path / "b"), num_heads=4, gelu="tanh"))
    )
    path = write(tmp_path, {"architecture": "vit_small_patch16_224", "pretrained_cfg": WEIGHTS}, width=384)
    assert tif_jax.load(path).block_0.attention.num_heads == 6


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "config.json can not be read"),
        (TIMMS | {"num_classes": 4}, "config.json is not of these weights: it says num_classes 4, the tensors 3"),
        (TIMMS | {"num_features": 64}, "config.json is not of these weights: it says width 64, the tensors 32"),
        (TIMMS | {"global_pool": "avgmax"}, "config.json: global_pool 'avgmax' is not supported"),
        (TIMMS | {"model_args": {"act_layer": "silu"}}, "config.json: act_layer 'silu' is not supported"),
        (TIMMS | {"pretrained_cfg": {"mean": [123.7] * 3, "std": HALF}}, "config.json: mean is .* divide by 255"),
        (TIMMS | {"pretrained_cfg": 7}, "config.json: .* no dict"),
        (TIMMS | {"pretrained_cfg": WEIGHTS | {"input_size": "224"}}, "config.json: image_size is '224'"),
        (TIMMS | {"model_args": {"num_heads": "4"}}, "config.json: num_heads is '4'; it is a whole number"),
        (TIMMS | {"global_pool": ["token"]}, "config.json: global_pool .* is not supported"),
    ],
)
def test_description_that_can_not_be(tmp_path, config, message):
    with pytest.raises(InputError, match=message):
        tif_jax.load(write(tmp_path, config))


def test_given_otherwise_than_the_file_says(tmp_path):
    path = write(tmp_path, TIMMS)
    with pytest.raises(InputError, match=r"num_heads=2 contradicts .*config.json, which says 4; leave it out"):
        tif_jax.load(path, num_heads=2)
    assert tif_jax.load(path, preprocessing=dict(mean=(0.0, 0.0, 0.0))).preprocessing.mean == (0.0, 0.0, 0.0)
    assert tif_jax.load(path, num_classes=5).class_names is None
    for wrong, message in (
        (dict(mean=(123.7, 116.3, 103.5)), "mean is .* divide by 255"),
        (dict(mead=0.5), "preprocessing is {'mead': 0.5}; it is a dict of some of crop_fraction, mean"),
        ("imagenet", "preprocessing is 'imagenet'; it is a dict"),
    ):
        with pytest.raises(InputError, match=message):
            inspect.unwrap(tif_jax.load)(path, preprocessing=wrong)


def test_a_file_that_says_nothing(tmp_path, caplog):
    path = write(tmp_path, {"model_type": "of another program"})
    assert tif_jax.load(path, num_heads=4).preprocessing == Preprocessing()
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert all(
        word in line for word in ("w.safetensors", "(0.485, 0.456, 0.406)", "0.875", "bicubic", "preprocessing=")
    )
    caplog.clear()
    assert tif_jax.load(path, num_heads=4, preprocessing=dict(mean=HALF, std=HALF)).preprocessing.mean == HALF
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("fields", mostly_long([
    dict(image_size=16, patch_size=8, width=32, depth=1, num_heads=4, num_classes=3, pool="mean", class_token=False),
    # 2x8 patches have as many rows as 4x4.
    dict(image_size=(16, 64), patch_size=8, width=32, depth=1, num_heads=2, num_classes=3, gelu="tanh", norm_eps=1e-2),
    dict(image_size=32, patch_size=8, width=32, depth=1, num_heads=2, num_classes=3, pool="normed_mean"),
    dict(family="levit", image_size=32, widths=(16,), depths=(1,), num_heads=(2,), key_dim=8, num_classes=3,
         activation="silu"),
], short=(1, 3)))  # fmt: skip
def test_conversions_carry_all_of_it(place, fields, caplog):
    model = lively(fields)
    model.preprocessing, model.class_names = HOW, ("cat", "cow", "dog")
    save(place / "run", model, fields)
    for source, made in (("run", "a.safetensors"), ("a.safetensors", "b"), ("b", "c.safetensors")):
        assert main(["convert", source, made]) == 0
        loaded = tif_jax.load(made)
        assert (loaded.preprocessing, loaded.class_names) == (HOW, ("cat", "cow", "dog"))
        np.testing.assert_array_equal(logits(loaded), logits(model))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_conversion_does_not_say_what_was_assumed(place, caplog):
    write(place)
    assert main(["convert", "w.safetensors", "again.safetensors", "--to=safetensors"]) == 2  # how many heads?
    write(place, width=192, depth=12)
    for source, made in (("w.safetensors", "a"), ("a", "b.safetensors"), ("b.safetensors", "c")):
        assert main(["convert", source, made]) == 0
        caplog.clear()
        logging.getLogger("tif_jax").propagate = True
        assert tif_jax.load(made).preprocessing == Preprocessing()
        assert f"{made} does not say" in caplog.text


@pytest.mark.parametrize("said", [
    "{", "7", '{"fields": 7}', '{"fields": {"num_heads": "4"}}', '{"fields": {}, "preprocessing": {"mean": [9, 9, 9]}}',
])  # fmt: skip
def test_damaged_metadata(tmp_path, said):
    tensors = random_timm_tensors(np.random.default_rng(0), **SIZE)
    safetensors.numpy.save_file(tensors, tmp_path / "w.safetensors", metadata={"tif_jax": said})
    with pytest.raises(InputError, match=r"w\.safetensors: "):
        tif_jax.load(tmp_path / "w.safetensors")


# What is loaded is data, not code


FIELDS = dict(image_size=16, patch_size=8, width=16, depth=1, num_heads=2, num_classes=3)
PAYLOAD = """
from pathlib import Path
from tif_jax.reducers.full import Full as Payload
Path("proof").touch()
"""


@pytest.mark.parametrize(
    "reducer",
    [
        {"name": "shared_run.payload"},
        {"name": "tif", "keep_ratio": 0.5, "then": {"name": "shared_run.payload"}},
    ],
)
def test_a_checkpoint_can_not_name_code(place, monkeypatch, reducer):
    (place / "shared_run").mkdir()
    (place / "shared_run" / "payload.py").write_text(PAYLOAD)
    monkeypatch.syspath_prepend(str(place))
    for name in ("shared_run.payload", "shared_run"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    save(place / "run", lively(FIELDS), FIELDS, dict(reducer=reducer))
    with pytest.raises(InputError, match=r"run names the module shared_run\.payload, .*reducer='shared_run\.payload'"):
        tif_jax.load("run")
    assert not (place / "proof").exists()
    assert tif_jax.load("run", reducer="full")
    options = {key: value for key, value in reducer.items() if key != "keep_ratio"}  # named by the caller
    assert tif_jax.load("run", reducer=options.pop("name"), **options)
    assert (place / "proof").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(reducer=7), "no checkpoint of tif_jax"),
        (dict(model=None), "no checkpoint of tif_jax"),
        (dict(model=FIELDS | dict(width="16")), "width is '16'; it is a whole number"),
        (dict(model=FIELDS | dict(family="resnet")), "family is 'resnet'"),
        (dict(model=FIELDS | dict(wings=2)), "Unknown model fields wings"),
        (dict(preprocessing=7), "what it says of its model is damaged"),
        (dict(preprocessing={"std": [0.0, 1.0, 1.0]}), "run: std is"),
    ],
)
def test_what_a_checkpoint_says_is_checked(place, changed, message):
    save(place / "run", lively(FIELDS), FIELDS, changed)
    with pytest.raises(InputError, match=message):
        tif_jax.load("run")


@pytest.mark.parametrize(
    ("best", "message"),
    [
        ("../other", "run/report.json: best is '../other', no folder of this workdir"),
        ("/tmp", "best is '/tmp', no folder"),
        (7, "best is 7, no folder"),
        (["x"], "best is .*, no folder"),
        (".", "no checkpoint in run"),
        ("full-1-0", "no checkpoint in run"),
    ],
)
def test_a_report_can_not_lead_out_of_its_workdir(place, best, message):
    save(place / "other", lively(FIELDS), FIELDS)
    records.write(place / "run" / "report.json", {"best": best})
    with pytest.raises(InputError, match=message):
        tif_jax.load("run")


def test_a_name_is_no_file():
    with pytest.raises(InputError, match=r"is the name of a model.*tif_jax\.create_model\('deit_tiny_patch16_224'\)"):
        tif_jax.load("deit_tiny_patch16_224")
    with pytest.raises(InputError, match="the source is None"):
        inspect.unwrap(tif_jax.load)(None)


def test_orbax_says_nothing_when_a_checkpoint_is_loaded(place, caplog):
    save(place / "run", lively(FIELDS), FIELDS)
    caplog.clear()
    tif_jax.load("run")
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_what_is_fresh_is_told_by_module(tmp_path, caplog):
    fields = dict(image_size=16, patch_size=8, width=32, depth=1, num_heads=4, num_classes=3)
    save(tmp_path, lively(fields), fields)
    tif_jax.load(tmp_path, reducer="tif", adapter=4)
    (line,) = [line for line in caplog.messages if "freshly initialised" in line]
    assert line.endswith(": freshly initialised: reducer/adapter, reducer/filter")


# Experiments


def resolved(path, **data):
    settings = dict(data=dict(image_size=16, **data), backbone=dict(init_from=str(path)))
    return config_file.from_settings(settings).data


def test_a_config_has_what_its_weights_say(tmp_path, caplog, monkeypatch):
    path = write(tmp_path, TIMMS)
    assert resolved(path).preprocessing == HOW and resolved(path).mean == HALF
    assert resolved(path, mean=HALF).preprocessing == HOW
    assert not caplog.records
    assert resolved(path, crop_fraction=1.0).crop_fraction == 1.0
    assert "data.crop_fraction is 1.0" in caplog.text and "config.json says 0.9" in caplog.text
    for part, value in (("mean", (0.485, 0.456, 0.406)), ("std", HALF)):
        with pytest.raises(InputError, match=rf"data\.{part} is .* but .*config\.json says .*none"):
            resolved(path, **{part: value})
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolved("~/w.safetensors").preprocessing == HOW
    (tmp_path / "v.safetensors").write_bytes(b"")
    assert resolved(path).preprocessing == HOW and "lies beside v.safetensors as well" in caplog.text
    silent = write(tmp_path / "silent")
    caplog.clear()
    assert resolved(silent).preprocessing == Preprocessing()
    assert "silent/w.safetensors does not say" in caplog.text and "data.mean" in caplog.text
    caplog.clear()
    assert resolved(silent, mean=HALF, std=HALF).mean == HALF
    assert not caplog.records
    assert resolved(tmp_path / "none.safetensors").preprocessing == Preprocessing()
    assert "none.safetensors', which is not there, does not say" in caplog.text


def test_every_stage_and_who_loads_it_prepare_images_alike(place, capsys):
    """A run with numbers of its own: its weights carry them, a run that imports them takes them, no other numbers pass."""
    (place / "config.py").write_text(CONFIG)
    (place / "data").mkdir()
    rows = ["file,label"]
    for i in range(8):
        picture(i, rows=16, columns=16).save(place / "data" / f"{i}.png")
        rows.append(f"{i}.png,{i % 2}")
    for split in ("train", "test"):
        (place / "data" / f"{split}.csv").write_text("\n".join(rows))
    half = "--config.data.mean=.5,.5,.5 --config.data.std=.5,.5,.5"
    assert tif(f"train --stage=backbone --config.backbone.num_epochs=1 {half}") == 0
    model = tif_jax.load("run/backbone")
    assert model.preprocessing == Preprocessing(1.0, HALF, HALF)
    pixels = np.asarray(picture(3, rows=16, columns=16), np.float32)
    np.testing.assert_allclose(model.preprocess(["data/3.png"])[0], pixels / 127.5 - 1, atol=1e-6)
    assert main(["convert", "run/backbone", "w.safetensors"]) == 0
    # A config that says nothing of them has the weights' numbers, and the heads that they had.
    imported = "--workdir=second --config.backbone.init_from=w.safetensors"
    assert tif(f"train --stage=backbone {imported}") == 0
    second = tif_jax.load("second/backbone")
    assert second.preprocessing == model.preprocessing
    np.testing.assert_array_equal(logits(second), logits(model))
    capsys.readouterr()
    for line, named in (
        (f"train --stage=backbone {imported} --config.data.mean=.4,.4,.4", "w.safetensors says (0.5, 0.5, 0.5)"),
        (f"train --stage=backbone {imported} --config.backbone.num_heads=4", "num_heads=4 contradicts w.safetensors"),
        (f"train --stage=backbone {imported} --config.backbone.model.num_heads=4", "num_heads=4 contradicts"),
        ("evaluate --stage=backbone", "the network takes images with mean (0.5, 0.5, 0.5)"),
        (
            f"train --stage=finetune {half} --config.reducer.name=full --config.finetune.distillation.kind=hard"
            " --config.finetune.distillation.teacher=other",
            "the teacher other takes images with mean (0.485, 0.456, 0.406)",
        ),
    ):
        if "teacher" in line:
            save(place / "other", tif_jax.create_model(FIELDS | dict(num_classes=2)), FIELDS | dict(num_classes=2))
        assert tif(line) == 2
        assert named in last_line(capsys)
