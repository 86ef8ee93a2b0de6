"""How much of the speed-up that counted multiply-adds promise each reducer reaches, interleaved in one process.

    taskset -c 1 python tests/benchmark_speed.py deit_tiny_patch16_224 16

Arguments: a model and a batch size. Random weights, float32, one CPU core (`taskset`). Times are the process's CPU time,
medians over rounds in random order; speed is the median over rounds of time(full) / time. `tif benchmark` measures a run's
own models on all devices.
"""

import os
import random
import statistics
import sys
import time

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import jax
import numpy as np

from tif_jax import cost, create_model

ROUNDS = 7
ROWS = [
    ("full", {}),
    *[("tif", dict(keep_ratio=ratio)) for ratio in (0.7, 0.5)],
    *[("evit", dict(keep_ratio=ratio)) for ratio in (0.7, 0.5)],
    ("evo_vit", dict(keep_ratio=0.5)),
    *[("tosa", dict(keep_ratio=ratio)) for ratio in (0.8, 0.5)],
    ("dynamic_vit", dict(keep_ratio=0.7)),
    *[("bat", dict(keep_ratio=ratio)) for ratio in (0.7, 0.5)],
    *[("tome", dict(num_merged=number)) for number in (8, 13)],
]


def main(name: str, batch_size: int) -> None:
    images, calls, counts = None, [], []
    for reducer, options in ROWS:
        model = create_model(name, reducer=reducer, **options)
        images = np.random.default_rng(0).normal(size=(batch_size, *model.image_size, 3)).astype(np.float32)
        calls.append(jax.jit(lambda images, model=model: model(images)[0]).lower(images).compile())
        jax.block_until_ready(calls[-1](images))
        counts.append(cost(model).gmac)
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS):
        for i in random.sample(range(len(calls)), len(calls)):
            began, repeats = time.process_time(), max(1, 8 // batch_size)
            for _ in range(repeats):
                jax.block_until_ready(calls[i](images))
            times[i].append((time.process_time() - began) / repeats)
    print("| reducer | ms | GMAC | x full | GMAC ratio | reached |\n|---|---|---|---|---|---|")
    for (reducer, options), gmac, mine in zip(ROWS, counts, times, strict=True):
        speed, promised = statistics.median(a / b for a, b in zip(times[0], mine, strict=True)), counts[0] / gmac
        text = " ".join([reducer, *(f"{value:g}" for value in options.values())])
        took = 1000 * statistics.median(mine)
        print(f"| {text} | {took:.1f} | {gmac:.3f} | {speed:.2f} | {promised:.2f} | {speed / promised:.2f} |")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
