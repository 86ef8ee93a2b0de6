"""The plain forward pass as one compiled program, to be called, timed, and asked what memory it takes.

Legend: B images, Y X height and width.
"""

from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from tif_jax.models.model import Model
from tif_jax.models.params import Params, params_of, with_params
from tif_jax.runtime.mesh import replicate, shard


def compile_forward(
    model: Model, images: Float[np.ndarray | Array, "B Y X 3"], mesh: Mesh, params: Params | None = None
) -> tuple[Any, tuple[Any, Array]]:
    """The program, and its arguments on the mesh's devices: parameters and images. It gives logits.

    params: the model's, where they are on the devices already; images that are there stay where they are.
    """
    params = replicate(params_of(model), mesh) if params is None else params
    placed = shard({"image": images}, mesh)["image"]
    graphdef = nnx.split(model)[0]
    predict = jax.jit(lambda params, images: with_params(graphdef, params)(images)[0])
    return predict.lower(params, placed).compile(), (params, placed)


def random_images(model: Model, batch_size: int) -> Float[np.ndarray, "B Y X 3"]:
    """A batch to time a model with."""
    return np.random.default_rng(0).normal(size=(batch_size, *model.image_size, 3)).astype(np.float32)


def peak_memory(program: Any, mesh: Mesh) -> int:
    """Bytes on all devices while the program runs, as its compiler planned them."""
    return program.memory_analysis().peak_memory_in_bytes * mesh.size
