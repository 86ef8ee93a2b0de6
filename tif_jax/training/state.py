"""State is data: parameters as nested dicts of arrays, and where they lie on the devices."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from tif_jax.models.params import Params
from tif_jax.training import optim

FSDP: optim.Table = ((r"kernel$|embedding$", -1),)  # which axis of which parameters is divided over 'fsdp'


class State(NamedTuple):
    """Everything a training step changes."""

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    ema: Params | None = None  # exponential moving average of params, where the recipe keeps one


def init_state(params: Params, optimizer: optax.GradientTransformation, trainable: Any, ema: bool = False) -> State:
    """The state of step 0, with copies of the parameters: a training step takes the state's arrays for its own.

    trainable: tree of bools like params; only those parameters get optimiser state. ema: whether an average is kept.
    """
    copy = partial(jax.tree.map, jnp.copy)
    opt_state = optimizer.init(optim.partition(params, trainable)[0])
    return State(jnp.zeros((), jnp.int32), copy(params), opt_state, copy(params) if ema else None)


def shardings(state: State, mesh: Mesh, table: optim.Table = FSDP) -> Any:
    """Where the arrays of a State (or their shapes) lie: parameters as the table says, and alike what the optimiser and
    the moving average hold for each; everything else on every device.

    table: (pattern, axis), see `optim.match`: the axis of such parameters that is divided over the mesh's 'fsdp'. Where it
    can not be divided evenly, and where no pattern matches, each device has the whole.
    """
    size = mesh.shape["fsdp"]

    def divided(leaf, axis):
        even = axis is not None and -leaf.ndim <= axis < leaf.ndim and leaf.shape[axis] % size == 0
        spec = PartitionSpec(*("fsdp" if i == axis % leaf.ndim else None for i in range(leaf.ndim)) if even else ())
        return NamedSharding(mesh, spec if size > 1 else PartitionSpec())

    axes = optim.match(table if size > 1 else (), state.params, None)
    # None is a leaf here, not the absence of one.
    params = jax.tree.map(lambda axis, leaf: divided(leaf, axis), axes, state.params, is_leaf=lambda x: x is None)
    of_parameter = {_names(path): sharding for path, sharding in jax.tree_util.tree_leaves_with_path(params)}

    def alike(path, _leaf):
        return of_parameter.get(_names(path), NamedSharding(mesh, PartitionSpec()))

    return jax.tree_util.tree_map_with_path(alike, state)


def _names(path) -> tuple[str, ...]:
    """The dictionary keys of a path: of a parameter, and of what an optimiser holds for it."""
    return tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
