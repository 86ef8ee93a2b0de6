"""What `sharding.fsdp` saves: memory of a training step on each of several (virtual) devices, and whether losses stay.

    python -m benchmarks.fsdp [MODEL] [--devices 1,2,4,8] [--remat] [--dtype float32] [--steps 0]

One image on each device, AdamW in float32. *Divided*: parameters and moments over all devices (fsdp = devices); *copied*:
each device has all (fsdp = 1). Memory is what the compiler plans for one device; `state` is what lies there between steps.
Programs are compiled, not run. With --steps, so many steps of a batch of as many images as the most devices are run on one
device and, divided, on all: losses side by side.
"""

import argparse
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh
from jaxtyping import Array, Float

from benchmarks._common import random_images
from tif_jax.models import Model, create_model
from tif_jax.models.compiled import planned_memory
from tif_jax.models.params import params_of
from tif_jax.runtime.mesh import AXES, shard
from tif_jax.training import losses, optim
from tif_jax.training.state import init_state, shardings
from tif_jax.training.step import make_step

_GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="vit_large_patch16_224")
    parser.add_argument("--devices", default="1,2,4,8")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--remat", action="store_true")
    parser.add_argument("--steps", type=int, default=0)
    arguments = parser.parse_args()
    numbers = sorted(map(int, arguments.devices.split(",")))
    jax.config.update("jax_num_cpu_devices", numbers[-1])
    model = jax.eval_shape(lambda: create_model(arguments.model, dtype=arguments.dtype, remat=arguments.remat))
    print(
        "| devices | state, copied | state, divided | peak, copied | peak, divided |\n|---|---|---|---|---|", flush=True
    )
    for number in numbers:
        copied, divided = (planned(model, mesh_of(number, fsdp), number) for fsdp in (1, number))
        cells = [f"{x / _GIB:.2f}" for pair in zip(copied, divided, strict=True) for x in pair]
        print(f"| {number} | {' | '.join(cells)} |", flush=True)
    if arguments.steps:
        whole = create_model(arguments.model, dtype=arguments.dtype, remat=arguments.remat)
        print(f"\n| devices | losses of {arguments.steps} steps, {numbers[-1]} images each |\n|---|---|")
        for mesh in (mesh_of(1, 1), mesh_of(numbers[-1], numbers[-1])):
            told = ", ".join(f"{loss:.6f}" for loss in losses_of(whole, mesh, numbers[-1], arguments.steps))
            print(f"| {mesh.size} | {told} |", flush=True)


def mesh_of(number: int, fsdp: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:number]).reshape(-1, fsdp), AXES, axis_types=(AxisType.Auto,) * 2)


def planned(model: Model, mesh: Mesh, batch_size: int) -> tuple[int, int]:
    """Bytes of the state on one device, and of everything at the step's peak."""
    step, abstract, _ = step_of(model, mesh)
    batch = shard(batch_of(model, batch_size), mesh)
    program = step.func.lower(*step.args, abstract, batch).compile()
    sizes = [np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(abstract)]
    return int(sum(sizes)), planned_memory(program)


def step_of(model: Model, mesh: Mesh) -> tuple[Any, Any, Any]:
    """The step, its state without values, and what makes one of parameters."""
    optimizer = optim.adamw(10**6, learning_rate=1e-4, weight_decay=0.05, clip_norm=1.0)
    params = params_of(model)
    trainable = optim.match((), params, True)

    def init(params):
        return init_state(params, optimizer, trainable)

    shapes = jax.eval_shape(init, params)
    where = shardings(shapes, mesh)
    step = make_step(model, losses.classification, optimizer, trainable, seed=0, stochastic=True, where=where)
    abstract = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, where)
    return step, abstract, jax.jit(init, out_shardings=where)


def losses_of(model: Model, mesh: Mesh, batch_size: int, num_steps: int) -> Float[np.ndarray | Array, " S"]:
    step, _, init = step_of(model, mesh)
    state, found = init(jax.device_get(params_of(model))), []
    for _ in range(num_steps):
        state, metrics = step(state, shard(batch_of(model, batch_size), mesh))
        found.append(float(metrics["loss"]))
    return np.array(found)


def batch_of(model: Model, size: int) -> dict[str, np.ndarray]:
    labels = np.random.default_rng(0).integers(model.num_classes, size=size).astype(np.int32)
    return {"image": random_images(model, size), "label": labels}


if __name__ == "__main__":
    main()
