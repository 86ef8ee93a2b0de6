"""What a model costs, counted from its traced program."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from tif_jax import checked
from tif_jax.models.around import Around
from tif_jax.models.model import height_and_width


class Cost(NamedTuple):
    gmac: float  # 1e9 multiply-adds of matrix products and convolutions, per image
    parameters: int  # all of them, the reducer's included; running statistics are none
    tokens: tuple[int, ...]  # tokens that leave each block, special tokens included

    def padding(self, multiple: int) -> float:
        """Rows that are computed for nothing, as a share of the tokens, where arrays have rows in multiples of so many.

        XLA lays out the last two axes in tiles: on TPUs of 8 rows in float32, of 16 in bfloat16. All blocks count alike, also
        a last one that computes special tokens alone. Raises InputError unless multiple is 1 or more.
        """
        checked.value_of(int, multiple, "multiple", checked.Range(least=1))
        return sum(-number % multiple for number in self.tokens) / sum(self.tokens)


def cost(model: Any, image_size: int | tuple[int, int] | None = None) -> Cost:
    """Cost of one prediction for one image, without work that the prediction does not depend on or that repeats other work.

    model: one of `tif_jax.models`, also an abstract one (`nnx.eval_shape`).
    image_size: a check, not a choice: a model takes the size that it was built for (InputError otherwise).
    """
    total, images = gmac(model, image_size), _image(model, image_size)
    graphdef, params = nnx.split(model)
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    lengths: list[int] = []
    jax.eval_shape(lambda params, images: _walk(nnx.merge(graphdef, params), images, lengths), params, images)
    return Cost(total, parameters, tuple(lengths))


def gmac(model: Any, image_size: int | tuple[int, int] | None = None, *, training: bool = False) -> float:
    """`cost(...).gmac` alone, in half the time. training: of the forward pass in training, in which `dynamic_vit` masks
    tokens and drops none."""
    graphdef, params = nnx.split(model)

    def predict(params: Any, images: Any) -> Any:
        return nnx.merge(graphdef, params)(images, nnx.Rngs(0) if training else None)[0]

    return multiply_adds(predict, params, _image(model, image_size)) / 1e9


def _image(model: Any, image_size: int | tuple[int, int] | None) -> jax.ShapeDtypeStruct:
    height, columns = height_and_width(model.image_size if image_size is None else image_size)
    return jax.ShapeDtypeStruct((1, height, columns, 3), jnp.float32)


def multiply_adds(function: Callable[..., Any], *arguments: Any) -> int:
    """Multiply-adds of what the function returns, counted as `cost` does. Arguments may be shapes alone."""
    return _multiply_adds(jax.make_jaxpr(function)(*arguments).jaxpr)


@dataclass(frozen=True)
class _Recorder(Around):
    """A block that notes how many tokens leave it."""

    lengths: list[int]

    def feed_forward(self, x, *args, **kwargs):
        self.lengths.append(x.shape[1])
        return self.block.feed_forward(x, *args, **kwargs)


def _walk(model: Any, images: Array, lengths: list[int]) -> Array:
    """The reducer's walk over the blocks, which notes in `lengths` how many tokens leave each."""
    return model.encode(model.embed(images), blocks=[_Recorder(block, lengths) for block in model.blocks])[0]


def _multiply_adds(jaxpr) -> int:
    """Multiply-adds of the equations that the outputs depend on; equal terms count once, as XLA computes them."""
    equations, first = _distinct(jaxpr)
    needed = {first.get(var, var) for var in jaxpr.outvars if not hasattr(var, "val")}
    total = 0
    for equation in reversed(equations):
        if not needed.intersection(equation.outvars):
            continue
        needed.update(first.get(var, var) for var in equation.invars if not hasattr(var, "val"))
        count = _COUNTERS.get(equation.primitive.name)
        if count is not None:
            total += count(equation)
        inside = [
            _multiply_adds(inner)
            for value in equation.params.values()
            for each in (value if isinstance(value, tuple | list) else (value,))
            if hasattr(inner := getattr(each, "jaxpr", each), "eqns")
        ]
        repeats = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        # Of the branches one runs; the costlier counts. (ToSA has one for CPUs without matrix products.)
        total += max(inside, default=0) if equation.primitive.name == "cond" else repeats * sum(inside)
    return total


def _distinct(jaxpr) -> tuple[list[Any], dict[Any, Any]]:
    """The equations without repetitions, and for each variable of a repetition the variable that has its value.

    A slice out of joined arrays needs none but that which it lies in, as XLA has it.
    """
    equations: list[Any] = []
    first: dict[Any, Any] = {}
    seen: dict[Any, Any] = {}
    joined: dict[Any, Any] = {}  # the equation that joins arrays to a variable
    for equation in jaxpr.eqns:
        if equation.primitive.name == "slice":
            equation = _out_of_one(equation, first, joined)
            if equation.invars[0].aval.shape == equation.outvars[0].aval.shape:
                first[equation.outvars[0]] = equation.invars[0]
                continue
        elif equation.primitive.name == "concatenate":
            joined[equation.outvars[0]] = equation
        inputs = tuple(repr(v.val) if hasattr(v, "val") else first.get(v, v) for v in equation.invars)
        term = (equation.primitive, inputs, tuple(equation.params.items()))
        try:
            earlier = seen.setdefault(term, equation)
        except TypeError:  # a parameter that has no hash: taken to be unlike any other
            earlier = equation
        if earlier is equation:
            equations.append(equation)
        else:
            first.update(zip(equation.outvars, earlier.outvars, strict=True))
    return equations, first


def _out_of_one(equation, first: dict[Any, Any], joined: dict[Any, Any]):
    """The slice as one of the array that it lies in, where its operand is joined of several."""
    source = first.get(equation.invars[0], equation.invars[0])
    if source not in joined or equation.params["strides"] is not None:
        return equation.replace(invars=[source])
    axis = joined[source].params["dimension"]
    start, limit = (list(equation.params[name]) for name in ("start_indices", "limit_indices"))
    for part in joined[source].invars:
        size = part.aval.shape[axis]
        if 0 <= start[axis] and limit[axis] <= size and not hasattr(part, "val"):
            params = equation.params | {"start_indices": tuple(start), "limit_indices": tuple(limit)}
            return _out_of_one(equation.replace(invars=[part], params=params), first, joined)
        start[axis], limit[axis] = start[axis] - size, limit[axis] - size
    return equation.replace(invars=[source])


def _dot_general(equation) -> int:
    left, right = (var.aval.shape for var in equation.invars)
    (_, contracting), (_, batch) = equation.params["dimension_numbers"]
    return math.prod(left) * math.prod(n for axis, n in enumerate(right) if axis not in (*contracting, *batch))


def _convolution(equation) -> int:
    kernel = equation.invars[1].aval.shape
    out_feature_axis = equation.params["dimension_numbers"].rhs_spec[0]
    return math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // kernel[out_feature_axis]


_COUNTERS: dict[str, Callable[[Any], int]] = {"dot_general": _dot_general, "conv_general_dilated": _convolution}
