"""Models without a head: what they return, and what refuses them."""

import json

import jax
import numpy as np
import pytest
from cases import numpy_images, numpy_model, write_safetensors
from reference import random_timm_tensors, vit_forward

from tif_jax.data.preprocess import Preprocessing
from tif_jax.errors import InputError
from tif_jax.impact.token_impact import token_impact
from tif_jax.models import with_defaults
from tif_jax.models.params import params_of
from tif_jax.models.predictions import predict_images
from tif_jax.weights import described, pretrained
from tif_jax.weights.loading import load
from tif_jax.weights.timm_config import config_of

TINY = dict(image_size=32, patch_size=8, width=32, depth=1, num_heads=2, num_classes=0)
TIMMS = {"architecture": "vit_of_mine", "num_classes": 0, "model_args": {"num_heads": 2}, "pretrained_cfg": {}}


def headless(path, config=None):
    tensors = random_timm_tensors(np.random.default_rng(0), depth=1, head=False)
    if config:
        (path / "config.json").write_text(json.dumps(config))
    return write_safetensors(path / "w.safetensors", tensors), tensors


def test_features_need_to_be_asked_for_or_said(tmp_path):
    path, tensors = headless(tmp_path)
    with pytest.raises(InputError, match=r"no head .*num_classes=0 for a model that returns its features"):
        load(path, num_heads=2)
    x = np.asarray(numpy_images(2, (12, 12)))
    expected = vit_forward(tensors, x, num_heads=2)
    headless(tmp_path, TIMMS)
    for model in (load(path, num_heads=2, num_classes=0), load(path)):
        assert model.num_classes == 0
        np.testing.assert_allclose(jax.jit(lambda x, model=model: model(x)[0])(x), expected, atol=1e-4)
    assert load(path, num_classes=3).num_classes == 3


def test_a_head_in_the_file_is_not_left_out_by_its_description(tmp_path):
    headless(tmp_path, TIMMS)
    path = write_safetensors(tmp_path / "w.safetensors", random_timm_tensors(np.random.default_rng(0), depth=1))
    with pytest.raises(InputError, match="not of these weights: it says num_classes 0, the tensors 5"):
        load(path)
    assert load(path, num_classes=0).num_classes == 0


def test_what_needs_classes_refuses_features():
    model = numpy_model(TINY)
    with pytest.raises(InputError, match="impact, a difference of losses, needs classes, and this model has no head"):
        token_impact(model, numpy_images(1), target="teacher")
    with pytest.raises(InputError, match="a prediction needs classes"):
        predict_images(model, np.zeros((8, 8, 3), np.uint8))


@pytest.mark.parametrize(
    "fields",
    [
        dict(pre_norm=True, gelu="quick", norm_eps=1e-5, num_classes=5),
        dict(pool="attention", class_token=False, gelu="tanh"),
    ],
    ids=["clip", "siglip"],
)
def test_timms_config_says_what_these_are(tmp_path, fields):
    """Written and read again, without our own metadata."""
    model = numpy_model(TINY | fields)
    own = with_defaults(TINY | fields)
    tensors, _ = pretrained.to_tensors(jax.tree.map(np.asarray, params_of(model)), own)
    (tmp_path / "config.json").write_text(json.dumps(config_of(own, Preprocessing(), None)))
    path = write_safetensors(tmp_path / "w.safetensors", tensors)
    again, _ = pretrained.read_weights(path, described.of_file(path).fields)
    assert with_defaults(again | {"mlp_dim": None}) == own
