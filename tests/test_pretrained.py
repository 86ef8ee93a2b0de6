import io
import logging
import pickle
import struct
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from PIL import Image
from reference import random_timm_tensors, vit_forward

from tif_jax.errors import InputError
from tif_jax.models import ViT, create_model
from tif_jax.weights.loading import load
from tif_jax.weights.pretrained import read_tensors, read_weights
from tif_jax.weights.timm_vit import infer_fields, resize_position_embedding, to_params

VARIANTS = {
    "deit": dict(depth=2),
    "deit_distilled": dict(distilled=True),
    "deit3": dict(no_embed_class=True, layer_scale=True),
    "dinov2": dict(layer_scale=True, patch_size=2),
    "registers": dict(no_embed_class=True, layer_scale=True, num_registers=4),
    "registers_class_position": dict(num_registers=4),
    "qk_norm": dict(qk_norm=True),
    "no_qkv_bias": dict(qkv_bias=False),
    "mean": dict(pool="mean"),
    "mean_registers_no_class": dict(pool="mean", class_token=False, num_registers=1),
    "wide_mlp_four_heads": dict(mlp_dim=80, num_heads=4),
}


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


def write(path, tensors):
    safetensors.numpy.save_file(tensors, path)
    return path


@pytest.mark.parametrize("name", VARIANTS)
def test_same_logits_as_the_reference(tmp_path, name):
    variant = VARIANTS[name]
    tensors, heads = tiny(**{"depth": 1} | variant), variant.get("num_heads", 2)
    x = images(*[3 * variant.get("patch_size", 4)] * 2)
    given = {} if "qk_norm" in variant else {"num_heads": heads}
    expected = vit_forward(tensors, x, num_heads=heads, pool=variant.get("pool", "class"))
    np.testing.assert_allclose(predict(write(tmp_path / "w.safetensors", tensors), x, **given), expected, atol=1e-4)


def test_what_shapes_cannot_tell_is_given(tmp_path):
    path, x = write(tmp_path / "w.safetensors", tiny()), images()
    expected = vit_forward(tiny(), x, num_heads=2, gelu="tanh", eps=0.1)
    logits = predict(path, x, num_heads=2, gelu="tanh", norm_eps=0.1)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    for default in (dict(gelu="tanh"), dict(eps=0.1)):  # each of the two matters
        assert np.abs(vit_forward(tiny(), x, num_heads=2, **default) - expected).max() > 2e-4


def test_non_square_checkpoint(tmp_path):
    tensors, x = tiny(grid=(2, 5)), images(8, 20)
    logits = predict(write(tmp_path / "w.safetensors", tensors), x, num_heads=2, image_size=(8, 20))
    np.testing.assert_allclose(logits, vit_forward(tensors, x, num_heads=2), atol=1e-4)


def test_dinov2_own_names(tmp_path):
    tensors = tiny(num_registers=2, layer_scale=True)
    renamed = {name.replace("reg_token", "register_tokens"): tensor for name, tensor in tensors.items()}
    renamed["mask_token"] = np.ones((1, 32), np.float32)
    expected = vit_forward(tensors, images(), num_heads=2)
    logits = predict(write(tmp_path / "w.safetensors", renamed), images(), num_heads=2)
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


# Files


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float16, 1e-3), (jnp.bfloat16, 8e-3), (np.float64, 0)])
def test_safetensors_dtypes_become_float32(tmp_path, dtype, tolerance):
    tensors = tiny(depth=1)
    read = read_tensors(write(tmp_path / "w.safetensors", {name: t.astype(dtype) for name, t in tensors.items()}))
    assert {t.dtype for t in read.values()} == {np.dtype("float32")} and read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_allclose(read[name], tensor, rtol=tolerance, atol=1e-7)


def test_npz(tmp_path):
    np.savez(tmp_path / "w.npz", **tiny())
    assert read_tensors(tmp_path / "w.npz")["head.weight"].tolist() == tiny()["head.weight"].tolist()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrapper_prefixes_are_stripped(tmp_path, prefix):
    path = write(tmp_path / "w.safetensors", {prefix + name: t for name, t in tiny().items()})
    assert read_tensors(path).keys() == tiny().keys()


# torch.save's format by hand: the opcodes that torch writes (pickle protocol 2), a persistent id for each storage


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value):
    return b"J" + struct.pack("<i", value)


def tuple_of(*items):
    return b"(" + b"".join(items) + b"t"


def called(module, name, *arguments):
    return f"c{module}\n{name}\n".encode() + tuple_of(*arguments) + b"R"


def dictionary(entries, kind=None):
    items = b"(" + b"".join(text(key) + value for key, value in entries.items()) + b"u"
    return (b"}" if kind is None else called("collections", "OrderedDict")) + items


def tensor_of(key, shape, strides, offset=0, numel=0, storage="FloatStorage", kind="_rebuild_tensor_v2"):
    pid = tuple_of(text("storage"), f"ctorch\n{storage}\n".encode(), text(key), text("cpu"), number(numel)) + b"Q"
    hooks = called("collections", "OrderedDict")
    sizes = [tuple_of(*map(number, numbers)) for numbers in (shape, strides)]
    return called("torch._utils", kind, pid, number(offset), *sizes, b"\x89", hooks)


def contiguous(key, array):
    strides = [s // array.itemsize for s in array.strides]
    return tensor_of(key, array.shape, strides, numel=array.size)


def write_torch(path, content, storages):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + content + b".")
        for key, array in storages.items():
            archive.writestr(f"archive/data/{key}", array.tobytes())
    return path


def write_state_dict(path, tensors, wrap=lambda entries: entries):
    entries = dictionary({name: contiguous(name, tensor) for name, tensor in tensors.items()}, kind="OrderedDict")
    metadata = tuple_of(dictionary({"_metadata": called("collections", "OrderedDict")})) + b"0"  # built and popped
    state = dictionary({"_metadata": called("collections", "OrderedDict")}) + b"b"  # as an attribute
    return write_torch(path, metadata + wrap(entries + state), tensors)


WRAPS = {
    "bare": lambda entries: entries,
    "deit": lambda entries: dictionary({"model": entries, "epoch": number(299)}),
    "lightning": lambda entries: dictionary({"state_dict": entries, "lr": b"]" + number(1) + b"a"}),
    "timm": lambda entries: dictionary({"state_dict_ema": b"}", "state_dict": entries}),
    "ema": lambda entries: dictionary({"model_ema": entries, "epoch": b"N"}),
}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("suffix", [".pth", ".pt"])
def test_torch_file(tmp_path, wrap, suffix):
    read = read_tensors(write_state_dict(tmp_path / f"w{suffix}", tiny(), WRAPS[wrap]))
    assert read.keys() == tiny().keys()
    for name, tensor in tiny().items():
        np.testing.assert_array_equal(read[name], tensor)


def test_torch_strides_offsets_and_shared_storage(tmp_path):
    storage = np.arange(24, dtype=np.float32)
    parameter = called("torch._utils", "_rebuild_parameter", tensor_of("0", (2,), (1,), 3, 24), b"\x88", b"N")
    content = dictionary(
        {
            "transposed": tensor_of("0", (3, 4), (1, 3), 12, 24),
            "column": tensor_of("0", (4,), (6,), 1, 24),
            "scalar": tensor_of("0", (), (), 5, 24),
            "empty": tensor_of("0", (0, 3), (3, 1), 0, 24),
            "parameter": parameter,
        }
    )
    read = read_tensors(write_torch(tmp_path / "w.pth", content, {"0": storage}))
    np.testing.assert_array_equal(read["transposed"], storage[12:].reshape(4, 3).T)
    np.testing.assert_array_equal(read["column"], [1, 7, 13, 19])
    assert read["scalar"].shape == () and read["scalar"] == 5 and read["empty"].shape == (0, 3)
    np.testing.assert_array_equal(read["parameter"], [3, 4])


@pytest.mark.parametrize(
    ("storage", "dtype"), [("HalfStorage", "f2"), ("BFloat16Storage", jnp.bfloat16), ("DoubleStorage", "f8")]
)
def test_torch_dtypes(tmp_path, storage, dtype):
    values = np.array([1.5, -2, 0.25]).astype(dtype)
    content = dictionary({"a": tensor_of("0", (3,), (1,), numel=3, storage=storage)})
    read = read_tensors(write_torch(tmp_path / "w.pth", content, {"0": values}))["a"]
    assert read.dtype == np.float32 and read.tolist() == [1.5, -2, 0.25]


def test_file_written_by_torch(tmp_path):
    torch = pytest.importorskip("torch")
    tensors = {name: torch.from_numpy(t) for name, t in tiny().items()}
    tensors["head.weight"] = tensors["head.weight"].T.contiguous().T
    torch.save({"model": tensors, "epoch": 3}, tmp_path / "w.pth")
    for name, tensor in read_tensors(tmp_path / "w.pth").items():
        np.testing.assert_array_equal(tensor, tiny()[name])


# Pickles with code


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (lambda path: called("builtins", "eval", text(f"open({str(path)!r}, 'w')")), "builtins.eval"),
        (lambda path: called("os", "system", text(f"touch {path}")), "os.system"),
        (lambda path: called("pathlib", "Path.touch", text(str(path))), "pathlib.Path.touch"),
        (lambda path: dictionary({"args": called("argparse", "Namespace")}), "argparse.Namespace"),
        (lambda path: called("torch._utils", "_rebuild_qtensor"), "torch._utils._rebuild_qtensor"),
        (
            lambda path: called("tif_jax.weights.torch_file", "read_torch", text(str(path))),
            "tif_jax.weights.torch_file.read_torch",
        ),
    ],
)
def test_pickle_that_names_code_is_refused_and_not_run(tmp_path, content, named):
    path = write_torch(tmp_path / "w.pth", content(tmp_path / "proof"), {})
    with pytest.raises(InputError, match=f"asks for '{named}': .*weights_only=False") as error:
        read_tensors(path)
    assert not (tmp_path / "proof").exists() and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        b"ctorch._utils\n_rebuild_tensor_v2\n" + tuple_of(b"N", dictionary({"__defaults__": tuple_of()})) + b"b",
        called("torch", "FloatStorage"),
        tensor_of("0", (8,), (1,), 0, 4),
        tensor_of("0", (4,), (1,), -1, 4),
        tensor_of("0", (2,), (-1,), 1, 4),
        tensor_of("1", (4,), (1,), 0, 4),
        tensor_of("0", (8,), (1,), 0, 8),
        text("cut")[:-1],
    ],
    ids="alter_function call_string beyond_storage negative_offset negative_stride no_storage short cut".split(),
)
def test_torch_file_that_does_not_add_up(tmp_path, content):
    path = write_torch(tmp_path / "w.pth", content, {"0": np.zeros(4, np.float32)})
    with pytest.raises(InputError, match=r"w\.pth is damaged or no .*copy or download it again"):
        read_tensors(path)


def test_torch_zip_that_is_none(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
        archive.writestr("readme", "")
    with pytest.raises(InputError, match=r"no data\.pkl"):
        read_tensors(tmp_path / "w.pth")


def test_torch_file_of_the_other_byte_order(tmp_path):
    path = write_torch(tmp_path / "w.pth", dictionary({}), {})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/byteorder", "big")
    with pytest.raises(InputError, match="big-endian"):
        read_tensors(path)


# Bad files


def npz_bytes(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.safetensors", b"", "is empty"),
        ("w.safetensors", b"<html>not found</html>", "damaged or no .safetensors file"),
        ("w.safetensors", safetensors.numpy.save(tiny())[:-7], "damaged"),
        (
            "w.safetensors",
            safetensors.numpy.save({"a": np.zeros(3, np.int64)}),
            "type I64; allowed: F64, F32, F16, BF16",
        ),
        ("w.safetensors", safetensors.numpy.save({}), "holds no tensors"),
        ("w.npz", npz_bytes(a=np.zeros(99))[:-30], "damaged or no .npz file"),
        ("w.npz", npz_bytes(a=np.array([print], object)), "damaged .*allow_pickle=False"),
        ("w.pth", b"PK\x03\x04 and then no more", "damaged or no PyTorch file .*copy or download it again"),
        ("w.pth", pickle.dumps(0x1950A86A20F9469CFC6C, 2) + b"\x80\x02", r"before version 1\.6.*torch\.save"),
        ("w.h5", b"HDF", r"not a weight file by its name; allowed: \.safetensors, \.npz, \.pth, \.pt"),
    ],
)
def test_bad_file(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_tensors(tmp_path / name)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"No weight file .*w\.pth"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize("value", [np.nan, -np.inf, 1e39])
def test_weights_that_are_not_finite(tmp_path, value):
    tensors = tiny() | {"norm.bias": np.full(32, value), "head.bias": np.full(5, value)}
    with pytest.raises(InputError, match=r"NaN or infinite weights in (norm|head)\.bias, (norm|head)\.bias"):
        read_tensors(write(tmp_path / "w.safetensors", tensors))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"]", "holds a list"), (dictionary({"a": number(3)}), "holds a, which are no tensors; a state_dict is needed")],
)
def test_torch_file_without_a_state_dict(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        read_tensors(write_torch(tmp_path / "w.pth", content, {}))


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
        (changed(pos_embed=np.zeros((10, 32))), r"the shape of pos_embed \(10, 32\) is impossible"),
        (changed(pos_embed=None), "no pos_embed"),
        (changed(patch_embed__proj__weight=np.zeros((32, 1, 4, 4))), "with 1 channels"),
        (changed(patch_embed__proj__weight=np.zeros((32, 3, 4, 8))), "patches of 4x8"),
        (changed(blocks__0__mlp__fc1__weight=np.zeros((96, 32))), "packed SwiGLU"),
        (tiny(class_token=False, pool="mean", qkv_bias=False), r"post-norm ViT \(rpn\)"),
        (changed(cls_token=None, pos_embed=np.zeros((1, 9, 32))), "'mean' does not go with this head"),
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
        ("vit.encoder.layer.0.attention.attention.query.weight", "HF transformers"),
        ("embeddings.cls_token", "HF transformers"),
        ("encoder.layers.encoder_layer_0.ln_1.weight", "torchvision"),
        ("visual.transformer.resblocks.0.ln_1.weight", "CLIP"),
        ("teacher.backbone.cls_token", "training setup"),
        ("decoder_embed.weight", "decoder"),
        ("blocks.0.1.norm1.weight", "block_chunks=0"),
        ("attn_pool.latent", "attention pooling"),
        ("norm_pre.weight", "norm before the first block"),
        ("pre_logits.fc.weight", "head of several layers"),
        ("head.fc.weight", "head of several layers"),
        ("blocks.0.mlp.w12.weight", "SwiGLU"),
        ("blocks.0.mlp.fc1_g.weight", "SwiGLU"),
        ("blocks.0.attn.norm.weight", "norms inside"),
        ("rope.periods", "rotary"),
        ("layers.0.blocks.0.attn.relative_position_bias_table", "relative position"),
        ("blocks.0.gamma_1", "BEiT, EVA or CaiT"),
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
        assert infer_fields(tiny(**variant), num_heads=variant.get("num_heads", 2))["width"] == 32


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(), "number of heads at width 32 is not in the file; give num_heads"),
        (dict(num_heads=3), "width 32 is not a multiple of num_heads 3"),
        (dict(num_heads=2, depth=3), r"depth=3 \(the file: 2\) contradicts"),
        (dict(num_heads=2, pool="mean"), "pool 'mean' does not go with this head"),
        (dict(num_heads=2, image_size=30), "30x30 is not a multiple of patch_size 4"),
    ],
)
def test_given_fields_that_do_not_fit(tmp_path, given, message):
    with pytest.raises(InputError, match=message):
        read_weights(write(tmp_path / "w.safetensors", tiny()), **given)


def test_num_heads_by_convention():
    tensors = tiny(depth=1, width=192, num_heads=3, mlp_dim=8)
    assert infer_fields(tensors)["num_heads"] == 3
    with pytest.raises(InputError, match=r"num_heads=4 .*the file: 2"):
        infer_fields(tiny(qk_norm=True), num_heads=4)


def test_errors_of_the_layout_name_the_file(tmp_path):
    with pytest.raises(InputError, match=r"w\.safetensors: .*missing: norm.bias"):
        read_weights(write(tmp_path / "w.safetensors", changed(norm__bias=None)), num_heads=2)


# Load


def test_fresh_head_and_reducer_are_named_in_the_log(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    tensors = tiny(distilled=True, depth=1)
    path = write(tmp_path / "w.safetensors", tensors)
    model = load(path, num_heads=2, num_classes=3, reducer="tif", keep_ratio=0.5)
    logits, aux = jax.jit(lambda x: model(x))(images())
    assert logits.shape == (2, 3) and aux["kept"].shape == (2, 4)
    heads = {f"{head}/{leaf}" for head in ("head", "distillation_head") for leaf in ("bias", "kernel")}
    (line,) = [line for line in caplog.messages if "freshly initialised: " in line]
    assert {
        name for name in line.split("initialised: ")[1].split(", ") if not name.startswith("reducer/filter/")
    } == heads
    np.testing.assert_array_equal(model.norm.bias[...], tensors["norm.bias"])
    assert all(np.ptp(drawn[...]) > 0 for drawn in (model.head.kernel, model.reducer.filter.local_in.kernel))


def test_headless_backbone(tmp_path):
    path = write(tmp_path / "w.safetensors", tiny(head=False))
    with pytest.raises(InputError, match=r"no head .*; give num_classes"):
        read_weights(path, num_heads=2)
    fields, params = read_weights(path, num_heads=2, num_classes=7, pool="mean")
    assert (fields["num_classes"], fields["pool"]) == (7, "mean") and "head" not in params
    np.testing.assert_array_equal(params["norm"]["bias"], tiny(head=False)["norm.bias"])


def test_read_weights(tmp_path):
    fields, params = read_weights(write(tmp_path / "w.safetensors", tiny()), num_heads=2, image_size=20, norm_eps=1e-5)
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
    logits = predict(write(tmp_path / "w.safetensors", tensors), images(8, 24), num_heads=2, image_size=(8, 24))
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
