"""What benchmarks share: the plain forward pass, times as text, and where the real data are."""

import os
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, Float

from tif_jax.models import Model
from tif_jax.models.compiled import compile_forward
from tif_jax.models.compiled import random_images as random_images
from tif_jax.runtime.mesh import make_mesh, shard
from tif_jax.runtime.timing import Name, in_rounds, rate


def data_root() -> Path:
    """Real weights and photographs: $TIF_DATA, or ../shared/data beside the project."""
    return Path(os.environ.get("TIF_DATA") or Path(__file__).parents[2] / "shared" / "data")


def plain_forward(model: Model, images: Float[np.ndarray, "B Y X 3"]) -> Callable[..., Float[Array, "B L"]]:
    """The compiled forward pass over all devices, which returns when the logits are there.

    Called without images it takes these, which are on the devices already; others have to be as many.
    """
    mesh = make_mesh(len(images))
    program, (params, placed) = compile_forward(model, images, mesh)

    def forward(images=None):
        given = placed if images is None else shard({"image": images}, mesh)["image"]
        return jax.block_until_ready(program(params, given))

    return forward


Run = Callable[[], int]  # does some work and returns how much


def rates_of(rows: Mapping[Name, Run], num_rounds: int, seconds: float) -> dict[Name, list[float]]:
    """How much a second each row does, in every round; each runs once before that, and is compiled then."""
    for run in rows.values():
        run()
    return in_rounds({name: partial(rate, run, seconds) for name, run in rows.items()}, num_rounds)


def in_torch(python: str, model: str) -> Callable[[str, int], Run]:
    """What `_torch_worker` does with timm's model of that name in a process of its own, idle while nothing is asked of it."""
    command = [python, str(Path(__file__).with_name("_torch_worker.py")), model]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert worker.stdin is not None and worker.stdout is not None
    pipe_in, pipe_out = worker.stdin, worker.stdout

    def asked(what: str, number: int) -> Run:
        def run() -> int:
            pipe_in.write(f"{what} {number}\n")
            pipe_in.flush()
            return int(pipe_out.readline())

        return run

    return asked


def median_and_range(values: Sequence[float], digits: int = 1) -> str:
    """As in '12.3 (11.9-14.0)'."""
    median, low, high = (f"{x:.{digits}f}" for x in (statistics.median(values), min(values), max(values)))
    return f"{median} ({low}-{high})"
