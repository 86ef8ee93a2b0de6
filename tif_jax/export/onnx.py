"""ONNX: what onnxruntime and other engines run, for any batch size.

A model is traced to JAX's operations (`program`), several of which are made one where ONNX has one (`fusion`); each becomes a
few nodes (`onnx_ops`, `onnx_indexing`).
"""

import importlib.util
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from tif_jax.errors import InputError
from tif_jax.export import artifact
from tif_jax.export.fusion import fused
from tif_jax.export.program import Program, traced
from tif_jax.models import Model, built_with

FILE = "model.onnx"
_NEEDED = ("onnx", "onnxruntime")
_LARGEST = 2**31 - 2**20  # bytes: of a file in this format


def to_onnx(model: Model, folder: str | Path) -> dict[str, Any]:
    """Makes a folder with the model as an ONNX file, checked in onnxruntime, a manifest and a loader; returns the manifest.

    The batch size is free, the weights are inside. Whole numbers in it are int64. Raises InputError where a package is
    missing, the model computes in another type than float32 or does something that has no translation (random numbers), or
    the folder can not be written or is there already; WorkError where the file does not compute what the model computes.
    """
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise InputError(f'ONNX needs {" and ".join(missing)}: pip install "tif_jax[export]"')
    artifact.check(model, folder)
    if model.dtype != jnp.float32:
        raise InputError(
            f"the model computes in {jnp.dtype(model.dtype).name}, for which onnxruntime lacks operations; load it with "
            "dtype='float32'"
        )
    return artifact.write(model, folder, "onnx", {FILE: _file(model)}, _reloaded, "onnxruntime")


def _file(model: Model) -> bytes:
    """The model as an ONNX file."""
    names: list[str] = []

    def call(images):
        outputs = artifact.forward(model)(images)
        names[:] = outputs
        return list(outputs.values())

    program = fused(traced(call, (*model.image_size, 3)))
    return graph_of(program, names, built_with(model)["reducer"]["name"])


def graph_of(program: Program, names: list[str], reducer: str) -> bytes:
    """The program as an ONNX file, its outputs under these names."""
    from tif_jax.export import onnx_indexing, onnx_ops
    from tif_jax.export.onnx_graph import Graph

    rules = onnx_ops.RULES | onnx_indexing.RULES
    if unknown := sorted({operation.name for operation in program.operations} - rules.keys()):
        raise InputError(
            f"reducer {reducer!r} can not be exported to ONNX: there is no translation of {', '.join(unknown)}; StableHLO "
            "has them"
        )
    graph = Graph(program)
    for operation in program.operations:
        try:
            rules[operation.name](graph, operation)
        except NotImplementedError as error:
            raise InputError(
                f"reducer {reducer!r} can not be exported to ONNX: there is no translation of {error}; StableHLO has it"
            ) from None
    if graph.num_bytes > _LARGEST:
        raise InputError(
            f"the model has {graph.num_bytes / 2**30:.1f} GiB; an ONNX file holds 2: export a smaller model"
        )
    return graph.model(dict(zip(names, program.outputs, strict=True)), program.images.shape[1:]).SerializeToString()


def _reloaded(path: Path) -> artifact.Call:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda images: dict(zip(names, map(np.asarray, session.run(names, {"images": images})), strict=True))
