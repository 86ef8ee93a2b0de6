"""Divided parameters, whole only while they are used: fully sharded data parallelism (Rajbhandari et al. 2020).

Each parameter is gathered where the forward pass uses it and again where the gradient does; in between a device has its share
alone. Gradients are summed into shares. (Of the two gathers XLA makes one on CPUs, where it
undoes every rematerialisation.)
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from tif_jax.models.params import Params

_NAME = "gathered"
# What these make of a parameter would be kept in its place, and of anything else they are as quickly made again.
_VIEWS = ("reshape", "transpose", "slice", "squeeze", "broadcast_in_dim")


def gathered(params: Params, where: Any) -> Params:
    """The parameters, whole. where: a tree of shardings, as they lie."""

    def one(leaf: Array, own: NamedSharding) -> Array:
        return leaf if own.is_fully_replicated else checkpoint_name(_whole(leaf, own), _NAME)

    return jax.tree.map(one, params, where)


def as_others(params: Params, where: Any) -> Any:
    """Shardings for other parameters: those of the same path, where they divide them evenly; else all on every device."""
    known = dict(jax.tree_util.tree_leaves_with_path(where))
    whole = _on_every_device(next(iter(known.values())))

    def one(path: Any, leaf: Array) -> NamedSharding:
        own = known.get(path, whole)
        sizes = (1 if axis is None else own.mesh.shape[axis] for axis in own.spec)
        return own if all(n % size == 0 for n, size in zip(leaf.shape, sizes, strict=False)) else whole

    return jax.tree_util.tree_map_with_path(one, params)


def not_kept(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, of which a gradient keeps everything but what was `gathered` in it."""
    return jax.checkpoint(function, policy=_may_be_kept)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _whole(leaf: Array, own: NamedSharding) -> Array:
    return jax.lax.with_sharding_constraint(leaf, _on_every_device(own))


def _forward(leaf: Array, own: NamedSharding) -> tuple[Array, None]:
    return _whole(leaf, own), None


def _backward(own: NamedSharding, _kept: None, gradient: Array) -> tuple[Array]:
    return (jax.lax.with_sharding_constraint(gradient, own),)


_whole.defvjp(_forward, _backward)


def _on_every_device(own: NamedSharding) -> NamedSharding:
    return NamedSharding(own.mesh, PartitionSpec())


def _may_be_kept(primitive: Any, *avals: Any, **parameters: Any) -> bool:
    if primitive.name == "name":
        return parameters["name"] != _NAME
    # Activations have three axes and more: a matrix that is cast is a parameter.
    is_cast = primitive.name == "convert_element_type" and len(avals[0].shape) == 2
    return primitive.name not in _VIEWS and not is_cast
