"""Reads tensors out of PyTorch's .pth/.pt files without PyTorch and without running what a pickle may carry.

Such a file is a zip of one pickle (`data.pkl`: the containers, and for each tensor its storage, offset, shape and
strides) and one raw little-endian file per storage. The pickle may name any Python function to be called; here
it gets the four that rebuild tensors and dictionaries, and everything else is refused by name.
"""

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

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
_LEGACY_MAGIC = bytes.fromhex("80028a0a6cfc9c46f9206aa85019")  # a pickled integer, at the start of files before 1.6


def read_torch(path: Path) -> Any:
    """The object that torch.save wrote: dicts, lists, tuples, numbers, strings and numpy arrays for tensors.

    Raises InputError for a damaged file, for the format before PyTorch 1.6 and for a pickle that names anything else.
    """
    with path.open("rb") as file:
        if file.read(len(_LEGACY_MAGIC)) == _LEGACY_MAGIC:
            raise InputError(
                f"{path} is in PyTorch's format before version 1.6, which is not read here; with a PyTorch at hand: "
                "torch.save(torch.load(old, weights_only=True), new)"
            )
    try:
        with zipfile.ZipFile(path) as archive:
            return _Unpickler(archive, path).load()
    except InputError:
        raise
    except Exception as error:  # whatever a parser of untrusted bytes trips over means that the file is damaged
        reason = str(error).split("\n")[0]
        raise InputError(
            f"{path} is damaged or no PyTorch file ({type(error).__name__}: {reason}); copy or download it again"
        ) from error


class _Unpickler(pickle.Unpickler):
    """Gives a pickle bound methods only: unlike functions and classes, it cannot alter them."""

    def __init__(self, archive: zipfile.ZipFile, path: Path):
        folders = [name.removesuffix("data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(folders) != 1:
            raise InputError(f"{path} is a zip archive, but not one that torch.save wrote: it holds no data.pkl")
        self._archive, self._path, self._folder = archive, path, folders[0]
        super().__init__(io.BytesIO(archive.read(self._folder + "data.pkl")))
        self._storages: dict[str, np.ndarray] = {}
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
        raise InputError(
            f"{self._path} asks for {f'{module}.{name}'!r}: only tensors in plain containers are read. "
            "If you trust the file, save its tensors alone with PyTorch: "
            "torch.save(torch.load(old, weights_only=False)['model'], new)"
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
        steps = [stride * storage.itemsize for stride in strides]
        return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps, writeable=False).copy()

    def _parameter(self, tensor: np.ndarray, *_: Any) -> np.ndarray:
        return tensor

    def _dictionary(self) -> dict:
        return _Dictionary()


class _Dictionary(dict):
    def __setstate__(self, state: Any) -> None:
        """torch's state_dict() carries an attribute `_metadata`, which nothing here reads."""
