"""Tensors out of .safetensors, .npz and .pth files; what is damaged, or carries code, is refused."""

import io
import json
import pickle
import struct
import tracemalloc
import warnings
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from cases import write_safetensors
from reference import random_timm_tensors
from torch_bytes import called, dictionary, number, tensor_of, text, tuple_of, write_state_dict, write_torch

from tif_jax.errors import InputError
from tif_jax.weights.pretrained import read_tensors, read_weights


def tiny(**variant):
    return random_timm_tensors(np.random.default_rng(0), **variant)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float16, 1e-3), (jnp.bfloat16, 8e-3), (np.float64, 0)])
def test_safetensors_dtypes_become_float32(tmp_path, dtype, tolerance):
    tensors = tiny(depth=1)
    read = read_tensors(
        write_safetensors(tmp_path / "w.safetensors", {name: t.astype(dtype) for name, t in tensors.items()})
    )
    assert {t.dtype for t in read.values()} == {np.dtype("float32")} and read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_allclose(read[name], tensor, rtol=tolerance, atol=1e-7)


def test_npz(tmp_path):
    np.savez(tmp_path / "w.npz", **tiny())
    assert read_tensors(tmp_path / "w.npz")["head.weight"].tolist() == tiny()["head.weight"].tolist()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrapper_prefixes_are_stripped(tmp_path, prefix):
    path = write_safetensors(tmp_path / "w.safetensors", {prefix + name: t for name, t in tiny().items()})
    assert read_tensors(path).keys() == tiny().keys()


# What training programs put beside the weights: an object with a state, a number of numpy's, other tensors.
NAMESPACE = (
    b"cargparse\nNamespace\n)\x81" + dictionary({"lr": number(1), "data": called("pathlib", "PosixPath")}) + b"b"
)
SCALAR = called("numpy._core.multiarray", "scalar", called("numpy", "dtype", text("f8")), text("12345678"))
OTHER = dictionary({"a": tensor_of("head.bias", (5,), (1,), 0, 5)})
WRAPS = {
    "bare": lambda entries: entries,
    "deit": lambda entries: dictionary({"model": entries, "epoch": number(299)}),
    "lightning": lambda entries: dictionary({"state_dict": entries, "lr": b"]" + number(1) + b"a"}),
    "timm": lambda entries: dictionary({"state_dict_ema": b"}", "state_dict": entries, "args": NAMESPACE}),
    "ema": lambda entries: dictionary({"model_ema": entries, "epoch": b"N", "metric": SCALAR}),
    "both": lambda entries: dictionary({"model": OTHER, "state_dict": OTHER, "model_ema": entries}),
    "timm's both": lambda entries: dictionary({"state_dict": OTHER, "state_dict_ema": entries}),
}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".pth.tar"])
def test_torch_file(tmp_path, caplog, wrap, suffix):
    caplog.set_level("WARNING", "tif_jax")
    read = read_tensors(write_state_dict(tmp_path / f"w{suffix}", tiny(), WRAPS[wrap]))
    assert read.keys() == tiny().keys()
    for name, tensor in tiny().items():
        np.testing.assert_array_equal(read[name], tensor)
    told = {"both": "model_ema", "timm's both": "state_dict_ema"}.get(wrap)
    assert [f"({told}): the average is taken, as timm does" in message for message in caplog.messages] == [True] * bool(
        told
    )


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
        (lambda path: dictionary({"args": called("my.recipe", "Args")}), "my.recipe.Args"),
        (lambda path: called("argparse", "_sys.exit"), "argparse._sys.exit"),
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
        ("w.npz", npz_bytes(a=np.array([print], object)), "damaged .*a.npy holds Python objects"),
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
        read_tensors(write_safetensors(tmp_path / "w.safetensors", tensors))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"]", "holds a list"),
        (dictionary({"a": number(3)}), "holds a, which are no tensors by name; a state_dict is needed"),
        (b"}" + number(7) + tensor_of("0", (), (), 0, 1) + b"s", "holds 7, which are no tensors by name"),
    ],
)
def test_torch_file_without_a_state_dict(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        read_tensors(write_torch(tmp_path / "w.pth", content, {"0": np.zeros(1, np.float32)}))


# Files that would take more memory than they have bytes


def zipped(*members, compression=zipfile.ZIP_STORED):
    """A zip archive of (name, content)."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", compression) as archive:
        warnings.simplefilter("ignore")  # of two members with one name
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


def npy_claiming(shape):
    """An .npy file with this shape in its header, and eight bytes."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return buffer.getvalue() + bytes(8)


def safetensors_of_shape(shape):
    header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(4)


MEMO = b"}" + b"r" + struct.pack("<I", 2**31)  # LONG_BINPUT
WIDE = dictionary({f"x{i}": tensor_of("0", (2**20,), (0,), 0, 4) for i in range(40)})  # one number many times


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.pth", zipped(("a/data.pkl", b"\x80\x02" + MEMO + b".")), "holds no tensors"),
        ("w.pth", zipped(("a/data.pkl", b"\x80\x05\x96" + struct.pack("<Q", 2**33) + b".")), "damaged"),
        ("w.pth", zipped(("a/data.pkl", b"\x80\x02}."), ("a/data/0", bytes(2**20)), compression=8), "compressed"),
        ("w.pth", zipped(("a/data.pkl", b"\x80\x02" + WIDE + b"."), ("a/data/0", bytes(16))), "many times the numbers"),
        ("w.pth", zipped(("a/data.pkl", b"\x80\x02}."), ("a/data.pkl", b"\x80\x02].")), "two parts have the same name"),
        ("w.npz", zipped(("a.npy", bytes(2**27)), compression=8), "more than 32 times as long"),
        ("w.npz", zipped(("a.npy", npy_claiming((2**40,)))), r"8 bytes for shape \(1099511627776,\)"),
        (
            "w.npz",
            zipped(("a.npy", npy_claiming((2,))), ("a.npy", npy_claiming((2,)))),
            "two arrays have the same name",
        ),
        ("w.npz", zipped(("a.npy", npy_claiming((2,))), ("readme.txt", b"hello")), r"holds readme\.txt, no array"),
        ("w.safetensors", safetensors_of_shape([1] * 65), "damaged"),
        ("w.safetensors", safetensors_of_shape([2**33, 2**33]), "damaged"),
    ],
    ids=range(11),
)
def test_file_that_asks_for_too_much(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=message) as error:
            read_tensors(tmp_path / name)
        assert tracemalloc.get_traced_memory()[1] < 2**24 and "\n" not in str(error.value)
    finally:
        tracemalloc.stop()
