"""What config.json and preprocessor_config.json of HF transformers say, by examples of files as they are on the hub."""

import json
import logging

import numpy as np
import pytest
import safetensors.numpy
from reference import random_timm_tensors

import tif_jax
from tif_jax.errors import InputError
from tif_jax.weights import transformers_config
from tif_jax.weights.described import of_file

HALF = [0.5, 0.5, 0.5]
CLIPS = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
IMAGENETS = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
VIT = {
    "architectures": ["ViTForImageClassification"], "model_type": "vit", "hidden_size": 32, "num_attention_heads": 4,
    "hidden_act": "gelu", "layer_norm_eps": 1e-12, "image_size": 16, "id2label": {"0": "cat", "2": "dog", "1": "cow"},
}  # fmt: skip
SQUASHED = {"do_resize": True, "do_normalize": True, "size": 16, "image_mean": HALF, "image_std": HALF, "resample": 2}
FILES = {  # config, preprocessor -> fields, preprocessing, names
    "ViT": (
        VIT, SQUASHED,
        dict(num_heads=4, width=32, image_size=16, gelu="exact", norm_eps=1e-12, num_classes=3),
        dict(interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3, crop_fraction=1.0), ("cat", "cow", "dog"),
    ),
    "DeiT": (
        {"model_type": "deit", "hidden_size": 192, "num_attention_heads": 3, "architectures": ["DeiTModel"],
         "id2label": {"0": "a"}},
        {"size": 256, "crop_size": 224, "do_center_crop": True, "resample": 3, **IMAGENETS},
        dict(num_heads=3, width=192, image_size=224, gelu="exact", norm_eps=1e-12),
        dict(interpolation="bicubic", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), crop_fraction=0.875), None,
    ),
    "DINOv2": (
        {"model_type": "dinov2", "image_size": 518, "architectures": ["Dinov2Model"]},
        {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True, "resample": 3},
        dict(num_heads=12, width=768, image_size=518, gelu="exact", norm_eps=1e-6),
        dict(interpolation="bicubic", crop_fraction=0.875), None,
    ),
    "CLIP, both towers": (
        {"model_type": "clip", "text_config": {"hidden_size": 512},
         "vision_config": {"hidden_size": 1024, "num_attention_heads": 16}},
        {"size": {"shortest_edge": 224}, "crop_size": 224, "do_center_crop": True, **CLIPS},
        dict(num_heads=16, width=1024, image_size=224, gelu="quick", norm_eps=1e-5),
        dict(mean=tuple(CLIPS["image_mean"]), std=tuple(CLIPS["image_std"]), crop_fraction=1.0), None,
    ),
    "SigLIP, defaults left out": (
        {"model_type": "siglip", "vision_config": {"model_type": "siglip_vision_model"}},
        {"do_normalize": False, "do_resize": False},
        dict(num_heads=12, width=768, image_size=224, gelu="tanh", norm_eps=1e-6),
        dict(mean=(0.0,) * 3, std=(1.0,) * 3), None,
    ),
    "names whose numbers have a gap, which would move": (
        {**VIT, "id2label": {"0": "cat", "2": "dog", "3": "cow"}}, None,
        dict(num_heads=4, width=32, image_size=16, gelu="exact", norm_eps=1e-12, num_classes=3), {}, None,
    ),
    "names that say nothing": (
        {**VIT, "id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, None,
        dict(num_heads=4, width=32, image_size=16, gelu="exact", norm_eps=1e-12, num_classes=2), {}, None,
    ),
}  # fmt: skip


def write(folder, config, prepared=None, **variant):
    tensors = random_timm_tensors(
        np.random.default_rng(0), **{**dict(width=32, depth=1, patch_size=8, grid=(2, 2), num_classes=3), **variant}
    )
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    if prepared is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(prepared))
    return folder


@pytest.mark.parametrize(("config", "prepared", "fields", "how", "names"), FILES.values(), ids=FILES)
def test_what_files_on_the_hub_say(tmp_path, config, prepared, fields, how, names):
    said = of_file(write(tmp_path, config, prepared) / "model.safetensors")
    assert (said.fields, said.preprocessing, said.class_names) == (fields, how, names)


def test_a_model_is_made_of_it(tmp_path, caplog):
    """Tensors under timm's names here: the file's layout is another matter."""
    model = tif_jax.load(write(tmp_path, VIT, SQUASHED))
    assert model.block_0.attention.num_heads == 4 and model.norm.epsilon == 1e-12
    assert (model.class_names, model.preprocessing.std) == (("cat", "cow", "dog"), (0.5,) * 3)
    assert "resized to a square whatever their shape" in caplog.text
    caplog.clear()
    write(tmp_path, VIT, {**SQUASHED, "do_center_crop": True, "crop_size": 14, "resample": 4})
    assert tif_jax.load(tmp_path).preprocessing.crop_fraction == 14 / 16
    assert [r.message for r in caplog.records if r.levelno == logging.WARNING] == [
        f"{tmp_path}/preprocessor_config.json: resampling by box is not supported: bicubic is assumed"
    ]


def test_names_for_another_number_of_classes_are_told(tmp_path, caplog):
    write(tmp_path, {"pretrained_cfg": {"label_names": ["cat", "cow"], "mean": HALF, "std": HALF}})
    assert tif_jax.load(tmp_path, num_heads=4).class_names is None
    assert "config.json names 2 classes, and the head has 3 outputs: the names are left out" in caplog.text
    caplog.clear()
    for number in (5, 0):  # of a fresh head, of none
        tif_jax.load(tmp_path, num_heads=4, num_classes=number)
    assert "the names are left out" not in caplog.text


def test_a_processor_of_pictures_and_texts(tmp_path):
    write(tmp_path, VIT)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": SQUASHED, "processor_class": "It"}))
    assert of_file(tmp_path / "model.safetensors").preprocessing["mean"] == (0.5,) * 3


@pytest.mark.parametrize(
    ("config", "prepared", "message"),
    [
        ({**VIT, "hidden_act": "relu"}, None, "config.json: hidden_act 'relu' is not supported; known: gelu"),
        ({**VIT, "hidden_act": {}, "architectures": 5}, None, "config.json: hidden_act {} is not supported"),
        ({**VIT, "num_attention_heads": "4"}, None, "config.json: num_heads is '4'"),
        ({**VIT, "hidden_size": 64}, None, "config.json is not of these weights: it says width 64, the tensors 32"),
        ({"model_type": "clip", "vision_config": [1]}, None, "config.json: its vision_config is no dict"),
        (VIT, {**SQUASHED, "rescale_factor": 1 / 127.5}, "preprocessor_config.json: rescale_factor .* not supported"),
        (VIT, {**SQUASHED, "do_rescale": False}, "preprocessor_config.json: do_rescale false is not supported"),
        (VIT, {**SQUASHED, "image_mean": [127, 127, 127]}, "preprocessor_config.json: mean is .* divide by 255"),
        (VIT, {**SQUASHED, "size": {"height": "x", "width": 2}}, "preprocessor_config.json can not be read"),
        (VIT, [SQUASHED], "preprocessor_config.json can not be read"),
    ],
)
def test_what_can_not_be(tmp_path, config, prepared, message):
    with pytest.raises(InputError, match=message):
        tif_jax.load(write(tmp_path, config, prepared))


def test_defaults_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    for kind, ours in transformers_config._DEFAULTS.items():
        theirs = transformers.AutoConfig.for_model(kind)
        assert {name: getattr(theirs, name) for name in ours} == ours, kind
