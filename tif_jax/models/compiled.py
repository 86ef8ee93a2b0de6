"""The plain forward pass as one compiled program, to be called, timed, and asked what memory it takes.

Legend: B images, Y X height and width.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Num

from tif_jax.layers import true_float32
from tif_jax.models.model import Model
from tif_jax.models.params import Params, params_of, with_params
from tif_jax.runtime.mesh import make_mesh, replicate, shard

Read = Callable[[Array, dict[str, Any]], Any]  # what is wanted of logits and aux


def logits_alone(logits: Array, _aux: dict[str, Any]) -> Array:
    return logits


def compile_forward(
    model: Model,
    images: Float[np.ndarray | Array, "B Y X 3"],
    mesh: Mesh,
    params: Params | None = None,
    read: Read = logits_alone,
) -> tuple[Any, tuple[Any, Array]]:
    """The program, and its arguments on the mesh's devices: parameters and images. It gives what is read: logits.

    params: the model's, where they are on the devices already; images that are there stay where they are.
    """
    params = replicate(params_of(model), mesh) if params is None else params
    placed = shard({"image": images}, mesh)["image"]
    graphdef = nnx.split(model)[0]
    predict = jax.jit(lambda params, images: read(*with_params(graphdef, params)(images)))
    return predict.lower(params, placed).compile(), (params, placed)


class Forwards:
    """A model's forward pass for batches of a few sizes, each compiled when it is first called, on this process's devices.

    A float32 model is computed in `true_float32`. like: another's; what both models have equal lies on the devices once.
    """

    def __init__(self, model: Model, read: Read = logits_alone, like: "Forwards | None" = None):
        self._model, self._read = model, read
        self._params: Params = params_of(model) if like is None else _shared(params_of(model), like._params)
        # By the leaf's id, which is its own as long as the leaf is kept.
        self._placed: dict[tuple[int, Mesh], tuple[Array, Array]] = {} if like is None else like._placed
        self._programs: dict[int, tuple[Any, Params, Mesh]] = {}

    def __call__(self, images: Float[np.ndarray, "B Y X 3"]) -> Any:
        """What is read of this batch, on the host."""
        if len(images) not in self._programs:
            mesh = make_mesh(len(images), this_process_only=True)
            params = jax.tree.map(lambda leaf: self._on(mesh, leaf), self._params)
            with true_float32(self._model.dtype):
                program, _ = compile_forward(self._model, images, mesh, params, self._read)
            self._programs[len(images)] = program, params, mesh
        program, params, mesh = self._programs[len(images)]
        return jax.device_get(program(params, shard({"image": images}, mesh)["image"]))

    def _on(self, mesh: Mesh, leaf: Array) -> Array:
        if (key := (id(leaf), mesh)) not in self._placed:
            self._placed[key] = leaf, replicate(leaf, mesh)
        return self._placed[key][1]


def _shared(params: Params, others: Params) -> Params:
    """The parameters, of which those that equal the others' of the same path are the others'."""
    known = dict(jax.tree_util.tree_leaves_with_path(others))

    def one(path: Any, leaf: Array) -> Array:
        other = known.get(path)
        is_same = other is leaf or (other is not None and leaf.shape == other.shape and bool((leaf == other).all()))
        return leaf if other is None or not is_same else other

    return jax.tree_util.tree_map_with_path(one, params)


def filled(rows: Num[np.ndarray, "B *row"], size: int) -> Num[np.ndarray, "size *row"]:
    """Rows of zeros behind these, up to a size for which a program is compiled."""
    return np.concatenate([rows, np.zeros((size - len(rows), *rows.shape[1:]), rows.dtype)])


def random_images(model: Model, batch_size: int) -> Float[np.ndarray, "B Y X 3"]:
    """A batch to time a model with."""
    return np.random.default_rng(0).normal(size=(batch_size, *model.image_size, 3)).astype(np.float32)


def peak_memory(program: Any, mesh: Mesh) -> int | None:
    """Bytes on all devices while the program runs, as its compiler planned them; None where it does not say."""
    on_one = planned_memory(program)
    return None if on_one is None else on_one * mesh.size


def planned_memory(program: Any) -> int | None:
    """Bytes on one device: arguments, results that lie nowhere among these, and the room for all between.

    `peak_memory_in_bytes` leaves that room out on CPUs (jax 0.10), though it is most of what a training step takes.
    """
    if (of := program.memory_analysis()) is None:
        return None
    given, made = of.argument_size_in_bytes, of.output_size_in_bytes - of.alias_size_in_bytes
    return given + made + of.temp_size_in_bytes
