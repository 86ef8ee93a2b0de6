"""Reads tensors out of PyTorch's .pth/.pt files without PyTorch and without running what a pickle may carry.

Such a file is a zip of one pickle (`data.pkl`: the containers, and for each tensor its storage, offset, shape and
strides) and one raw little-endian file per storage. The pickle may name any Python function to be called; here
it gets the four that rebuild tensors and dictionaries. What training programs put beside the weights becomes an object that
does nothing, and everything else is refused by name.

Memory is bounded by the size of the file: nothing in it is compressed, a tensor is a view of its storage, and the unpickler
is Python's, whose memo is a dict. (That of C takes an array as long as the greatest index, which five bytes can make 2^32.)
"""

import io
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from tif_jax.errors import InputError

_STORAGES = {
    "DoubleStorage": "f8",
    "FloatStorage": "f4",
    "HalfStorage": "f2",
    "BFloat16Storage": jnp.bfloat16,
    "LongStorage": "i8",
    "IntStorage": "i4",
    "ShortStorage": "i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}
# What stands beside the weights in training checkpoints: arguments, metrics, settings of the optimiser.
_INERT = {
    *(("argparse", "Namespace"), ("collections", "defaultdict"), ("_codecs", "encode"), ("numpy", "dtype")),
    *(("numpy", "ndarray"), ("torch", "device"), ("torch", "Size"), ("pathlib", "Path"), ("pathlib", "PosixPath")),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(("torch", f"{kind}{bits}") for kind in ("float", "int", "bfloat") for bits in (8, 16, 32, 64)),
}
NESTED = (
    "state_dict_ema",
    "model_ema",
    "state_dict",
    "model",
)  # where training programs put the tensors; averages first
_LEGACY_MAGIC = bytes.fromhex("80028a0a6cfc9c46f9206aa85019")  # a pickled integer, at the start of files before 1.6
_TENSORS_ALONE = f"new = next((old[key] for key in {NESTED} if old.get(key)), old); torch.save(new, 'new.pth')"
_REMEDIES = {  # of what begins with these modules
    ("torch.nn", "timm", "torchvision", "models"): "torch.save(old.state_dict(), 'new.pth')",
    ("",): _TENSORS_ALONE,
}


def read_torch(path: Path) -> Any:
    """The object that torch.save wrote: dicts, lists, tuples, numbers, strings and numpy arrays for tensors.

    Raises InputError for a damaged file, for the format before PyTorch 1.6 and for a pickle that names anything else.
    """
    with path.open("rb") as file:
        if file.read(len(_LEGACY_MAGIC)) == _LEGACY_MAGIC:
            raise InputError(
                f"{path} is in PyTorch's format before version 1.6, which is not read here; with a PyTorch at hand: "
                f"old = torch.load({str(path)!r}, 'cpu', weights_only=True) (False if it refuses and you trust the file); "
                f"{_TENSORS_ALONE}"
            )
    try:
        with zipfile.ZipFile(path) as archive:
            _check_members(archive, path.stat().st_size)
            return _Unpickler(archive, path).load()
    except InputError:
        raise
    except Exception as error:  # whatever a parser of untrusted bytes trips over means that the file is damaged
        reason = str(error).split("\n")[0][:200]
        raise InputError(
            f"{path} is damaged or no PyTorch file ({type(error).__name__}: {reason}); copy or download it again"
        ) from error


def _check_members(archive: zipfile.ZipFile, num_bytes: int) -> None:
    """Raises ValueError if reading the members once could give more than the file holds, or if two have one name."""
    members = archive.infolist()
    if len({member.filename for member in members}) < len(members):
        raise ValueError("two parts have the same name")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("its parts are compressed, which PyTorch's are not")
    if sum(max(member.file_size, member.compress_size) for member in members) > num_bytes:
        raise ValueError("its parts are longer than the file")


class _Unpickler(pickle._Unpickler):
    """Gives a pickle bound methods, which, unlike functions and classes, it cannot alter, and a class that alters nothing."""

    # Byte arrays, which torch.save does not write, are allocated before it is seen that the file is too short for them.
    dispatch: ClassVar = {
        code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]
    }

    def __init__(self, archive: zipfile.ZipFile, path: Path):
        folders = [name.removesuffix("data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(folders) != 1:
            raise InputError(f"{path} is a zip archive, but not one that torch.save wrote: it holds no data.pkl")
        self._archive, self._path, self._folder = archive, path, folders[0]
        super().__init__(io.BytesIO(archive.read(self._folder + "data.pkl")))
        self._storages: dict[str, np.ndarray] = {}
        # Tensors may share storages (tied weights), but not so many that copies of them would fill the memory.
        self._numbers_left = 2 * path.stat().st_size
        if self._folder + "byteorder" in archive.namelist() and archive.read(self._folder + "byteorder") != b"little":
            raise InputError(f"{path} was written on a big-endian machine; save it again on a little-endian one")

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("collections", "OrderedDict"): self._dictionary,
            ("torch._utils", "_rebuild_tensor"): self._tensor,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): self._parameter,
        }
        if module == "torch" and name in _STORAGES:
            return name
        if (module, name) in known:
            return known[module, name]
        if (module, name) in _INERT:
            return _Inert
        remedy = next(remedy for modules, remedy in _REMEDIES.items() if module.startswith(modules))
        raise InputError(
            f"{self._path} asks for {f'{module}.{name}'!r}: only tensors in plain containers are read. "
            f"If you trust the file, save its tensors alone with PyTorch: "
            f"old = torch.load({str(self._path)!r}, 'cpu', weights_only=False); {remedy}"
        )

    def persistent_load(self, pid: tuple[str, str, str, str, int]) -> np.ndarray:
        _, storage, key, _, count = pid
        if key not in self._storages:
            data = self._archive.read(f"{self._folder}data/{key}")
            self._storages[key] = np.frombuffer(data, np.dtype(_STORAGES[storage]), count)
        return self._storages[key]

    def _tensor(self, storage: np.ndarray, offset: int, shape: tuple, strides: tuple, *_: Any) -> np.ndarray:
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if 0 in shape:
            return np.zeros(shape, storage.dtype)
        if min(offset, *shape, *strides, 0) < 0 or last >= storage.size:
            raise ValueError(f"a tensor of shape {shape} and strides {strides} leaves its storage of {storage.size}")
        self._numbers_left -= math.prod(shape)
        if self._numbers_left < 0:
            raise ValueError(f"its tensors have many times the numbers that it holds, the last one shape {shape}")
        steps = [stride * storage.itemsize for stride in strides]
        return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps, writeable=False)

    def _parameter(self, tensor: np.ndarray, *_: Any) -> np.ndarray:
        return tensor

    def _dictionary(self) -> dict:
        return _Dictionary()


class _Dictionary(dict):
    def __setstate__(self, state: Any) -> None:
        """torch's state_dict() carries an attribute `_metadata`, which nothing here reads."""


class _Inert:
    """In place of what is no tensor: whatever a pickle does with it or its class changes nothing."""

    __slots__ = ()

    def __new__(cls, *_: Any) -> "_Inert":
        return super().__new__(cls)

    def ignore(self, *_: Any) -> None:
        """Takes the rest of an object's state."""

    __setstate__ = __setitem__ = append = extend = add = ignore
