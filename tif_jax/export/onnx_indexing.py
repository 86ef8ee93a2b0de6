"""Gathering, scattering and sorting in ONNX (`onnx_ops` has all else).

Indices are taken to be in range, as those of this project are; onnxruntime stops at one that is not.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from tif_jax.export.onnx_graph import Graph, type_of
from tif_jax.export.onnx_ops import Rule, sliced
from tif_jax.export.program import Operation, Value

_REDUCTIONS = {"scatter": "none", "scatter-add": "add", "scatter-max": "max"}


def _gather(graph: Graph, operation: Operation) -> None:
    (x, index), (output,) = operation.inputs, operation.outputs
    numbers, sizes = operation.params["dimension_numbers"], operation.params["slice_sizes"]
    indexed, batching = _axes(numbers.start_index_map), _axes(numbers.operand_batching_dims)
    if index.constant is not None and len(index.shape) == 1:
        starts = dict(zip(indexed, index.array.tolist(), strict=True))
        first = [starts.get(axis, 0) for axis in range(len(x.shape))]
        last = [size if axis not in starts else starts[axis] + size for axis, size in enumerate(sizes)]
        return graph.bind(output, graph.reshaped(sliced(graph, x, first, last), output.shape))
    if not {*indexed} <= {*_axes(numbers.collapsed_slice_dims)}:
        raise NotImplementedError("gather of slices at places that depend on the image")
    rest = [axis for axis in range(len(x.shape)) if axis not in (*batching, *indexed)]
    rows = [axis for axis in range(len(output.shape)) if axis not in _axes(numbers.offset_dims)]
    if not batching and len(indexed) == 1:
        (axis,) = indexed
        places = graph.reshaped(graph.name(index), index.shape[:-1])
        name = graph.one("Gather", graph.name(x), places, axis=axis)
        window = _axes(numbers.offset_dims)
        made = [*window[:axis], *rows, *window[axis:]]  # which axis of the output each axis of `name` is
    else:
        order = _batch_first(index, _axes(numbers.start_indices_batching_dims))
        places = graph.transposed(graph.name(index), [*order, len(order)])
        name = graph.transposed(graph.name(x), [*batching, *indexed, *rest])
        name = graph.one("GatherND", name, places, batch_dims=len(batching))
        made = [*(rows[i] for i in order), *_axes(numbers.offset_dims)]
    graph.bind(output, graph.transposed(name, np.argsort(made).tolist()))


def _scatter(reduction: str, graph: Graph, operation: Operation) -> None:
    (x, index, update), (output,) = operation.inputs, operation.outputs
    numbers = operation.params["dimension_numbers"]
    indexed, batching = _axes(numbers.scatter_dims_to_operand_dims), _axes(numbers.operand_batching_dims)
    window = _axes(numbers.update_window_dims)
    if not {*indexed} <= {*_axes(numbers.inserted_window_dims)}:
        raise NotImplementedError("scatter of slices")
    rest = [axis for axis in range(len(x.shape)) if axis not in (*batching, *indexed)]
    order = _batch_first(index, _axes(numbers.scatter_indices_batching_dims))
    places = graph.transposed(graph.name(index), [*order, len(order)])
    shape = [index.shape[axis] for axis in order]
    numbered = [_numbers(graph, shape, axis) for axis in range(len(batching))]
    if numbered:
        places = graph.one("Concat", *numbered, places, axis=-1)
    rows = [axis for axis in range(len(update.shape)) if axis not in window]
    updates = graph.transposed(graph.name(update), [*(rows[i] for i in order), *window])
    turned = [*batching, *indexed, *rest]
    name = graph.one("ScatterND", graph.transposed(graph.name(x), turned), places, updates, reduction=reduction)
    graph.bind(output, graph.transposed(name, np.argsort(turned).tolist()))


def _axes(axes: Sequence[Any]) -> list[int]:
    return [int(axis) for axis in axes]


def _batch_first(index: Value, batching: Sequence[int]) -> list[int]:
    """The axes of an array of index vectors but the last, those that go with axes of the operand first."""
    return [*batching, *(axis for axis in range(len(index.shape) - 1) if axis not in batching)]


def _numbers(graph: Graph, shape: Sequence[Any], axis: int) -> str:
    """Index vectors of one number, which counts along that axis: (*shape, 1)."""
    count = graph.reshaped(graph.size(shape[axis]), ())
    along = graph.one("Range", graph.constant(np.int64(0)), count, graph.constant(np.int64(1)))
    thin = graph.reshaped(along, [size if i == axis else 1 for i, size in enumerate((*shape, 1))])
    return graph.one("Expand", thin, graph.shape((*shape, 1)))


def _sort(graph: Graph, operation: Operation) -> None:
    """Stable, as ONNX's TopK is: of equal values the first comes first."""
    if operation.params["num_keys"] != 1:
        raise NotImplementedError("sort by several keys")
    axis, keys = int(operation.params["dimension"]), operation.inputs[0]
    name = graph.name(keys)
    is_truth = keys.dtype == np.bool_
    if is_truth:
        name = graph.one("Cast", name, to=type_of(np.int64))
    count = graph.constant(np.asarray([keys.shape[axis]], np.int64))
    ordered, places = graph.node("TopK", [name, count], 2, axis=axis, largest=0, sorted=1)
    if is_truth:
        ordered = graph.one("Cast", ordered, to=type_of(np.bool_))
    graph.bind(operation.outputs[0], ordered)
    for other, output in zip(operation.inputs[1:], operation.outputs[1:], strict=True):
        graph.bind(output, graph.one("GatherElements", graph.name(other), places, axis=axis))


def _top_k(graph: Graph, operation: Operation) -> None:
    k = graph.constant(np.asarray([operation.params["k"]], np.int64))
    axis = int(operation.params.get("axis", len(operation.inputs[0].shape) - 1))
    names = graph.node("TopK", [graph.name(operation.inputs[0]), k], 2, axis=axis, largest=1, sorted=1)
    for output, name in zip(operation.outputs, names, strict=True):
        graph.bind(output, name)


RULES: dict[str, Rule] = {
    "gather": _gather,
    "sort": _sort,
    "top_k": _top_k,
    **{name: partial(_scatter, reduction) for name, reduction in _REDUCTIONS.items()},
}
