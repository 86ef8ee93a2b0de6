"""Several operations of a program that ONNX has one for: softmax, layer normalisation, GELU.

Where a pattern is not found, as it may be after a change of Flax, the operations stay, and only speed is lost.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tif_jax.export.program import Operation, Program, Value, needed

_RESHAPED = ("reshape", "broadcast_in_dim")


def fused(program: Program) -> Program:
    """The same program with fewer, larger operations."""
    made_by = {output: operation for operation in program.operations for output in operation.outputs}
    matcher = _Matcher(made_by)
    operations = [matcher.best(operation) for operation in program.operations]
    return program._replace(operations=needed(operations, program.outputs))


class _Matcher:
    """Looks from an operation back at what made its inputs."""

    def __init__(self, made_by: dict[Value, Operation]):
        self.made_by = made_by

    def best(self, operation: Operation) -> Operation:
        """The operation that stands for this one and others before it; itself where there is none."""
        patterns = {"div": self._softmax, "add": self._layer_norm, "mul": self._gelu}
        pattern = patterns.get(operation.name)
        found = pattern(operation) if pattern else None
        if found is None:
            return operation
        name, inputs, params = found
        return Operation(name, inputs, operation.outputs, params)

    def inputs(self, value: Value, name: str, through: Sequence[str] = ()) -> list[Value]:
        """The inputs of the operation of that name that made the value, perhaps seen through others; else none."""
        operation = self.made_by.get(value)
        while operation is not None and operation.name in through:
            operation = self.made_by.get(operation.inputs[0])
        return operation.inputs if operation is not None and operation.name == name else []

    def pairs(self, operation: Operation) -> Iterable[tuple[Value, Value]]:
        """The two inputs, in both orders."""
        one, other = operation.inputs
        return (one, other), (other, one)

    def _softmax(self, operation: Operation) -> Any:
        """exp(x - max(x)) / sum(exp(x - max(x))) over one axis."""
        exponential, total = operation.inputs
        shifted = self.inputs(exponential, "exp")
        difference = self.inputs(shifted[0], "sub") if shifted else []
        axes = self._reduced(total, exponential, "reduce_sum")
        if not difference or axes is None or len(axes) != 1:
            return None
        x, largest = difference
        for one in self.inputs(largest, "max", _RESHAPED):  # with -inf
            if self._reduced(one, x, "reduce_max") == axes:
                return "softmax", [x], {"axis": axes[0]}
        return None

    def _layer_norm(self, operation: Operation) -> Any:
        """(x - mean) (rsqrt(variance + eps) scale) + bias over the last axis, as Flax has it."""
        for product, bias in self.pairs(operation):
            factors = self.inputs(product, "mul")
            if bias.constant is None or len(factors) != 2:
                continue
            centred, scaled = factors
            difference, parts = self.inputs(centred, "sub"), self.inputs(scaled, "mul")
            if not difference or len(parts) != 2 or parts[1].constant is None:
                continue
            x, scale = difference[0], parts[1]
            root = self.inputs(parts[0], "rsqrt")
            total = self.inputs(root[0], "add") if root else []
            if not total or total[1].constant is None or total[1].shape or not self._is_mean(difference[1], x):
                continue
            square = self._averaged(total[0], len(x.shape) - 1)
            around = self.inputs(square, "square") if square else []
            again = self.inputs(around[0], "sub") if around else []
            width = x.shape[-1]
            if not again or again[0] is not x or not self._is_mean(again[1], x):
                continue
            if all(np.size(one.array) == width for one in (scale, bias)):
                flat = [Value((width,), one.dtype, one.array.reshape(width)) for one in (scale, bias)]
                return "layer_norm", [x, *flat], {"epsilon": float(total[1].array)}
        return None

    def _gelu(self, operation: Operation) -> Any:
        """0.5 x (1 + erf(x / sqrt(2)))."""
        for half, rest in self.pairs(operation):
            halves, sums = self.inputs(half, "mul"), self.inputs(rest, "add")
            errors = [part for one in sums for part in self.inputs(one, "erf")]
            scaled = self.inputs(errors[0], "mul") if errors else []
            constants = [one.array for one in (*halves, *sums, *scaled) if one.constant is not None]
            if [np.shape(one) for one in constants] != [(), (), ()] or not np.allclose(constants, [0.5, 1, 0.5**0.5]):
                continue
            xs = [one for one in (*halves, *scaled) if one.constant is None]
            if len(xs) == 2 and xs[0] is xs[1]:
                return "gelu", [xs[0]], {}
        return None

    def _is_mean(self, value: Value, x: Value) -> bool:
        """Whether the value is x's mean over its last axis, kept as one of size 1."""
        return value.shape == (*x.shape[:-1], 1) and self._averaged(value, len(x.shape) - 1) is x

    def _averaged(self, value: Value, axis: int) -> Value | None:
        """What the value is the mean of over that axis."""
        quotient = self.inputs(value, "div", _RESHAPED)
        if not quotient or quotient[1].constant is None:
            return None
        operation = self.made_by.get(quotient[0])
        if operation is None or operation.name != "reduce_sum" or tuple(operation.params["axes"]) != (axis,):
            return None
        x = operation.inputs[0]
        return x if quotient[1].shape == () and float(quotient[1].array) == x.shape[axis] else None

    def _reduced(self, value: Value, x: Value, name: str) -> tuple[int, ...] | None:
        """The axes over which the value is x reduced, the axes kept or not."""
        operation = self.made_by.get(value)
        while operation is not None and operation.name in _RESHAPED:
            operation = self.made_by.get(operation.inputs[0])
        if operation is None or operation.name != name or operation.inputs[0] is not x:
            return None
        return tuple(operation.params["axes"])
