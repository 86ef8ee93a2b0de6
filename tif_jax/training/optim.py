"""Optimisers and the one way to address parameters: tables of (pattern, value) over their paths."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from tif_jax import checked
from tif_jax.errors import InputError

Table = tuple[tuple[str, Any], ...]

_EXEMPT = re.compile(r"bias(es)?$|scale$|(mean|var)$|token|position_embedding|theta$")  # from weight decay


def match(table: Table, params: Mapping[str, Any], default: Any) -> Any:
    """For every parameter the value of the first (pattern, value) whose regular expression is found in its path.

    Paths are joined by '/', as in 'block_0/mlp/up/kernel'. Returns a tree like `params`. Raises InputError for a pattern
    that matches no parameter, except one that begins with '^reducer/': not every reducer has parameters.
    """
    used = set()
    for pattern, _ in table:
        try:
            re.compile(pattern)
        except (re.error, TypeError, OverflowError, RecursionError):
            raise InputError(f"{checked.shown(pattern)} is no regular expression for parameter paths") from None

    def value(path, _leaf):
        for pattern, matched in table:
            if re.search(pattern, path_name(path)):
                used.add(pattern)
                return matched
        return default

    tree = jax.tree_util.tree_map_with_path(value, dict(params))
    if unused := [pattern for pattern, _ in table if pattern not in used and not pattern.startswith("^reducer/")]:
        raise InputError(
            f"no parameter path matches {', '.join(map(checked.shown, unused))}, or an earlier pattern takes them all"
        )
    return tree


def path_name(path) -> str:
    """'block_0/mlp/up/kernel' for a key path of a nested dict."""
    return "/".join(key.key for key in path)


def partition(params: Mapping[str, Any], mask: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters where mask is true and the others; None stands where a leaf went to the other side."""
    yes = jax.tree.map(lambda m, p: p if m else None, mask, dict(params))
    no = jax.tree.map(lambda m, p: None if m else p, mask, dict(params))
    return yes, no


def merge(yes: Mapping[str, Any], no: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `partition`."""
    return jax.tree.map(lambda a, b: b if a is None else a, dict(yes), dict(no), is_leaf=lambda leaf: leaf is None)


def adamw(
    num_steps: int,
    *,
    learning_rate: float,
    final_learning_rate: float = 0.0,
    warmup_steps: int = 0,
    weight_decay: float = 0.0,
    clip_norm: float = float("inf"),
    adaptive_clip: float = 0.0,
    layer_decay: float = 1.0,
    rate_factors: Table = (),
    decay_factors: Table = (),
) -> optax.GradientTransformation:
    """AdamW with linear warm-up from 0 and cosine decay to final_learning_rate at num_steps.

    clip_norm: bound of the global gradient norm. adaptive_clip: bound of each unit's gradient norm relative to its
    weights' (Brock et al. 2021, AGC); 0: none. A unit of a matrix is a column; of tokens and position embeddings, unlike
    timm's, each number.
    layer_decay: factor of the learning rate from each block to the one before it (Clark et al. 2020; Bao et al. 2022).
    rate_factors: (pattern, (factor, first_step)): the learning rate of such parameters is multiplied by factor, and is 0
    before first_step. decay_factors: (pattern, factor) of the weight decay; without one it is 0 for biases, scales, tokens
    and position embeddings, 1 for the rest. Both are tables as `match` takes them.
    """
    if num_steps >= 2**31:
        raise InputError(f"training takes {num_steps} steps; at most 2147483647 can be counted: fewer epochs will do")
    if not 0 <= warmup_steps < num_steps:
        raise InputError(f"warmup_steps is {warmup_steps}; allowed: 0 to num_steps - 1 = {num_steps - 1}")
    if not 0 < layer_decay <= 1:
        raise InputError(f"layer_decay is {layer_decay}; it is a factor in (0, 1]")
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup_steps, num_steps, final_learning_rate)

    def decay(params, _count):
        default = jax.tree_util.tree_map_with_path(lambda path, _: float(not _EXEMPT.search(path_name(path))), params)
        given = match(decay_factors, params, None)
        return jax.tree.map(lambda own, usual: usual if own is None else own, given, default, is_leaf=_is_none)

    def rate(params, count):
        depth = len({key for key in params if key.startswith("block_")})

        def factor(path, given):
            by_layer = layer_decay ** (depth + 1 - _layer(path, depth))
            return by_layer * given[0] * (count >= given[1])

        table = match(rate_factors, params, (1.0, 0))
        return jax.tree_util.tree_map_with_path(factor, table, is_leaf=lambda leaf: isinstance(leaf, tuple))

    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adaptive_grad_clip(adaptive_clip) if adaptive_clip else optax.identity(),
        optax.scale_by_adam(),
        _per_parameter(decay, lambda update, factor, param: update + weight_decay * factor * param),
        _per_parameter(rate, lambda update, factor, _param: update * factor),
        optax.scale_by_learning_rate(schedule),
    )


def averaged(params: Any, average: Any, decay: float, step: Array) -> Any:
    """The moving average after the update of this step, counted from 0: d average + (1 - d) params.

    d = min(decay, (1 + step) / (10 + step)), as TensorFlow's ExponentialMovingAverage has it with `num_updates`: early on
    about the last tenth of the steps counts, so that a short run's average does not stay with its initial weights.
    """
    share = jnp.maximum(1 - decay, 9 / (10 + step))
    return jax.tree.map(lambda new, old: old + share.astype(old.dtype) * (new - old), params, average)


def _per_parameter(
    factors: Callable[[Any, Array], Any], combine: Callable[[Array, Any, Array], Array]
) -> optax.GradientTransformation:
    """combine(update, factor, parameter) for every parameter, with factors(params, number of steps done) like params."""

    def init(params):
        factors(params, jnp.zeros((), jnp.int32))  # a pattern that matches nothing is told at once
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(updates, state, params):
        updates = jax.tree.map(combine, updates, factors(params, state.count), params)
        return updates, optax.ScaleByScheduleState(count=optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def _layer(path, depth: int) -> int:
    """0 for what makes tokens of patches, i + 1 for block i, depth + 1 for what comes after the blocks or beside them."""
    name = path[0].key
    if name.startswith("block_"):
        return int(name.removeprefix("block_")) + 1
    return 0 if name == "stem" or name.endswith(("embedding", "_token", "_tokens")) else depth + 1


def _is_none(leaf: Any) -> bool:
    return leaf is None
