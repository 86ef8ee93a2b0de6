"""Optimisers and the one way to address parameters: tables of (pattern, value) over their paths."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import optax

from tif_jax.errors import InputError

Table = tuple[tuple[str, Any], ...]


def match(table: Table, params: Mapping[str, Any], default: Any) -> Any:
    """For every parameter the value of the first (pattern, value) whose regular expression is found in its path.

    Paths are joined by '/', as in 'block_0/mlp/up/kernel'. Returns a tree like `params`. A pattern that matches no
    parameter raises InputError.
    """
    used = set()

    def value(path, _leaf):
        for pattern, matched in table:
            if re.search(pattern, path_name(path)):
                used.add(pattern)
                return matched
        return default

    tree = jax.tree_util.tree_map_with_path(value, dict(params))
    if unused := [pattern for pattern, _ in table if pattern not in used]:
        raise InputError(
            f"no parameter path matches {', '.join(map(repr, unused))}, or an earlier pattern takes them all"
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
    no_decay: tuple[str, ...] = (r"bias(es)?$", r"scale$", r"(mean|var)$", r"token", r"position_embedding", r"theta$"),
    clip_norm: float = float("inf"),
) -> optax.GradientTransformation:
    """AdamW with linear warm-up from 0 and cosine decay to final_learning_rate at num_steps.

    no_decay: patterns of parameter paths without weight decay. clip_norm: bound of the global gradient norm.
    """
    if not 0 <= warmup_steps < num_steps:
        raise InputError(f"warmup_steps is {warmup_steps}; allowed: 0 to num_steps - 1 = {num_steps - 1}")
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup_steps, num_steps, final_learning_rate)
    exempt = re.compile("|".join(no_decay) or "$^")

    def mask(params):
        return jax.tree_util.tree_map_with_path(lambda path, _leaf: not exempt.search(path_name(path)), params)

    optimizer = optax.adamw(schedule, weight_decay=weight_decay, mask=mask)
    return optax.chain(optax.clip_by_global_norm(clip_norm), optimizer)
