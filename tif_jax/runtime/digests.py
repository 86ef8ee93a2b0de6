"""What makes two trees of arrays the same: a digest of their values."""

import hashlib
from typing import Any

import jax
import numpy as np


def digest(tree: Any) -> str:
    """Identity of a tree of arrays: sha256, in hexadecimal, of a line for each leaf with its path, dtype, shape and the
    sha256 of its bytes.

    It depends on these alone: not on the order of keys, on devices or strides. An array divided over several processes has
    to be gathered first.
    """
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        name = jax.tree_util.keystr(path)
        assert array.dtype.kind != "O", f"{name} is not an array"
        of_leaf = hashlib.sha256(array.tobytes()).hexdigest()
        sha.update(f"{name} {array.dtype.name} {array.shape} {of_leaf}\n".encode())
    return sha.hexdigest()
