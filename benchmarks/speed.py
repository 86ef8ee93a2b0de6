"""How much of the speed-up that counted multiply-adds promise each reducer reaches, interleaved in one process.

    taskset -c 1 python -m benchmarks.speed deit_tiny_patch16_224 16

Arguments: a model and a batch size. Random weights, float32, one CPU core (`taskset`). Times are the process's CPU time,
medians over rounds in random order; speed is the median over rounds of time(full) / time. `tif benchmark` measures a run's
own models on all devices.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

from benchmarks._common import plain_forward, random_images
from tif_jax import cost, create_model
from tif_jax.runtime.timing import in_rounds

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
    *[(name, dict(num_merged=number)) for name in ("mctf", "importance_merge") for number in (8, 13)],
    *[(name, dict(keep_ratio=ratio)) for name in ("expediting", "ailurus") for ratio in (0.43, 0.2)],
]


def main(name: str, batch_size: str) -> None:
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    turns, gmacs = {}, {}
    for reducer, options in ROWS:
        model = create_model(name, reducer=reducer, **options)
        label = " ".join([reducer, *(f"{value:g}" for value in options.values())])
        forward = plain_forward(model, random_images(model, int(batch_size)))
        forward()
        turns[label] = partial(cpu_seconds, forward, repeats=max(1, 8 // int(batch_size)))
        gmacs[label] = cost(model).gmac
    times = in_rounds(turns, ROUNDS)
    print("| reducer | ms | GMAC | x full | GMAC ratio | reached |\n|---|---|---|---|---|---|")
    for label, seconds in times.items():
        speed = statistics.median(full / own for full, own in zip(times["full"], seconds, strict=True))
        promised = gmacs["full"] / gmacs[label]
        print(
            f"| {label} | {1000 * statistics.median(seconds):.1f} | {gmacs[label]:.3f} | {speed:.2f} | {promised:.2f} | "
            f"{speed / promised:.2f} |"
        )


def cpu_seconds(forward: Callable[[], object], repeats: int) -> float:
    """CPU time that a call takes, mean over the repeats."""
    began = time.process_time()
    for _ in range(repeats):
        forward()
    return (time.process_time() - began) / repeats


if __name__ == "__main__":
    main(*sys.argv[1:])
