"""A training step of ours against one written by hand: seconds, memory, and what a step costs beside its arithmetic.

    python -m benchmarks.step [MODEL] [IMAGE_SIZE] [BATCH_SIZE]

By hand: cross-entropy of a jitted forward pass over a nested dict of parameters, optax.adamw, donated, in a plain `for`.
Ours: `loop.run` with everything that `tif train` has in it: sharded state, table-driven AdamW, check for NaN, log every 50
steps, transfer guard. Both on one device, in one process, in turns; medians over rounds with their range.
"""

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks._common import median_and_range, random_images
from tif_jax.models import Model, create_model
from tif_jax.models.compiled import planned_memory
from tif_jax.models.params import params_of
from tif_jax.runtime.mesh import make_mesh, shard
from tif_jax.runtime.timing import in_rounds
from tif_jax.training import losses, optim
from tif_jax.training.loop import run
from tif_jax.training.state import init_state, shardings
from tif_jax.training.step import make_step

ROUNDS, SECONDS_PER_ROUND = 7, 6.0


class Variant(NamedTuple):
    """A training step, ready to be taken."""

    compiled: Any
    dispatch: Callable[[], float]  # one step: seconds until the call of it returns
    loop: Callable[[int], None]  # so many steps


def main(name: str = "deit_tiny_patch16_224", image_size: str = "224", batch_size: str = "16") -> None:
    jax.config.update("jax_num_cpu_devices", 1)
    model = create_model(name, image_size=int(image_size))
    narrow = create_model(name, width=12, num_heads=3, image_size=32)  # as many arrays, next to nothing to compute
    turns, memory, dispatch = {}, {}, {}
    for row, make in {"by hand": by_hand, "ours": ours}.items():
        variant, small = make(model, random_batch(model, int(batch_size))), make(narrow, random_batch(narrow, 1))
        turns[row] = timed(variant.loop)
        memory[row] = planned_memory(variant.compiled) / 2**20
        dispatch[row] = statistics.median(small.dispatch() for _ in range(200))
    times = in_rounds(turns, ROUNDS)
    print("| step | ms | MiB | call returns after, width 12, ms |\n|---|---|---|---|")
    for row, seconds in times.items():
        took = median_and_range([1e3 * x for x in seconds])
        print(f"| {row} | {took} | {memory[row]:.1f} | {1e3 * dispatch[row]:.2f} |")
    ratios = [a / b for a, b in zip(times["ours"], times["by hand"], strict=True)]
    print(
        f"\nours / by hand, round by round: time {median_and_range(ratios, 3)}, "
        f"memory {memory['ours'] / memory['by hand']:.3f}"
    )


def timed(loop: Callable[[int], None]) -> Callable[[], float]:
    """A turn of about SECONDS_PER_ROUND, which returns seconds per step."""
    loop(3)
    num_steps = max(5, round(SECONDS_PER_ROUND / seconds_per_step(loop, 3)))
    return partial(seconds_per_step, loop, num_steps)


def seconds_per_step(loop: Callable[[int], None], num_steps: int) -> float:
    began = time.perf_counter()
    loop(num_steps)
    return (time.perf_counter() - began) / num_steps


def random_batch(model: Model, size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "image": random_images(model, size),
        "label": rng.integers(1000, size=size).astype(np.int32),
        "index": np.arange(size),
    }


def by_hand(model: Model, batch: dict[str, np.ndarray]) -> Variant:
    graphdef, params = nnx.split(model)
    params = jax.tree.map(jnp.copy, nnx.to_pure_dict(params))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-5, weight_decay=0.05))

    def step(params, opt_state, image, label):
        def loss(params):
            logits, _ = nnx.merge(graphdef, nnx.State(params))(image)
            return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    step = jax.jit(step, donate_argnums=(0, 1))
    images, labels = jax.device_put((batch["image"], batch["label"]))
    compiled = step.lower(params, optimizer.init(params), images, labels).compile()
    held = [params, optimizer.init(params)]

    def dispatch():
        began = time.perf_counter()
        *held[:], value = step(*held, images, labels)
        elapsed = time.perf_counter() - began
        jax.block_until_ready(value)
        return elapsed

    def loop(num_steps):
        for _ in range(num_steps):
            *held[:], value = step(*held, *jax.device_put((batch["image"], batch["label"])))
        jax.block_until_ready(value)

    return Variant(compiled, dispatch, loop)


def ours(model: Model, batch: dict[str, np.ndarray], num_devices: int = 1, accumulate: int = 1) -> Variant:
    params = jax.device_get(params_of(model))
    optimizer = optim.adamw(10**6, learning_rate=1e-5, weight_decay=0.05, clip_norm=1.0)
    trainable = optim.match((), params, True)
    mesh = make_mesh(num_devices)
    where = shardings(jax.eval_shape(lambda: init_state(params, optimizer, trainable)), mesh)
    options = dict(seed=0, stochastic=True, where=where, accumulate=accumulate)
    step = make_step(model, losses.classification, optimizer, trainable, **options)
    held = [jax.jit(lambda p: init_state(p, optimizer, trainable), out_shardings=where)(params)]
    on_device = shard(batch, mesh)
    compiled = step.func.lower(*step.args, held[0], on_device).compile()

    def dispatch():
        began = time.perf_counter()
        held[0], metrics = step(held[0], on_device)
        elapsed = time.perf_counter() - began
        jax.block_until_ready(metrics)
        return elapsed

    def endless():
        while True:
            yield shard(batch, mesh)

    def loop(num_steps):
        until = int(held[0].step) + num_steps
        nothing = lambda *_: None  # noqa: E731
        held[0] = run(step, held[0], endless(), until=until, log_every=50, save_every=10**9, log=nothing, save=nothing)

    return Variant(compiled, dispatch, loop)


if __name__ == "__main__":
    main(*sys.argv[1:])
