"""Which cases of a test run always, and which with `-m long` only; and models that are made without compiling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tif_jax.models import blueprint
from tif_jax.state import params_of


def mostly_long(cases, short=(0,)):
    """The cases for parametrize; those whose positions are not in `short` run with -m long."""
    return [
        case if i in short else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.long)
        for i, case in enumerate(cases)
    ]


def lively(fields, seed=0, scale=0.5, **options):
    """A model with weights drawn by numpy, under which attention is far from uniform and every branch has a say."""
    model, rng = nnx.eval_shape(blueprint(fields, **options), jax.random.key(0)), np.random.default_rng(seed)

    def draw(path, leaf):
        kind = path[-1].key
        around = 1.0 if kind in ("scale", "var") else 0.0
        spread = np.prod(leaf.shape[:-1]) ** -0.5 if kind == "kernel" else 0.2 if kind == "var" else scale
        return jnp.asarray(around + spread * rng.normal(size=leaf.shape).clip(-3, 3), jnp.float32)

    nnx.update(model, jax.tree_util.tree_map_with_path(draw, params_of(model)))
    return model
