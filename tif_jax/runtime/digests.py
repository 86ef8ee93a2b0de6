"""What makes two trees of arrays the same: digests of their values."""

import hashlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def digest(tree: Any) -> str:
    """Identity of a tree of arrays: sha256, in hexadecimal, of a line for each leaf with its path, dtype, shape and the
    sha256 of its bytes.

    It depends on these alone: not on the order of keys, on devices or strides. An array divided over several processes has
    to be gathered first.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return _of_lines(leaves, [hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest() for _, leaf in leaves])


def checksum(tree: Any) -> str:
    """`digest` of arrays however they are divided over devices and processes; nothing is gathered.

    It notices damage, not forgery: in the place of each leaf's sha256 stands the sum modulo 2^64 of its numbers' bits, each
    times an odd number of its place. Shards are summed where they are. Of several processes all have to ask.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sums = [np.sum([_sum(*shard) for shard in _shards(leaf)], dtype=np.uint64) for _, leaf in leaves]
    if divided := [i for i, (_, leaf) in enumerate(leaves) if is_divided(leaf)]:
        ours = np.array([sums[i] for i in divided]).view(np.uint32)  # JAX would cut numbers of 64 bits
        of_all = np.ascontiguousarray(multihost_utils.process_allgather(ours)).view(np.uint64)
        for i, total in zip(divided, of_all.sum(axis=0, dtype=np.uint64), strict=True):
            sums[i] = total
    return _of_lines(leaves, [f"{total:016x}" for total in sums])


def is_divided(leaf: Any) -> bool:
    """Whether no process has the whole array."""
    return isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated)


def _of_lines(leaves: list[tuple[Any, Any]], contents: list[str]) -> str:
    sha = hashlib.sha256()
    for (path, leaf), content in zip(leaves, contents, strict=True):
        name, dtype = jax.tree_util.keystr(path), np.dtype(leaf.dtype)
        assert dtype.kind != "O", f"{name} is not an array"
        sha.update(f"{name} {dtype.name} {np.shape(leaf)} {content}\n".encode())
    return sha.hexdigest()


def _shards(leaf: Any) -> Iterator[tuple[np.ndarray, tuple[int, ...]]]:
    """The parts of an array that this process has, each once: values, and where they begin."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_replicated:
        yield np.asarray(jax.device_get(leaf)), (0,) * np.ndim(leaf)
        return
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            yield np.asarray(shard.data), tuple(part.start or 0 for part in shard.index)


def _sum(values: np.ndarray, begin: tuple[int, ...]) -> np.uint64:
    """Sum of bits times the factors of their place on every axis. Factors are odd, so that no single change gives 0."""
    total = np.asarray(values, order="C").view(f"u{values.dtype.itemsize}")
    for axis in reversed(range(total.ndim)):
        place = np.arange(begin[axis], begin[axis] + total.shape[-1], dtype=np.uint64)
        total = np.einsum("...j,j->...", total, _odd(axis, place), dtype=np.uint64, casting="unsafe")
    return np.uint64(total)


def _odd(axis: int, place: np.ndarray) -> np.ndarray:
    """Odd numbers that look random: splitmix64 of the place."""
    x = (place + np.uint64((axis + 1) << 40)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) | np.uint64(1)
