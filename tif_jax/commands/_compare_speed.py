"""Images/s of the rows of `tif compare`: all of them in turn in every round, on the same images with the same weights."""

import statistics
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax

from tif_jax.models import Model
from tif_jax.models.compiled import compile_forward, peak_memory, random_images
from tif_jax.models.params import params_of
from tif_jax.runtime import timing
from tif_jax.runtime.mesh import make_mesh, replicate, shard
from tif_jax.runtime.progress import Progress

_SECONDS = 0.3  # of a turn in a round, at least


def speeds(models: Mapping[str, Model], batch_size: int, num_rounds: int) -> dict[str, dict[str, Any]]:
    """By label: images_per_second, the median of rounds, and times those of 'full', the median of each round's ratio; both
    with their range; peak_memory_bytes on all devices, as the compiler planned it.
    """
    mesh = make_mesh(batch_size, this_process_only=True)
    images = shard({"image": random_images(models["full"], batch_size)}, mesh)["image"]
    backbone = replicate(params_of(models["full"]), mesh)
    turns, memory = {}, {}
    with Progress(f"compile, batch {batch_size}", len(models), "reducer") as progress:
        for label, model in models.items():
            own = params_of(model)
            placed = {name: backbone[name] if name in backbone else replicate(of, mesh) for name, of in own.items()}
            program, arguments = compile_forward(model, images, mesh, placed)
            jax.block_until_ready(program(*arguments))
            turns[label], memory[label] = partial(_rate, program, arguments), peak_memory(program, mesh)
            progress.update(1)
    with Progress(f"speed, batch {batch_size}", num_rounds * len(models), "turn") as progress:
        rates = timing.in_rounds({label: partial(_told, turn, progress) for label, turn in turns.items()}, num_rounds)
    return {label: _summary(rates[label], rates["full"]) | {"peak_memory_bytes": memory[label]} for label in models}


def _summary(rates: list[float], of_full: list[float]) -> dict[str, Any]:
    ratios = [rate / full for rate, full in zip(rates, of_full, strict=True)]
    return {
        "images_per_second": statistics.median(rates),
        "images_per_second_range": [min(rates), max(rates)],
        "speed_up": statistics.median(ratios),
        "speed_up_range": [min(ratios), max(ratios)],
    }


def _rate(program: Any, arguments: tuple) -> float:
    return timing.rate(lambda: len(jax.block_until_ready(program(*arguments))), _SECONDS, least=1)


def _told(turn: Any, progress: Progress) -> float:
    rate = turn()
    progress.update(1)
    return rate
