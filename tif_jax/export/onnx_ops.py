"""What each of JAX's operations is in ONNX, but for those that index: `onnx_indexing`.

Each function takes the graph and an operation, and binds what the operation makes. What is in none of the tables can not be
exported.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from tif_jax.export.onnx_graph import Graph, type_of
from tif_jax.export.program import Operation, Value

Rule = Callable[[Graph, Operation], None]

_ELEMENTWISE = {
    "abs": "Abs",
    "add": "Add",
    "ceil": "Ceil",
    "cos": "Cos",
    "div": "Div",
    "eq": "Equal",
    "erf": "Erf",
    "exp": "Exp",
    "floor": "Floor",
    "ge": "GreaterOrEqual",
    "gelu": "Gelu",
    "gt": "Greater",
    "le": "LessOrEqual",
    "log": "Log",
    "logistic": "Sigmoid",
    "lt": "Less",
    "max": "Max",
    "min": "Min",
    "mul": "Mul",
    "neg": "Neg",
    "pow": "Pow",
    "sign": "Sign",
    "sin": "Sin",
    "sqrt": "Sqrt",
    "sub": "Sub",
    "tanh": "Tanh",
}
_LOGICAL = {"and": "And", "not": "Not", "or": "Or", "xor": "Xor"}  # of truth values only: not bit by bit
_REDUCED = {
    "reduce_sum": "ReduceSum",
    "reduce_max": "ReduceMax",
    "reduce_min": "ReduceMin",
    "reduce_prod": "ReduceProd",
}
_OF_TRUTH = {"reduce_or": "ReduceMax", "reduce_and": "ReduceMin"}


def _elementwise(graph: Graph, operation: Operation, make: Callable[..., str]) -> None:
    """make(names) is the name of the result, computed on what is thin where all inputs that are large are."""
    (output,) = operation.outputs
    large = [one for one in operation.inputs if one.constant is None]
    names = [graph.name(one, thin=True) for one in operation.inputs]
    graph.bind(output, make(*names), thin=bool(large) and all(map(graph.is_thin, large)))


def _node(kind: str) -> Rule:
    return lambda graph, operation: _elementwise(graph, operation, partial(graph.one, kind))


def _logical(kind: str, graph: Graph, operation: Operation) -> None:
    if operation.outputs[0].dtype != np.bool_:
        raise NotImplementedError(f"{operation.name} of {operation.outputs[0].dtype}")
    _elementwise(graph, operation, partial(graph.one, kind))


def _integer_pow(graph: Graph, operation: Operation) -> None:
    exponent = graph.constant(np.float32(operation.params["y"]))
    _elementwise(graph, operation, lambda x: graph.one("Pow", x, exponent))


def _select(graph: Graph, operation: Operation) -> None:
    if len(operation.inputs) != 3 or operation.inputs[0].dtype != np.bool_:
        raise NotImplementedError("select_n of more than two cases")
    _elementwise(graph, operation, lambda which, false, true: graph.one("Where", which, true, false))


def _clamp(graph: Graph, operation: Operation) -> None:
    _elementwise(graph, operation, lambda least, x, most: graph.one("Min", graph.one("Max", x, least), most))


def _cast(graph: Graph, operation: Operation) -> None:
    (x,), (output,) = operation.inputs, operation.outputs
    kind = type_of(output.dtype)
    same = kind == type_of(x.dtype)
    _elementwise(graph, operation, lambda name: name if same else graph.one("Cast", name, to=kind))


def _reduce(kind: str, graph: Graph, operation: Operation) -> None:
    axes = graph.constant(np.asarray(operation.params["axes"], np.int64))
    name = graph.one(kind, graph.name(operation.inputs[0]), axes, keepdims=0)
    graph.bind(operation.outputs[0], name)


def _reduce_truth(kind: str, graph: Graph, operation: Operation) -> None:
    number = graph.one("Cast", graph.name(operation.inputs[0]), to=type_of(np.int64))
    axes = graph.constant(np.asarray(operation.params["axes"], np.int64))
    found = graph.one(kind, number, axes, keepdims=0)
    graph.bind(operation.outputs[0], graph.one("Cast", found, to=type_of(np.bool_)))


def _arg(kind: str, graph: Graph, operation: Operation) -> None:
    (axis,) = operation.params["axes"]
    graph.bind(operation.outputs[0], graph.one(kind, graph.name(operation.inputs[0]), axis=int(axis), keepdims=0))


def _cumsum(graph: Graph, operation: Operation) -> None:
    axis = graph.constant(np.int64(operation.params["axis"]))
    name = graph.one("CumSum", graph.name(operation.inputs[0]), axis, reverse=int(operation.params["reverse"]))
    graph.bind(operation.outputs[0], name)


def _softmax(graph: Graph, operation: Operation) -> None:
    name = graph.one("Softmax", graph.name(operation.inputs[0]), axis=int(operation.params["axis"]))
    graph.bind(operation.outputs[0], name)


def _layer_norm(graph: Graph, operation: Operation) -> None:
    names = map(graph.name, operation.inputs)
    graph.bind(operation.outputs[0], graph.one("LayerNormalization", *names, axis=-1, **operation.params))


# Shapes


def _reshape(graph: Graph, operation: Operation) -> None:
    (x,), (output,) = operation.inputs[:1], operation.outputs
    if operation.name == "reshape" and operation.params["dimensions"] is not None:
        raise NotImplementedError("reshape of dimensions in another order")
    graph.bind(output, graph.reshaped(graph.name(x), output.shape))


def _broadcast(graph: Graph, operation: Operation) -> None:
    x, output = operation.inputs[0], operation.outputs[0]
    at = [int(axis) for axis in operation.params["broadcast_dimensions"]]
    sources = [at.index(axis) if axis in at else None for axis in range(len(output.shape))]
    sizes = [1 if source is None else x.shape[source] for source in sources]
    name = graph.name(x)
    if len(sizes) != len(x.shape):
        name = graph.reshaped(name, sizes)
    graph.bind(output, name, thin=sizes != list(output.shape))


def _transpose(graph: Graph, operation: Operation) -> None:
    name = graph.transposed(graph.name(operation.inputs[0]), operation.params["permutation"])
    graph.bind(operation.outputs[0], name)


def _slice(graph: Graph, operation: Operation) -> None:
    (x,), params = operation.inputs, operation.params
    graph.bind(
        operation.outputs[0], sliced(graph, x, params["start_indices"], params["limit_indices"], params["strides"])
    )


def sliced(graph: Graph, x: Value, starts: Any, limits: Any, strides: Any = None) -> str:
    """x[start:limit:stride] along every axis."""
    strides = strides or [1] * len(starts)
    parts = zip(range(len(starts)), starts, limits, strides, x.shape, strict=True)
    cut = [(axis, int(a), int(z), int(step)) for axis, a, z, step, size in parts if (a, z, step) != (0, size, 1)]
    if not cut:
        return graph.name(x)
    axes, first, last, steps = (graph.constant(np.asarray(each, np.int64)) for each in zip(*cut, strict=True))
    return graph.one("Slice", graph.name(x), first, last, axes, steps)


def _split(graph: Graph, operation: Operation) -> None:
    sizes = graph.constant(np.asarray(operation.params["sizes"], np.int64))
    axis, x = int(operation.params["axis"]), graph.name(operation.inputs[0])
    names = graph.node("Split", [x, sizes], len(operation.outputs), axis=axis)
    for output, name in zip(operation.outputs, names, strict=True):
        graph.bind(output, name)


def _concatenate(graph: Graph, operation: Operation) -> None:
    axis = int(operation.params["dimension"])
    graph.bind(operation.outputs[0], graph.one("Concat", *map(graph.name, operation.inputs), axis=axis))


def _stack(graph: Graph, operation: Operation) -> None:
    axis = int(operation.params["axis"])
    single = [(*one.shape[:axis], 1, *one.shape[axis:]) for one in operation.inputs]
    names = [graph.reshaped(graph.name(one), shape) for one, shape in zip(operation.inputs, single, strict=True)]
    graph.bind(operation.outputs[0], graph.one("Concat", *names, axis=axis))


def _pad(graph: Graph, operation: Operation) -> None:
    x, filled = operation.inputs
    config = [[int(amount) for amount in axis] for axis in operation.params["padding_config"]]
    if any(between or low < 0 or high < 0 for low, high, between in config):
        raise NotImplementedError("pad between elements or by less than nothing")
    amounts = graph.constant(np.asarray([[low for low, _, _ in config], [high for _, high, _ in config]]).reshape(-1))
    graph.bind(operation.outputs[0], graph.one("Pad", graph.name(x), amounts, graph.name(filled)))


def _tile(graph: Graph, operation: Operation) -> None:
    times = graph.constant(np.asarray(operation.params["reps"], np.int64))
    graph.bind(operation.outputs[0], graph.one("Tile", graph.name(operation.inputs[0]), times))


def _iota(graph: Graph, operation: Operation) -> None:
    """Of the batch size: others are constants."""
    (output,), axis = operation.outputs, operation.params["dimension"]
    count = graph.reshaped(graph.size(output.shape[axis]), ())
    name = graph.one("Range", graph.constant(np.int64(0)), count, graph.constant(np.int64(1)))
    name = graph.one("Cast", name, to=type_of(output.dtype))
    sizes = [size if i == axis else 1 for i, size in enumerate(output.shape)]
    graph.bind(output, graph.reshaped(name, sizes), thin=len(sizes) > 1)


def _dim_as_value(graph: Graph, operation: Operation) -> None:
    graph.bind(operation.outputs[0], graph.reshaped(graph.size(operation.params["dim"]), ()))


# Products


def _dot_general(graph: Graph, operation: Operation) -> None:
    """Transposed to (batch..., rows, summed) and (batch..., summed, columns), which is what MatMul takes."""
    left, right = operation.inputs
    (summed_left, summed_right), (batch_left, batch_right) = operation.params["dimension_numbers"]
    free_left = [axis for axis in range(len(left.shape)) if axis not in (*summed_left, *batch_left)]
    free_right = [axis for axis in range(len(right.shape)) if axis not in (*summed_right, *batch_right)]
    x = graph.transposed(graph.name(left), [*batch_left, *free_left, *summed_left])
    y = graph.transposed(graph.name(right), [*batch_right, *summed_right, *free_right])
    batch, rows, columns = ([one.shape[axis] for axis in axes] for one, axes in (
        (left, batch_left), (left, free_left), (right, free_right)))  # fmt: skip
    summed = math.prod(left.shape[axis] for axis in summed_left)
    if len(summed_left) != 1 or len(rows) != 1:
        x = graph.reshaped(x, [*batch, math.prod(rows), summed])
    if len(summed_left) != 1 or len(columns) != 1:
        y = graph.reshaped(y, [*batch, summed, math.prod(columns)])
    name = graph.one("MatMul", x, y)
    if len(rows) != 1 or len(columns) != 1:
        name = graph.reshaped(name, [*batch, *rows, *columns])
    graph.bind(operation.outputs[0], name)


def _convolution(graph: Graph, operation: Operation) -> None:
    (x, kernel), params = operation.inputs, operation.params
    numbers = params["dimension_numbers"]
    if params["batch_group_count"] != 1 or any(step != 1 for step in params["lhs_dilation"]):
        raise NotImplementedError("transposed convolution")
    pads = [int(low) for low, _ in params["padding"]] + [int(high) for _, high in params["padding"]]
    name = graph.one(
        "Conv",
        graph.transposed(graph.name(x), numbers.lhs_spec),
        graph.transposed(graph.name(kernel), numbers.rhs_spec),
        strides=[int(step) for step in params["window_strides"]],
        dilations=[int(step) for step in params["rhs_dilation"]],
        pads=pads,
        group=int(params["feature_group_count"]),
    )
    graph.bind(operation.outputs[0], graph.transposed(name, np.argsort(numbers.out_spec).tolist()))


RULES: dict[str, Rule] = {
    **{name: _node(kind) for name, kind in _ELEMENTWISE.items()},
    **{name: partial(_logical, kind) for name, kind in _LOGICAL.items()},
    **{name: partial(_reduce, kind) for name, kind in _REDUCED.items()},
    **{name: partial(_reduce_truth, kind) for name, kind in _OF_TRUTH.items()},
    "argmax": partial(_arg, "ArgMax"),
    "argmin": partial(_arg, "ArgMin"),
    "broadcast_in_dim": _broadcast,
    "clamp": _clamp,
    "concatenate": _concatenate,
    "conv_general_dilated": _convolution,
    "convert_element_type": _cast,
    "cumsum": _cumsum,
    "dim_as_value": _dim_as_value,
    "dot_general": _dot_general,
    "integer_pow": _integer_pow,
    "iota": _iota,
    "layer_norm": _layer_norm,
    "ne": lambda graph, operation: _elementwise(
        graph, operation, lambda *names: graph.one("Not", graph.one("Equal", *names))
    ),
    "pad": _pad,
    "rem": lambda graph, operation: _elementwise(graph, operation, partial(graph.one, "Mod", fmod=1)),
    "reshape": _reshape,
    "rsqrt": lambda graph, operation: _elementwise(
        graph, operation, lambda x: graph.one("Reciprocal", graph.one("Sqrt", x))
    ),
    "select_n": _select,
    "slice": _slice,
    "softmax": _softmax,
    "split": _split,
    "square": lambda graph, operation: _elementwise(graph, operation, lambda x: graph.one("Mul", x, x)),
    "squeeze": _reshape,
    "stack": _stack,
    "tile": _tile,
    "transpose": _transpose,
}
