"""Which cases of a test run always, and which with `-m long` only; models and pictures that no program has to draw.

A test spends its time on tracing and compiling: what is compiled once costs less than what runs op by op.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from tif_jax.models import blueprint
from tif_jax.models.cost import cost
from tif_jax.models.params import params_of
from tif_jax.models.vit import ViT
from tif_jax.tokens import raster_tokens


def mostly_long(cases, short=(0,)):
    """The cases for parametrize; those whose positions are not in `short` run with -m long."""
    return [
        case if i in short else pytest.param(*(case if type(case) is tuple else (case,)), marks=pytest.mark.long)
        for i, case in enumerate(cases)
    ]


# Each treats tokens as another method does that is tested throughout (evit, tome, bat).
ALIKE = ("as_vit", "atc", "dpc_knn", "importance_merge", "mctf", "pitome", "tofu", "zero_tprune")


def one_of_a_kind(names, also=()):
    """The names for parametrize, those of `ALIKE` and `also` with -m long: where a program has to be compiled for each."""
    return [pytest.param(name, marks=pytest.mark.long) if name in (*ALIKE, *also) else name for name in names]


def lively(fields, seed=0, scale=0.5, **options):
    """A model with weights drawn by numpy, under which attention is far from uniform and every branch has a say."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        kind = path[-1].key
        around = 1.0 if kind in ("scale", "var") else 0.0
        spread = np.prod(leaf.shape[:-1]) ** -0.5 if kind == "kernel" else 0.2 if kind == "var" else scale
        return jnp.asarray(around + spread * rng.normal(size=leaf.shape).clip(-3, 3), jnp.float32)

    return _drawn(draw, fields, **options)


def numpy_model(fields, seed=0, **options) -> ViT:
    """`create_model` with weights from numpy, of about the same size: no program to compile. No weight is 0 or 1."""
    rng = np.random.default_rng(seed)

    def draw(path, shape):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        values = rng.standard_normal(shape.shape).clip(-2, 2)
        if name.endswith("scale"):
            values = 1 + values / 10
        else:
            wide = name.endswith("kernel") and name.startswith(("patch_embedding", "reducer"))
            values *= shape.shape[0] ** -0.5 if wide else 0.02
        return jnp.asarray(values, shape.dtype)

    return _drawn(draw, fields, **options)


def _drawn(draw, fields, **options):
    """A model whose weights are what draw(path, abstract array) gives."""
    model = nnx.eval_shape(blueprint(fields, **options), jax.random.key(0))
    nnx.update(model, jax.tree_util.tree_map_with_path(draw, params_of(model)))
    return model


def cost_of(name, **options):
    """What a model costs, counted without drawing its weights."""
    return cost(nnx.eval_shape(blueprint(name, **options), jax.random.key(0)))


def whole_cost_of(name, **options):
    """`cost_of` as papers count: a ViT's last block computes every token, also those that no head reads."""
    return cost_of(name, lean_last_block=False, **options)


def numpy_images(num, size=(32, 32), seed=0):
    """Random numbers in the shape of images."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal((num, *size, 3)), jnp.float32)


def row_of(x, num_special=0):
    """`Tokens` for rows of which no more is known than how many are special: the patches of one row of a raster."""
    return raster_tokens(x.shape[0], num_special, (1, x.shape[1] - num_special), has_class=num_special > 0)


class Seen:
    """A block that notes what enters it."""

    def __init__(self, block, seen):
        self.block, self.seen = block, seen

    def __call__(self, x, tokens, *args, **kwargs):
        self.seen.append((x, tokens))
        return self.block(x, tokens, *args, **kwargs)


def write_safetensors(path, tensors):
    """The path, at which the tensors are now."""
    safetensors.numpy.save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, path)
    return path


# A model and its steps as one program each, for walks written by hand; models and blocks of equal shape share one.
call = jax.jit(lambda model, images: model(images))
embed = jax.jit(lambda model, images: model.embed(images))
attend = jax.jit(lambda block, x, key_log_weight=None: block.attend(x, row_of(x), key_log_weight))
feed_forward = jax.jit(lambda block, x: block.feed_forward(x))
predict = jax.jit(lambda model, x: model.predict(x, {})[0])
