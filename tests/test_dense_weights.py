"""Depth and segmentation models among weights: begun from a classifier's, kept whole there and back, refused otherwise."""

import logging

import jax
import numpy as np
import pytest
import safetensors.numpy
from cases import lively, mostly_long, numpy_images, write_safetensors
from flax import traverse_util
from reference import random_timm_tensors
from reference_levit import random_levit_tensors
from test_convert import save

import tif_jax
from tif_jax.__main__ import main
from tif_jax.errors import InputError
from tif_jax.models import built_with, with_defaults
from tif_jax.models.params import params_of
from tif_jax.weights.loading import load_with_fields

SMALL = dict(width=32, num_heads=2, depth=4, patch_size=8, image_size=(24, 32))
DEPTH = dict(SMALL, task="depth", decoder_width=8, max_depth=5.0, decoder_blocks=(0, 1, 2, 3), fill="embedding")
CLASSES = dict(SMALL, task="segmentation", decoder="linear", num_classes=3)


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("tif_jax").handlers.clear()
    yield
    logging.getLogger("tif_jax").handlers.clear()


@pytest.fixture
def classifier(tmp_path):
    """A file in timm's layout, 7 classes, 4 x 4 patches."""
    tensors = random_timm_tensors(np.random.default_rng(0), width=32, depth=4, patch_size=8, grid=(4, 4), num_classes=7)
    return write_safetensors(tmp_path / "timm.safetensors", tensors)


def flat(params):
    return traverse_util.flatten_dict(params, sep="/")


def predicted(model):
    return np.asarray(jax.jit(lambda x: model(x)[0])(numpy_images(2, model.image_size)))


def same(one, other):
    one, other = (flat(params_of(model)) for model in (one, other))
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("saved_as", mostly_long(["file", "checkpoint"]))
def test_a_classifier_becomes_the_backbone_of_a_depth_model(classifier, tmp_path, saved_as, caplog):
    plain, fields = load_with_fields(classifier, num_heads=2)
    if saved_as == "checkpoint":
        save(tmp_path / "plain", plain, {**fields, "class_head": False})
    source = classifier if saved_as == "file" else tmp_path / "plain"
    more = {"num_heads": 2} if saved_as == "file" else {}
    with caplog.at_level("WARNING"):
        model = tif_jax.load(source, task="depth", image_size=(24, 40), decoder_width=8, **more)
    assert caplog.text.count("freshly initialised: decoder\n") == 1
    assert model.task == "depth" and model.num_classes == 0 and model.class_names is None
    depth = predicted(model)
    assert depth.shape == (2, 24, 40) and (0 < depth).all() and (depth < 10).all()
    ours, theirs = flat(params_of(model)), flat(params_of(plain))
    assert not any(name.startswith("head") for name in ours)
    kept = [name for name in ours if not name.startswith("decoder/") and name != "position_embedding"]
    assert len(kept) > 40 and all(np.array_equal(ours[name], theirs[name]) for name in kept)
    assert ours["position_embedding"].shape == (1, 1 + 15, 32)
    again = tif_jax.load(source, task="depth", image_size=(24, 40), decoder_width=8, **more)
    other = tif_jax.load(source, task="depth", image_size=(24, 40), decoder_width=8, seed=1, **more)
    assert same(model, again) and not same(model, other)


def test_what_begins_segmentation(classifier):
    model = tif_jax.load(classifier, num_heads=2, task="segmentation", num_classes=3, decoder="linear")
    assert predicted(model).shape == (2, 32, 32, 3) and built_with(model)["model"]["num_classes"] == 3
    with pytest.raises(InputError, match="task='segmentation' needs num_classes, the number of classes that a pixel"):
        tif_jax.load(classifier, num_heads=2, task="segmentation")


@pytest.mark.parametrize("pool", mostly_long(["mean", "attention"], short=(1,)))
def test_other_poolings_leave_no_trace(tmp_path, pool):
    fields = dict(SMALL, num_classes=5, pool=pool, class_head=pool == "mean")
    save(tmp_path / "plain", lively(fields), fields)
    assert predicted(tif_jax.load(tmp_path / "plain", task="depth", decoder_width=8)).shape == (2, 24, 32)


@pytest.mark.parametrize("fields", mostly_long([DEPTH, CLASSES]), ids=["depth", "segmentation"])
def test_there_and_back(tmp_path, fields, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = lively(fields, reducer="tosa", keep_ratio=0.5)
    save(tmp_path / "run", model, fields, "tosa")
    for words in (("run", "model.safetensors"), ("model.safetensors", "back"), ("back", "again.safetensors")):
        assert main(["convert", *words]) == 0
    for name in ("model.safetensors", "back", "again.safetensors"):
        found, told = load_with_fields(name)
        full = lively(fields)
        assert found.task == fields["task"] and found.num_classes == full.num_classes
        ours = {path: leaf for path, leaf in flat(params_of(model)).items() if not path.startswith("reducer/")}
        read = flat(params_of(found))
        assert ours.keys() == read.keys() and all(np.array_equal(ours[path], read[path]) for path in ours)
        told = with_defaults(told)
        assert {key: told[key] for key in fields if key != "image_size"} | {"image_size": (24, 32)} == fields
        if fields is DEPTH:
            assert found.max_depth == 5.0 and found.fill == "embedding"


def test_another_size_keeps_the_decoder(tmp_path):
    save(tmp_path / "run", lively(DEPTH), DEPTH)
    found = tif_jax.load(tmp_path / "run", image_size=(40, 24), fill="position")
    assert predicted(found).shape == (2, 40, 24)
    assert np.array_equal(found.decoder.last.kernel[...], lively(DEPTH).decoder.last.kernel[...])


def test_a_fresh_head_may_be_another(tmp_path):
    save(tmp_path / "run", lively(DEPTH), DEPTH)
    given = dict(decoder_width=16, max_depth=10.0, fresh_head=True)
    drawn, fields = load_with_fields(tmp_path / "run", num_classes=0, **given)
    assert fields["decoder_width"] == 16 and not np.array_equal(
        drawn.decoder.out.bias[...], lively(DEPTH).decoder.out.bias
    )
    classes, _ = load_with_fields(tmp_path / "run", task="classification", num_classes=4, fresh_head=True)
    assert predicted(classes).shape == (2, 4)
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "w.safetensors")]) == 0
    classes, _ = load_with_fields(tmp_path / "w.safetensors", task="classification", num_classes=4, fresh_head=True)
    assert predicted(classes).shape == (2, 4)


@pytest.mark.parametrize("form", ["file", "checkpoint"])
def test_what_is_refused(tmp_path, form):
    source = tmp_path / "run"
    save(source, lively(DEPTH), DEPTH)
    if form == "file":
        source = tmp_path / "w.safetensors"
        assert main(["convert", str(tmp_path / "run"), str(source)]) == 0
    for given, said in (
        (
            dict(task="classification"),
            "task='classification' asks for a head that .* does not have: it is a model of depth",
        ),
        (dict(task="segmentation", num_classes=3), "task='segmentation' asks for a head"),
        (dict(decoder="linear"), "decoder='linear' contradicts .* says 'dpt'; leave it out"),
        (dict(decoder_width=16), "decoder_width=16 contradicts .* says 8"),
        (dict(decoder_blocks=(3,)), r"decoder_blocks=\(3,\) contradicts"),
        (dict(max_depth=80.0), "max_depth=80.0 contradicts .* says 5.0"),
        (dict(num_classes=10), "num_classes=10 contradicts .* says 0"),
    ):
        with pytest.raises(InputError, match=said) as caught:
            tif_jax.load(source, **given)
        assert "\n" not in str(caught.value)


def test_a_decoder_whose_task_is_lost(tmp_path):
    save(tmp_path / "run", lively(DEPTH), DEPTH)
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "w.safetensors")]) == 0
    tensors = safetensors.numpy.load_file(tmp_path / "w.safetensors")
    safetensors.numpy.save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"w\.safetensors: the weights have a decoder, and the metadata that say"):
        tif_jax.load(tmp_path / "w.safetensors")


def test_a_levit_has_no_features_of_patches(tmp_path):
    path = write_safetensors(tmp_path / "w.safetensors", random_levit_tensors(np.random.default_rng(0)))
    with pytest.raises(InputError, match="task='depth' needs a ViT; a LeViT has no features of every patch in the end"):
        tif_jax.load(path, task="depth", activation="hard_swish")
