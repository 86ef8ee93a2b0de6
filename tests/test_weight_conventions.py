"""What a weight file can not say: the raster, heads, pooling and activation are right, asked for, or told in the log."""

import logging

import numpy as np
import pytest
from cases import call, write_safetensors
from reference import random_timm_tensors, vit_forward
from reference_levit import levit_forward, random_levit_tensors
from test_timm_vit import images, predict, tiny

from tif_jax.errors import InputError
from tif_jax.models import with_defaults
from tif_jax.models.levit import LeViT
from tif_jax.weights import pretrained, timm_levit, timm_vit
from tif_jax.weights.loading import load
from tif_jax.weights.pretrained import read_weights

HEADS = dict(num_heads=2)


# The raster of the position embedding: 3x5 patches and a class token have as many rows as 4x4 patches without


def test_a_raster_that_is_given_comes_first(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "tif_jax")
    tensors, x = tiny(grid=(3, 5), depth=1), images(12, 20)
    path = write_safetensors(tmp_path / "w.safetensors", tensors)
    logits = predict(path, x, image_size=(12, 20), **HEADS)
    np.testing.assert_allclose(logits, vit_forward(tensors, x, num_heads=2), atol=1e-4)
    assert (
        "taken for the 3x5 patches of image_size, and nothing is resized; it would fit 4x4 as well"
        in caplog.messages[0]
    )
    fields = read_weights(path, **HEADS)[0]
    assert (fields["image_size"], fields["special_positions"]) == (16, False)
    assert "pos_embed has 16 rows: read as 4x4 patches, with no position for the class token" in caplog.messages[1]


@pytest.mark.parametrize(
    ("variant", "given"),
    [
        (dict(layer_scale=True), {}),  # DeiT III
        ({}, dict(special_positions=False)),
        ({}, dict(image_size=16)),
        (dict(class_token=False, pool="mean"), {}),
    ],
    ids=str,
)
def test_a_square_without_class_position_is_legitimate(variant, given, caplog):
    tensors = tiny(grid=(4, 4), no_embed_class=True, **variant)
    fields = timm_vit.infer_fields(tensors, **HEADS, **given)
    assert fields["image_size"] == 16 and fields["special_positions"] == ("class_token" in variant)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_square_without_class_position_can_be_resized_to_the_other_raster(tmp_path):
    tensors = tiny(grid=(4, 4), no_embed_class=True, depth=1)
    path = write_safetensors(tmp_path / "w.safetensors", tensors)
    fields, params = read_weights(path, image_size=(12, 20), special_positions=False, **HEADS)
    assert fields["image_size"] == (12, 20) and params["position_embedding"].shape == (1, 15, 32)


def test_what_is_said_of_the_file_is_not_what_is_wanted(tmp_path):
    """The raster that the embedding was trained for and another image_size, both given."""
    tensors = tiny(grid=(3, 5), depth=1)
    path = write_safetensors(tmp_path / "w.safetensors", tensors)
    fields, params = read_weights(path, {"image_size": [12, 20], "num_heads": 2}, image_size=(12, 12))
    assert fields["image_size"] == (12, 12) and fields["special_positions"]
    assert params["position_embedding"].shape == (1, 10, 32)
    np.testing.assert_array_equal(params["position_embedding"][:, 0], tensors["pos_embed"][:, 0])


@pytest.mark.parametrize("grid", [(3, 5), (2, 8)])
def test_a_rectangle_comes_back_from_our_own_file(grid):
    tensors = tiny(grid=grid, depth=1)
    size = (4 * grid[0], 4 * grid[1])
    fields = timm_vit.infer_fields(tensors, image_size=size, **HEADS)
    params = timm_vit.to_params(tensors, fields)
    back, needed = pretrained.to_tensors(params, fields)
    assert needed["image_size"] == size and needed["num_heads"] == 2
    again = timm_vit.infer_fields(back, **needed)
    assert with_defaults(again) == with_defaults(fields)
    np.testing.assert_array_equal(timm_vit.to_params(back, again)["position_embedding"], tensors["pos_embed"])


def test_the_rectangle_of_a_levit_comes_first():
    tensors = random_levit_tensors(np.random.default_rng(0), grid=(2, 8))
    assert timm_levit.infer_fields(tensors, image_size=(32, 128))["image_size"] == (32, 128)
    assert timm_levit.infer_fields(tensors)["image_size"] == 64
    with pytest.raises(InputError, match="biases are for 4x4 patches"):
        timm_levit.infer_fields(tensors, image_size=(128, 64))


# Heads


def of_size(width, depth, **variant):
    """Tensors that say no more than the size; the heads and the rest of the blocks do not matter."""
    tensors = random_timm_tensors(np.random.default_rng(0), width=4, num_heads=1, mlp_dim=8, depth=1, **variant)
    block = {name: tensor for name, tensor in tensors.items() if name.startswith("blocks.0.")}
    shape = lambda tensor: tuple(width * n // 4 if n in (4, 8, 12) else n for n in tensor.shape)  # noqa: E731
    wide = {name: np.broadcast_to(tensor.flat[0], shape(tensor)) for name, tensor in tensors.items()}
    wide["patch_embed.proj.weight"] = np.ones((width, 3, 16, 16))
    return wide | {f"blocks.{i}.{name[9:]}": wide[name] for name in block for i in range(depth)}


@pytest.mark.parametrize(
    ("width", "depth", "variant", "heads"),
    [
        (192, 12, {}, 3),
        (384, 12, {}, 6),
        (768, 12, {}, 12),
        (1280, 32, {}, 16),
        (64, 6, {}, 2),  # test_vit
        (1536, 40, dict(class_token=False, pool="normed_mean"), 16),  # SigLIP's giantopt
        (768, 12, dict(class_token=False, pool="normed_mean", head=False), 12),  # SigLIP's base
    ],
    ids=str,
)
def test_heads_of_timms_own_sizes(width, depth, variant, heads, caplog):
    caplog.set_level(logging.INFO, "tif_jax")
    fields = timm_vit.infer_fields(of_size(width, depth, **variant), num_classes=5)
    assert fields["num_heads"] == heads
    assert f"num_heads {heads}" in caplog.messages[0]


@pytest.mark.parametrize(
    ("width", "depth", "variant", "message"),
    [
        (96, 12, {}, "12 blocks of width 96 are none of timm's sizes"),
        (768, 8, {}, "8 blocks of width 768 are none"),  # timm's vit_small until 2021: 8 heads
        (1536, 40, {}, "40 blocks of width 1536 are none"),
        (
            768,
            12,
            dict(class_token=False, pool="normed_mean"),
            r"SigLIP's \(12 heads\) or vit_base_patch16_gap's \(16\)",
        ),
    ],
    ids=str,
)
def test_heads_are_asked_for(width, depth, variant, message):
    tensors = of_size(width, depth, **variant)
    with pytest.raises(InputError, match=message + ".*give num_heads"):
        timm_vit.infer_fields(tensors)
    assert timm_vit.infer_fields(tensors, num_heads=4)["num_heads"] == 4


def test_mocov3_small_has_twelve_heads():
    tensors = of_size(384, 12)
    fixed = tensors["pos_embed"].copy()
    fixed[:, 0] = 0  # its position embedding is sines and cosines, and zero for the class token
    with pytest.raises(InputError, match=r"MoCo v3's \(12 heads\).*give num_heads"):
        timm_vit.infer_fields(tensors | {"pos_embed": fixed})


# Pooling


def renamed(tensors, old, new):
    return {name.replace(old, new) if name.startswith(old) else name: tensor for name, tensor in tensors.items()}


POOLING = {  # how timm is told: the tensors, what has to be given, what is inferred
    "token": (tiny(depth=1), {}, "class"),
    "token, fc_norm": (renamed(tiny(depth=1), "norm.", "fc_norm."), dict(pool="class"), "class"),
    "avg": (tiny(depth=1, pool="mean"), {}, "mean"),
    "avg, fc_norm=False": (tiny(depth=1), dict(pool="normed_mean"), "normed_mean"),
    "avg, no class": (tiny(depth=1, pool="mean", class_token=False), {}, "mean"),
    "avg, fc_norm=False, no class": (tiny(depth=1, pool="normed_mean", class_token=False), {}, "normed_mean"),
}


@pytest.mark.parametrize("name", POOLING)
def test_pooling(tmp_path, caplog, name):
    caplog.set_level(logging.WARNING, "tif_jax")
    tensors, given, pool = POOLING[name]
    path = write_safetensors(tmp_path / "w.safetensors", tensors)
    expected = vit_forward(tensors, images(), num_heads=2, pool=pool)
    np.testing.assert_allclose(predict(path, images(), **HEADS, **given), expected, atol=1e-4)
    assert not given or not caplog.messages
    fields, params = read_weights(path, **HEADS, **given)
    back, needed = pretrained.to_tensors(params, fields)
    assert timm_vit.infer_fields(back, **needed)["pool"] == pool
    if given:  # what is taken if nothing is given differs
        other = predict(path, images(), **HEADS)
        assert np.abs(other - expected).max() > 0.1
    told = any("a class token and fc_norm: pool 'mean' is assumed" in message for message in caplog.messages)
    assert told == (name in ("token, fc_norm", "avg"))


def test_features_of_a_file_without_a_head_are_timms(tmp_path):
    tensors = tiny(depth=1, pool="normed_mean", class_token=False)
    headless = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}
    model = load(write_safetensors(tmp_path / "w.safetensors", headless), num_classes=5, **HEADS)
    head = {"head.weight": np.asarray(model.head.kernel[...]).T, "head.bias": np.asarray(model.head.bias[...])}
    expected = vit_forward(tensors | head, images(), num_heads=2, pool="normed_mean")
    np.testing.assert_allclose(model(images())[0], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("tensors", "pool", "message"),
    [
        (tiny(), "mean", r"pool 'mean' does not go with this head, which has norm\.\* before it"),
        (tiny(pool="mean"), "normed_mean", r"'normed_mean' does not go .* has fc_norm\.\*"),
        (tiny(), "max", "pool is 'max'; allowed: 'class', 'mean', 'normed_mean'"),
        (tiny(), "avgmax", "pool is 'avgmax'"),
    ],
)
def test_pooling_that_the_head_was_not_trained_with(tmp_path, tensors, pool, message):
    with pytest.raises(InputError, match=message):
        read_weights(write_safetensors(tmp_path / "w.safetensors", tensors), pool=pool, **HEADS)


# Activation


@pytest.mark.parametrize(
    ("patch", "width", "depth", "grid", "gelu"),
    [
        (32, 768, 12, 8, "tanh"),
        (16, 768, 12, 14, "exact"),
        (16, 1024, 24, 24, "exact"),
        (16, 1024, 24, 32, "tanh"),
        (14, 1152, 27, 16, "exact"),
        (16, 1152, 27, 16, "tanh"),
        (16, 1536, 40, 16, "tanh"),
        (14, 1280, 32, 16, "exact"),  # I-JEPA
    ],
)
def test_gelu_of_siglip_is_timms(patch, width, depth, grid, gelu):
    tensors = of_size(width, depth, class_token=False, pool="normed_mean", head=False)
    tensors["patch_embed.proj.weight"] = np.ones((width, 3, patch, patch))
    tensors["pos_embed"] = np.broadcast_to(np.float32(1), (1, grid**2, width))
    assert timm_vit.infer_fields(tensors, num_classes=5)["gelu"] == gelu
    assert timm_vit.infer_fields(tensors, num_classes=5, gelu="exact")["gelu"] == "exact"


def test_a_levit_with_silu(tmp_path):
    tensors = random_levit_tensors(np.random.default_rng(0))
    x = images(48, 48)
    path = write_safetensors(tmp_path / "w.safetensors", tensors)
    model = load(path, activation="silu")
    assert isinstance(model, LeViT)
    expected = levit_forward(tensors, x, silu=True)
    np.testing.assert_allclose(call(model, x)[0], expected, atol=1e-4)
    assert np.abs(levit_forward(tensors, x) - expected).max() > 0.01
    with pytest.raises(InputError, match="activation is 'relu'; allowed: 'hard_swish', 'silu'"):
        load(path, activation="relu")


@pytest.mark.parametrize(
    ("widths", "depths", "activation"),
    [
        ((256, 384, 512), (4, 4, 4), "hard_swish"),
        ((256, 384, 512), (4, 8, 6), "silu"),
        ((512, 768, 1024), (4, 4, 4), "silu"),
        ((512, 640, 768), (4, 8, 6), "silu"),
        ((128, 256, 384), (2, 3, 4), "hard_swish"),
        ((128, 256), (2, 3), None),
    ],
)
def test_activation_of_timms_levits(widths, depths, activation, caplog):
    caplog.set_level(logging.WARNING, "tif_jax")
    stages = len(widths)
    shapes = dict(widths=tuple(w // 8 for w in widths), depths=depths, num_heads=(4, 6, 8)[:stages])
    small = random_levit_tensors(np.random.default_rng(0), **shapes)
    names = [f"stages.{s}.blocks.0.attn.qkv.linear.weight" for s in range(stages)]
    wide = {name: np.ones((small[name].shape[0], width)) for name, width in zip(names, widths, strict=True)}
    fields = timm_levit.infer_fields(small | wide)
    assert fields["activation"] == (activation or "hard_swish")
    assert bool(caplog.messages) == (activation is None)
    if activation is None:
        assert "is none of timm's: activation 'hard_swish', the paper's, is assumed" in caplog.messages[0]
