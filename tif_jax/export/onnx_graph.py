"""Builds an ONNX graph node by node. Whole numbers are int64 in it, whatever they are in JAX: ONNX indexes with these."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx
from jax import export
from onnx import TensorProto, helper, numpy_helper

from tif_jax.export.program import BATCH, Program, Value

OPSET = 20  # the first with Gelu; onnxruntime 1.17
IR_VERSION = 9  # of the file format that belongs to it

_TYPES = {"f": TensorProto.FLOAT, "i": TensorProto.INT64, "u": TensorProto.INT64, "b": TensorProto.BOOL}


class Graph:
    """Nodes, and what they call the values of a program.

    A value may be held thin: with size 1 where it is the same along an axis. Elementwise operations take it so; for others
    `name` spreads it.
    """

    def __init__(self, program: Program):
        self.batch = program.batch
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self._names: dict[Value, str] = {program.images: "images"}
        self._thin: dict[Value, str] = {}
        self._constants: dict[Any, str] = {}
        self._batch_size = ""

    def node(self, kind: str, inputs: Sequence[str], num_outputs: int = 1, **attributes: Any) -> list[str]:
        """Appends a node; the names of what it makes."""
        names = [f"{kind}_{len(self.nodes)}_{i}" for i in range(num_outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=f"{kind}_{len(self.nodes)}", **attributes))
        return names

    def one(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Appends a node that makes one value; its name."""
        return self.node(kind, inputs, **attributes)[0]

    def constant(self, array: Any) -> str:
        """The name of a constant, stored once."""
        array = np.ascontiguousarray(array).reshape(np.shape(array))
        array = array.astype({"f": np.float32, "i": np.int64, "u": np.int64, "b": np.bool_}[array.dtype.kind])
        key = (array.dtype.str, array.shape, hashlib.sha256(array.tobytes()).digest())
        if key not in self._constants:
            self._constants[key] = f"constant_{len(self._constants)}"
            self.initializers.append(numpy_helper.from_array(array, self._constants[key]))
        return self._constants[key]

    def name(self, value: Value, thin: bool = False) -> str:
        """What the graph calls a value; thin: as it is held, if that is so."""
        if value.constant is not None:
            return self.constant(value.array)
        if thin and value in self._thin:
            return self._thin[value]
        if value not in self._names:
            self._names[value] = self.one("Expand", self._thin[value], self.shape(value.shape))
        return self._names[value]

    def bind(self, value: Value, name: str, thin: bool = False) -> None:
        """Says what the graph calls a value."""
        (self._thin if thin else self._names)[value] = name

    def is_thin(self, value: Value) -> bool:
        """Whether `name` has it thin, be it spread as well."""
        return value in self._thin

    def size(self, dim: Any) -> str:
        """A one-element tensor with a dimension's size."""
        if not export.is_symbolic_dim(dim):
            return self.constant([dim])
        if not self._batch_size:
            self._batch_size = self.one("Shape", "images", start=0, end=1)
        times = dim // self.batch
        return self._batch_size if times == 1 else self.one("Mul", self._batch_size, self.constant([times]))

    def shape(self, dims: Sequence[Any]) -> str:
        """A tensor with the sizes of the dimensions."""
        if not any(map(export.is_symbolic_dim, dims)):
            return self.constant(np.asarray(dims, np.int64))
        return self.one("Concat", *map(self.size, dims), axis=0) if len(dims) > 1 else self.size(dims[0])

    def reshaped(self, name: str, dims: Sequence[Any]) -> str:
        """The value in another shape, in which at most one dimension depends on the batch size."""
        sizes = [-1 if export.is_symbolic_dim(dim) else dim for dim in dims]
        return self.one("Reshape", name, self.constant(np.asarray(sizes, np.int64)), allowzero=int(0 in sizes))

    def transposed(self, name: str, order: Iterable[int]) -> str:
        order = [int(axis) for axis in order]
        return name if order == sorted(order) else self.one("Transpose", name, perm=order)

    @property
    def num_bytes(self) -> int:
        """Of all constants."""
        return sum(len(one.raw_data) for one in self.initializers)

    def model(self, outputs: dict[str, Value], image_shape: Sequence[int]) -> onnx.ModelProto:
        """The finished, checked file. outputs: by the name that each is to have."""
        for name, value in outputs.items():
            self.nodes.append(helper.make_node("Identity", [self.name(value)], [name], name=name))
        made = [
            helper.make_tensor_value_info(name, type_of(value.dtype), [BATCH, *value.shape[1:]])
            for name, value in outputs.items()
        ]
        images = helper.make_tensor_value_info("images", TensorProto.FLOAT, [BATCH, *image_shape])
        graph = helper.make_graph(self.nodes, "tif_jax", [images], made, self.initializers)
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="tif_jax"
        )
        onnx.checker.check_model(model, full_check=True)
        return model


def type_of(dtype: Any) -> int:
    """ONNX's number of the type that stands for a dtype."""
    return _TYPES[np.dtype(dtype).kind]
