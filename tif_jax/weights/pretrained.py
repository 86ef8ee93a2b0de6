"""Pretrained weights: reads the files of other programs as parameters of our models."""

import io
import json
import logging
import math
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import traverse_util

from tif_jax.errors import InputError
from tif_jax.models import grid_of, with_defaults
from tif_jax.runtime import files
from tif_jax.tasks import CLASSIFICATION
from tif_jax.weights import dense, timm_eva, timm_levit, timm_vit, transformers_vit
from tif_jax.weights.layout import Tensors, shortened
from tif_jax.weights.positions import resize_positions
from tif_jax.weights.torch_file import NESTED, read_torch

logger = logging.getLogger(__name__)

_SAFETENSORS_FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
_INDEX = ".safetensors.index.json"  # of weights in several files: which tensor is in which
# An .npz may be compressed. Weights hardly get smaller; zeros, a thousandfold.
_MOST_COMPRESSED, _FREELY_UNPACKED = 32, 2**26  # times; bytes
_WRAPPERS = ("module.", "_orig_mod.")  # what DistributedDataParallel and torch.compile put before every name
# Integers that PyTorch stores beside the weights: counters of batch norms and, in older files, indices of attention biases
# and of CLIP's positions.
_NO_WEIGHTS = (".num_batches_tracked", ".attention_bias_idxs", "embeddings.position_ids")


def read_weights(
    path: str | Path, said: Mapping[str, Any] | None = None, **given: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of the model and the backbone's float32 parameters (nested dict) of a file in timm's layout, or
    with the names of HF transformers.

    The architecture is read off the file. said: fields of the model that the weights were saved from, as a description in or
    beside the file has them; given: fields that a file cannot tell or that are to differ (`infer_fields` of timm_vit and
    timm_levit). The position embedding is resized to the image_size that is given; heads for another num_classes are left
    out. A dense task leaves out all of a classifier's, and has the decoder if the file has one.
    """
    said, tensors = said or {}, read_tensors(path)
    task = dense.task_of(given, said)
    with _naming(path):
        tensors, decoder = dense.divided(tensors, said, given)
    if task == CLASSIFICATION.name:
        return _read_backbone(path, tensors, dense.of_backbone(said), given)
    if timm_levit.is_levit(tensors):
        raise InputError(f"{path}: {dense.NEEDS_VIT.format(task)}")
    own = {key: value for key, value in {**said, **given}.items() if key in dense.FREE}
    num_classes = given.get("num_classes", said.get("num_classes") if dense.is_dense(said) else None)
    said, given = dense.of_backbone(said), dense.of_backbone(given) | {"num_classes": 0}
    fields, params = _read_backbone(path, tensors, said, given)
    with _naming(path):
        fields, params = dense.begun(fields, params, task, num_classes)
    return fields | own, params | decoder


def _read_backbone(
    path: str | Path, tensors: Tensors, said: Mapping[str, Any], given: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A classifier, or without its head a backbone."""
    if transformers_vit.is_transformers(tensors):
        with _naming(path):
            tensors, defaults = transformers_vit.to_timm(tensors)
        said = {**defaults, **said}
    layout = timm_eva if said.get("rotary") else _layout_of(tensors)
    headless = layout is not timm_levit and "head.weight" not in tensors and said.get("num_classes") == 0
    said = {key: value for key, value in said.items() if key in layout.FREE}
    said |= {"num_classes": 0} if headless else {}  # it says so, so that nobody has to
    wanted = given.get("image_size")
    if said.get("pool") == "mean" and "fc_norm.weight" not in tensors:  # timm has one name for both
        said["pool"] = "normed_mean"
    trained_for = said.get("image_size", wanted)
    with _naming(path):
        fields = layout.infer_fields(tensors, **{**said, **given, "image_size": trained_for})
        params = layout.to_params(tensors, fields)
        if wanted is None:
            return fields, params
        old, new = grid_of(fields), grid_of(fields | {"image_size": wanted})
        if layout is not timm_levit and "pos_embed" in tensors and old == new and "image_size" not in said:
            timm_vit.tell_of_a_square(tensors, fields)
        if old != new:
            if "position_embedding" in params:
                logger.info("Position embedding resized from %dx%d to %dx%d patches", *old, *new)
            params = resize_positions(params, old, new)
        return fields | {"image_size": wanted}, params


def _layout_of(tensors: Mapping[str, np.ndarray]) -> Any:
    """The module that reads tensors of these names."""
    if timm_levit.is_levit(tensors):
        return timm_levit
    return timm_eva if timm_eva.is_eva(tensors) else timm_vit


def to_tensors(params: dict[str, Any], fields: dict[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The backbone's parameters as float32 tensors in timm's layout, and the fields that these leave open.

    Raises InputError for a model that `read_weights` would not make of these tensors again.
    """
    full = with_defaults(fields)
    layout: Any = timm_levit if full["family"] == "levit" else timm_eva if full["rotary"] else timm_vit
    # JSON has lists for tuples.
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    decoder, params = dense.tensors_of(params), dense.of_backbone(params)
    tensors = layout.to_tensors(params, fields)
    free = {key: value for key, value in full.items() if key in layout.FREE}
    headless = dense.is_dense(full) or not fields.get("num_classes", 1)
    free |= {"num_classes": 0} if headless else {}
    again = layout.to_params(tensors, layout.infer_fields(tensors, **free))
    if not jax.tree.all(jax.tree.map(np.array_equal, again, params)):
        raise InputError("timm's layout can not tell this model from another; keep its Orbax checkpoint")
    return tensors | decoder, free | dense.told_of(full)


def names_of(params: dict[str, Any], fields: Mapping[str, Any]) -> dict[str, str] | None:
    """By the path of each of the backbone's parameters: the name of its tensor in timm's layout.

    None for a model with rotary positions: there some parameters are several tensors.
    """
    full = with_defaults(fields)
    if full.get("rotary"):
        return None
    layout = timm_levit if full["family"] == "levit" else timm_vit
    flat = traverse_util.flatten_dict(params, sep="/")
    decoder = {path: path for path in dense.tensors_of(params)}
    flat = {path: leaf for path, leaf in flat.items() if path not in decoder}
    # Each parameter is filled with its number, which is then looked for among the tensors.
    marked = {path: np.full(leaf.shape, number) for number, (path, leaf) in enumerate(flat.items())}
    tensors = layout.to_tensors(traverse_util.unflatten_dict(marked, sep="/"), fields)
    by_number = {int(tensor.flat[0]): name for name, tensor in tensors.items()}
    return {path: by_number[number] for number, path in enumerate(flat)} | decoder


def read_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a .safetensors, .npz or .pth/.pt/.bin file by name, floats as float32. Runs no code that it carries.

    An index (.safetensors.index.json) stands for the shards beside it. Raises InputError for a file that is missing, damaged
    or of another kind, and for weights that are NaN or infinite.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"No weight file {path}; give the path of a {', '.join(READERS)} file")
    if not is_weight_file(path):
        raise InputError(f"{path} is not a weight file by its name; allowed: {', '.join(READERS)}")
    if not os.access(path, os.R_OK):
        raise InputError(f"{path} can not be read: no permission")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty; copy or download it again")
    read = _read_shards if path.name.endswith(_INDEX) else READERS[path.suffix]
    tensors = {k: v for k, v in read(path).items() if not k.endswith(_NO_WEIGHTS)}
    if not tensors:
        raise InputError(f"{path} holds no tensors")
    for wrapper in _WRAPPERS:
        if all(name.startswith(wrapper) for name in tensors):
            tensors = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite and is named below
        floats = {name for name, tensor in tensors.items() if jnp.issubdtype(tensor.dtype, jnp.floating)}
        tensors = {k: v.astype(np.float32, copy=False) if k in floats else v for k, v in tensors.items()}
    if broken := [name for name in tensors if name in floats and not np.isfinite(tensors[name]).all()]:
        raise InputError(f"{path} holds NaN or infinite weights in {shortened(broken)}; use an earlier checkpoint")
    return tensors


def is_weight_file(path: Path) -> bool:
    """Whether this is a weight file, or the index of several, by its name."""
    return path.suffix in READERS or path.name.endswith(_INDEX)


def _read_shards(index: Path) -> dict[str, np.ndarray]:
    try:
        where = json.loads(files.read(index))["weight_map"]
        names = sorted({*where.values()})
        if any(Path(name).name != name or Path(name).suffix != ".safetensors" for name in names):
            raise ValueError("a shard is no .safetensors file beside it")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(index, error) from error
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise InputError(f"{index} names shards that are not beside it: {shortened(missing)}; download them as well")
    tensors: dict[str, np.ndarray] = {}
    for name in names:
        tensors |= _read_safetensors(index.parent / name)
    if tensors.keys() != where.keys():
        different = sorted(tensors.keys() ^ where.keys())
        raise InputError(
            f"{index} is of other shards than those beside it: {shortened(different)}; download them again"
        )
    return tensors


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        entries = [entry for entry in safetensors.deserialize(path.read_bytes()) if not entry[0].endswith(_NO_WEIGHTS)]
        if not (other := sorted({entry["dtype"] for _, entry in entries} - set(_SAFETENSORS_FLOATS))):
            return {
                name: np.frombuffer(entry["data"], _SAFETENSORS_FLOATS[entry["dtype"]]).reshape(entry["shape"])
                for name, entry in entries
            }
    except Exception as error:  # numpy has other limits than the format: 64 dimensions
        raise _damaged(path, error) from error
    raise InputError(f"{path} holds tensors of type {', '.join(other)}; allowed: {', '.join(_SAFETENSORS_FLOATS)}")


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if other := [member.filename for member in members if not member.filename.endswith(".npy")]:
                raise InputError(f"{path} holds {shortened(other)}, no array; save the arrays alone with numpy.savez")
            if len({member.filename for member in members}) < len(members):
                raise ValueError("two arrays have the same name")
            limit = max(_FREELY_UNPACKED, _MOST_COMPRESSED * path.stat().st_size)
            if sum(member.file_size for member in members) > limit:
                raise ValueError(f"unpacked it is more than {_MOST_COMPRESSED} times as long, which weights are not")
            return {member.filename.removesuffix(".npy"): _read_npy(archive, member) for member in members}
    except InputError:
        raise
    except Exception as error:  # numpy, zipfile and zlib have many ways to say that a file is damaged
        raise _damaged(path, error) from error


def _read_npy(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """One array, allocated when its bytes are there: numpy would believe the shape in its header."""
    data = archive.read(member)
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read_header(file)
    if dtype.hasobject:
        raise ValueError(f"{member.filename} holds Python objects")
    if math.prod(shape) * dtype.itemsize != len(data) - file.tell():
        raise ValueError(f"{member.filename} has {len(data) - file.tell()} bytes for shape {shape} of {dtype}")
    return np.ndarray(shape, dtype, data, file.tell(), order="F" if fortran else "C")


def _read_pth(path: Path) -> dict[str, np.ndarray]:
    content = read_torch(path)
    held = [key for key in NESTED if isinstance(content, dict) and isinstance(content.get(key), dict) and content[key]]
    tensors = content[held[0]] if held else content
    if not isinstance(tensors, dict):
        raise InputError(f"{path} holds a {type(tensors).__name__}; a dict of tensors (a state_dict) is needed")
    if other := [
        str(key) for key, tensor in tensors.items() if not isinstance(tensor, np.ndarray) or type(key) is not str
    ]:
        raise InputError(
            f"{path} holds {shortened(other)}, which are no tensors by name; a state_dict is needed, alone or under one "
            f"of the keys {', '.join(NESTED)}"
        )
    if len(held) > 1 and held[0].endswith("ema") and not held[-1].endswith("ema"):
        logger.warning(
            "%s holds the weights of the last step (%s) and their moving average (%s): the average is taken, as timm does; "
            "save the others alone to have them",
            path, held[-1], held[0],
        )  # fmt: skip
    return tensors


def _damaged(path: Path, error: Exception) -> InputError:
    reason = str(error).split("\n")[0][:200]  # zipfile quotes the names that it finds, whatever they are
    # In the hub's cache a name is a link, and what it leads to is taken as long as it is there.
    remedy = f"delete {path.resolve()}, then download it again" if path.is_symlink() else "copy or download it again"
    return InputError(f"{path} is damaged or no {path.suffix} file ({reason}); {remedy}")


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Puts the file's name before what is wrong with its tensors."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


READERS = {
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
    **dict.fromkeys((".pth", ".pt", ".tar", ".bin"), _read_pth),  # timm names training checkpoints .pth.tar
}
