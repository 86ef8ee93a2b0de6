"""ViT weights in timm's layout against a slow reference: the same logits, or one line that says why not."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import write_safetensors
from flax import nnx
from PIL import Image
from reference import COMPUTED, VARIANTS, random_timm_tensors, vit_forward

from tif_jax.errors import InputError
from tif_jax.models import ViT, create_model
from tif_jax.weights.loading import load
from tif_jax.weights.positions import resize_position_embedding
from tif_jax.weights.pretrained import read_tensors, read_weights
from tif_jax.weights.timm_vit import infer_fields, to_params


def tiny(**variant):
    return random_timm_tensors(np.random.default_rng(0), **variant)


def images(height=12, width=12):
    return np.random.default_rng(1).normal(size=(2, height, width, 3)).astype(np.float32)


def predict(path, x, **given):
    """Logits of the model that `read_weights` finds in a file."""
    fields, params = read_weights(path, **given)
    graph, state = nnx.split(nnx.eval_shape(lambda: ViT(**fields, rngs=nnx.Rngs(0))))
    nnx.replace_by_pure_dict(state, params)
    return jax.jit(lambda state, x: nnx.merge(graph, state)(x)[0])(state, x)


@pytest.mark.parametrize("name", VARIANTS)
def test_same_logits_as_the_reference(tmp_path, name):
    variant = VARIANTS[name]
    tensors, heads = tiny(**{"depth": 1} | variant), variant.get("num_heads", 2)
    x = images(*[3 * variant.get("patch_size", 4)] * 2)
    how = COMPUTED.get(name, {})
    given = {} if "qk_norm" in variant else {"num_heads": heads}
    given |= {"gelu": how["gelu"]} if how else {}
    given |= {} if variant.get("head", True) else {"num_classes": 0}
    expected = vit_forward(tensors, x, num_heads=heads, pool=variant.get("pool", "class"), **how)
    np.testing.assert_allclose(
        predict(write_safetensors(tmp_path / "w.safetensors", tensors), x, **given), expected, atol=1e-4
    )


def test_what_shapes_cannot_tell_is_given(tmp_path):
    path, x = write_safetensors(tmp_path / "w.safetensors", tiny()), images()
    expected = vit_forward(tiny(), x, num_heads=2, gelu="tanh", eps=0.1)
    logits = predict(path, x, num_heads=2, gelu="tanh", norm_eps=0.1)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    for default in (dict(gelu="tanh"), dict(eps=0.1)):  # each of the two matters
        assert np.abs(vit_forward(tiny(), x, num_heads=2, **default) - expected).max() > 2e-4


def test_non_square_checkpoint(tmp_path):
    tensors, x = tiny(grid=(2, 5)), images(8, 20)
    logits = predict(write_safetensors(tmp_path / "w.safetensors", tensors), x, num_heads=2, image_size=(8, 20))
    np.testing.assert_allclose(logits, vit_forward(tensors, x, num_heads=2), atol=1e-4)


def test_dinov2_own_names(tmp_path):
    tensors = tiny(num_registers=2, layer_scale=True)
    renamed = {name.replace("reg_token", "register_tokens"): tensor for name, tensor in tensors.items()}
    renamed["mask_token"] = np.ones((1, 32), np.float32)
    expected = vit_forward(tensors, images(), num_heads=2)
    logits = predict(write_safetensors(tmp_path / "w.safetensors", renamed), images(), num_heads=2)
    np.testing.assert_allclose(logits, expected, atol=1e-4)


@pytest.mark.parametrize("variant", [{}, dict(class_token=False, pool="mean")], ids=str)
def test_positions_of_registers(tmp_path, variant):
    tensors = tiny(num_registers=2, depth=1, **variant)
    rows = tensors["pos_embed"].shape[1]
    tensors["pos_embed"] = np.random.default_rng(3).normal(size=(1, rows + 2, 32)).astype(np.float32)
    expected = vit_forward(tensors, images(), num_heads=2, pool=variant.get("pool", "class"))
    logits = predict(write_safetensors(tmp_path / "w.safetensors", tensors), images(), num_heads=2)
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_reference_takes_patches_away():
    """Its three ways equal a smaller raster, a zero position embedding and a black patch (without patch bias)."""
    tensors, x = tiny(), images()
    shorter = dict(tensors, pos_embed=tensors["pos_embed"][:, :7])  # the class token and the first two rows of three
    heads = dict(num_heads=2)
    dropped = vit_forward(tensors, x, dropped=[6, 7, 8], **heads)
    np.testing.assert_allclose(dropped, vit_forward(shorter, x[:, :8], **heads), atol=1e-12)
    blank = dict(tensors, pos_embed=np.where(np.arange(10)[:, None] == 5, 0, tensors["pos_embed"]))
    without_bias = {"patch_embed.proj.bias": np.zeros(32)}
    x[:, 4:8, 4:8] = 0
    np.testing.assert_allclose(
        vit_forward(tensors | without_bias, x, position_only=[4], **heads),
        vit_forward(tensors | without_bias, x, **heads),
        atol=1e-12,
    )
    np.testing.assert_allclose(
        vit_forward(tensors | without_bias, x, zeroed=[4], **heads),
        vit_forward(blank | without_bias, x, **heads),
        atol=1e-12,
    )


# Layout


def changed(**by_name):
    """Tensors of a tiny file with those changed; None takes one away."""
    tensors = tiny() | {name.replace("__", "."): tensor for name, tensor in by_name.items()}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (changed(norm__bias=None, blocks__1__attn__proj__weight=None), "missing: blocks.1.attn.proj.weight, norm.bias"),
        (changed(cls_tokens=np.zeros((1, 1, 32)), blocks__0__x=np.zeros(3)), "surplus: blocks.0.x, cls_tokens"),
        (changed(norm__bias=np.zeros(31)), r"wrong: norm.bias has shape \(31,\), which gives \(31,\), not \(32,\)"),
        (changed(norm__bias=np.zeros(32, int)), "norm.bias has dtype int64, not a float"),
        (changed(norm__bias=None, y=np.zeros(3), head__bias=np.zeros(6)), "missing: .*; surplus: .*; wrong: "),
        (changed(**{f"y{i}": np.zeros(3) for i in range(20)}), "surplus: y0, .* and 12 more"),
        (changed(blocks__9999999999__norm1__weight=np.zeros(32)), "surplus: blocks.9999999999.norm1.weight"),
        (changed(dist_token=np.zeros((1, 1, 32))), "pos_embed has 10 rows"),
        (changed(pos_embed=np.zeros((1, 7, 32))), r"pos_embed has 7 rows.*give the image_size=\(height, width\)"),
        (
            tiny(num_registers=2) | dict(pos_embed=np.zeros((1, 12, 32)), reg_token=np.zeros((1, 2, 31))),
            "wrong: .*reg_token",
        ),
        (changed(pos_embed=np.zeros((10, 32))), r"the shape of pos_embed \(10, 32\) is impossible"),
        (changed(pos_embed=None), "no pos_embed"),
        (changed(patch_embed__proj__weight=np.zeros((32, 1, 4, 4))), "with 1 channels"),
        (changed(patch_embed__proj__weight=np.zeros((32, 3, 4, 8))), "patches of 4x8"),
        (tiny(class_token=False, pool="mean", qkv_bias=False), r"post-norm ViT \(rpn\)"),
        (tiny(pre_norm=True, pool="attention"), "Perception Encoder"),
        ({"a": np.zeros(3)}, "not a ViT in timm's layout: no patch_embed.proj.weight"),
    ],
)
def test_layout_that_does_not_fit(tensors, message):
    with pytest.raises(InputError, match=message) as error:
        to_params(tensors, infer_fields(tensors, num_heads=2))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Transformer/encoderblock_0/LayerNorm_0/scale", "Flax layout .*timm.create_model"),
        ("vit.encoder.layer.0.attention.attention.query.weight", "HF transformers that is not known"),
        ("embeddings.cls_token", "HF transformers that is not known"),
        ("encoder.layers.encoder_layer_0.ln_1.weight", "torchvision"),
        ("visual.transformer.resblocks.0.ln_1.weight", "CLIP"),
        ("teacher.backbone.cls_token", "training setup"),
        ("decoder_embed.weight", "decoder"),
        ("blocks.0.1.norm1.weight", "block_chunks=0"),
        ("pre_logits.fc.weight", "head of several layers"),
        ("head.fc.weight", "head of several layers"),
        ("blocks.0.attn.inner_norm.weight", "norms inside"),
        ("rope.periods", "rotary"),
        ("layers.0.blocks.0.attn.relative_position_bias_table", "relative position"),
        ("blocks.0.gamma_1", "BEiT or CaiT"),
        ("blocks.0.in_proj.weight", "in parallel"),
        ("layers.0.downsample.norm.weight", "convolutional or Swin"),
        ("stages.0.blocks.0.conv_dw.weight", "convolutional or Swin"),
        ("layer1.0.bn1.running_mean", "convolutional"),
        ("patch_embed.backbone.stem.conv.weight", "several layers"),
        ("embeds.pos_embed", "NaFlexViT"),
    ],
)
def test_unsupported_layout_is_refused_by_name(name, message):
    with pytest.raises(InputError, match=message) as error:
        infer_fields(tiny() | {name: np.zeros(3)}, num_heads=2)
    assert repr(name) in str(error.value)


def test_supported_names_are_not_refused():
    """No pattern of an unsupported layout matches a name of the supported ones."""
    for variant in VARIANTS.values():
        given = dict(num_heads=variant.get("num_heads", 2), gelu="exact")
        given |= {} if variant.get("head", True) else {"num_classes": 7}
        assert infer_fields(tiny(**variant), **given)["width"] == 32


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(), "2 blocks of width 32 are none of timm's sizes, .* give num_heads"),
        (dict(num_heads=3), "width 32 is not a multiple of num_heads 3"),
        (dict(num_heads=2, depth=3), r"depth=3 \(the file: 2\) contradicts"),
        (dict(num_heads=2, pool="mean"), "pool 'mean' does not go with this head"),
        (dict(num_heads=2, image_size=30), "30x30 is not a multiple of patch_size 4"),
        (dict(num_heads=2, layer_scale=1e-5), r"layer_scale=1e-05 \(the file: None\) contradicts"),
    ],
)
def test_given_fields_that_do_not_fit(tmp_path, given, message):
    with pytest.raises(InputError, match=message):
        load(write_safetensors(tmp_path / "w.safetensors", tiny()), **given)


def test_num_heads_by_the_norms_of_queries():
    with pytest.raises(InputError, match=r"num_heads=4 .*the file: 2"):
        infer_fields(tiny(qk_norm=True), num_heads=4)


def test_errors_of_the_layout_name_the_file(tmp_path):
    with pytest.raises(InputError, match=r"w\.safetensors: .*missing: norm.bias"):
        read_weights(write_safetensors(tmp_path / "w.safetensors", changed(norm__bias=None)), num_heads=2)


# Load


def test_fresh_head_and_reducer_are_named_in_the_log(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    tensors = tiny(distilled=True, depth=1)
    path = write_safetensors(tmp_path / "w.safetensors", tensors)
    model = load(path, num_heads=2, num_classes=3, reducer="tif", keep_ratio=0.5)
    logits, aux = jax.jit(lambda x: model(x))(images())
    assert logits.shape == (2, 3) and aux["kept"].shape == (2, 4)
    (line,) = [line for line in caplog.messages if "freshly initialised: " in line]
    assert line.split("initialised: ")[1].split(", ") == ["distillation_head", "head", "reducer/filter"]
    np.testing.assert_array_equal(model.norm.bias[...], tensors["norm.bias"])
    assert all(np.ptp(drawn[...]) > 0 for drawn in (model.head.kernel, model.reducer.filter.local_in.kernel))


def test_headless_backbone(tmp_path):
    path = write_safetensors(tmp_path / "w.safetensors", tiny(head=False))
    with pytest.raises(InputError, match=r"no head .*; give num_classes"):
        read_weights(path, num_heads=2)
    fields, params = read_weights(path, num_heads=2, num_classes=7, pool="mean")
    assert (fields["num_classes"], fields["pool"]) == (7, "mean") and "head" not in params
    np.testing.assert_array_equal(params["norm"]["bias"], tiny(head=False)["norm.bias"])


def test_read_weights(tmp_path):
    fields, params = read_weights(
        write_safetensors(tmp_path / "w.safetensors", tiny()), num_heads=2, image_size=20, norm_eps=1e-5
    )
    assert (fields["image_size"], fields["mlp_dim"], fields["norm_eps"]) == (20, 48, 1e-5)
    shapes = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: create_model(fields)), nnx.Param))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    assert {(type(p), p.dtype) for p in jax.tree.leaves(params)} == {(np.ndarray, np.dtype("float32"))}


# Position embedding


@pytest.mark.parametrize("new_grid", [(6, 6), (3, 9), (14, 5), (20, 24)])
def test_position_embedding_is_resized_like_an_image(new_grid):
    """Pillow's bicubic filter has the same kernel and antialiasing as torch's `interpolate(antialias=True)`."""
    embedding = np.random.default_rng(0).normal(size=(1, 2 + 12 * 12, 3)).astype(np.float32)
    resized = resize_position_embedding(embedding, (12, 12), new_grid, 2)
    np.testing.assert_array_equal(resized[:, :2], embedding[:, :2])
    for channel in range(3):
        raster = Image.fromarray(embedding[0, 2:, channel].reshape(12, 12))
        expected = np.asarray(raster.resize(new_grid[::-1], Image.Resampling.BICUBIC))
        np.testing.assert_allclose(resized[0, 2:, channel].reshape(new_grid), expected, atol=1e-5)


def test_load_at_another_size(tmp_path):
    tensors = tiny(grid=(4, 4))
    logits = predict(
        write_safetensors(tmp_path / "w.safetensors", tensors), images(8, 24), num_heads=2, image_size=(8, 24)
    )
    resized = resize_position_embedding(tensors["pos_embed"], (4, 4), (2, 6), 1)
    expected = vit_forward(tensors | {"pos_embed": resized}, images(8, 24), num_heads=2)
    np.testing.assert_allclose(logits, expected, atol=1e-4)


# Real weights


def test_deit_tiny_logits(data_root):
    path = data_root / "deit_tiny_patch16_224.safetensors"
    if not path.is_file():
        pytest.skip(f"no real weights: {path}")
    photographs = sorted((data_root / "imagenet_ccby").glob("*.jpg"))[:2]
    pixels = np.stack([np.asarray(Image.open(p).convert("RGB").resize((224, 224))) for p in photographs])
    x = ((pixels / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).astype(np.float32)
    expected = vit_forward(read_tensors(path), x, num_heads=3, dtype=np.float32)
    np.testing.assert_allclose(predict(path, x), expected, atol=1e-4)
