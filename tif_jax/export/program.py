"""A model as a flat list of primitive operations: the calls inlined, what is constant computed, what nobody needs gone.

Shapes are tuples of numbers and, where they depend on the batch size, of JAX's symbolic dimensions.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jaxtyping
import numpy as np
from jax import export

BATCH = "b"  # the name of the batch size in shapes

# Operations that hand on their only operand.
_HAND_ON = ("stop_gradient", "copy", "copy_p", "optimization_barrier", "sharding_constraint", "reduce_precision")


@dataclass(eq=False)
class Value:
    """What an operation takes or makes; `constant` where it does not depend on the images."""

    shape: tuple[Any, ...]
    dtype: Any
    constant: Any = None
    is_constant: bool = False  # also where it is not computed yet

    def __post_init__(self):
        self.is_constant |= self.constant is not None

    @property
    def array(self) -> np.ndarray:
        """The constant as numpy has it."""
        return np.asarray(self.constant)


class Operation(NamedTuple):
    name: str  # of JAX's primitive, or of what `fuse` made of several
    inputs: list[Value]
    outputs: list[Value]
    params: Mapping[str, Any]
    primitive: Any = None


class Program(NamedTuple):
    images: Value
    operations: list[Operation]
    outputs: list[Value]
    batch: Any  # the symbolic dimension


def traced(function: Callable[..., Sequence[Any]], image_shape: tuple[int, ...]) -> Program:
    """The program of a function from float32 images (batch, *image_shape) to arrays, for any batch size."""
    specified = images_of_any_number(image_shape)
    with unchecked_shapes():
        closed = jax.make_jaxpr(function)(specified)
    images = Value(specified.shape, specified.dtype)
    operations: list[Operation] = []
    outputs = _inline(closed.jaxpr, closed.consts, [images], operations)
    operations = needed(operations, outputs)
    fixed = [operation for operation in operations if operation.outputs[0].is_constant]
    varying = [operation for operation in operations if not operation.outputs[0].is_constant]
    _compute(fixed, {one for operation in varying for one in operation.inputs} | {*outputs})
    return Program(images, varying, outputs, specified.shape[0])


def _compute(operations: Sequence[Operation], wanted: set[Value]) -> None:
    """Computes what does not depend on the images, as one program."""
    made = {output for operation in operations for output in operation.outputs}
    given = list(dict.fromkeys(one for operation in operations for one in operation.inputs if one not in made))
    asked = [value for value in made if value in wanted]

    def compute(constants):
        known = dict(zip(given, constants, strict=True))
        for operation in operations:
            primitive = operation.primitive
            found = primitive.bind(*(known[one] for one in operation.inputs), **operation.params)
            known.update(zip(operation.outputs, found if primitive.multiple_results else [found], strict=True))
        return [known[value] for value in asked]

    for value, constant in zip(asked, jax.jit(compute)([one.constant for one in given]), strict=True):
        value.constant = constant


def images_of_any_number(image_shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """float32 images, their number a symbolic dimension."""
    (batch,) = export.symbolic_shape(BATCH)
    return jax.ShapeDtypeStruct((batch, *image_shape), np.float32)


@contextmanager
def unchecked_shapes() -> Iterator[None]:
    """Where JAX traces with symbolic dimensions: to jaxtyping, if it checks annotations as in our tests, they are no ints."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


def needed(operations: Sequence[Operation], outputs: Sequence[Value]) -> list[Operation]:
    """The operations that the outputs depend on."""
    wanted, kept = set(outputs), []
    for operation in reversed(operations):
        if not wanted.isdisjoint(operation.outputs):
            wanted.update(operation.inputs)
            kept.append(operation)
    return kept[::-1]


def _inline(jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Value], operations: list[Operation]) -> list[Value]:
    """Appends what the jaxpr does to `operations`; returns its outputs."""
    known: dict[Any, Value] = dict(zip(jaxpr.invars, inputs, strict=True))
    known |= {var: Value(const.shape, const.dtype, const) for var, const in zip(jaxpr.constvars, consts, strict=True)}

    def value(var: Any) -> Value:
        return Value(var.aval.shape, var.aval.dtype, var.val) if hasattr(var, "val") else known[var]

    for equation in jaxpr.eqns:
        made = _one(equation, [value(var) for var in equation.invars], operations)
        known.update(zip(equation.outvars, made, strict=True))
    return [value(var) for var in jaxpr.outvars]


def _one(equation: Any, inputs: list[Value], operations: list[Operation]) -> list[Value]:
    """The outputs of one equation, which is inlined or appended to `operations`."""
    name, params = equation.primitive.name, equation.params
    if name in _HAND_ON:
        return inputs
    if name == "platform_index":  # no platform that a branch was written for: what is meant for all others
        (aval,) = (var.aval for var in equation.outvars)
        return [Value((), aval.dtype, np.int32(params["platforms"].index(None)))]
    if name == "cond" and inputs[0].constant is not None:
        branch = params["branches"][int(inputs[0].array)]
        return _inline(branch.jaxpr, branch.consts, inputs[1:], operations)
    if name != "cond" and (inner := next(_bodies(params), None)) is not None and name not in ("scan", "while"):
        return _inline(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), inputs, operations)
    if name == "concatenate":  # what is empty need not be made
        inputs = [one for one in inputs if one.shape[params["dimension"]] != 0] or inputs[:1]
        if len(inputs) == 1:
            return inputs
    outputs = [Value(var.aval.shape, var.aval.dtype) for var in equation.outvars]
    fixed = not any(export.is_symbolic_dim(size) for output in outputs for size in output.shape)
    if fixed and name != "dim_as_value" and all(one.is_constant for one in inputs):
        for output in outputs:
            output.is_constant = True
    operations.append(Operation(name, inputs, outputs, params, equation.primitive))
    return outputs


def _bodies(params: Mapping[str, Any]) -> Iterator[Any]:
    """What a call calls: the jaxpr among the parameters of jit, custom_jvp_call, checkpoint and the like."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if hasattr(getattr(params.get(key), "jaxpr", params.get(key)), "eqns"):
            yield params[key]
