"""Where the time of a training step goes: figures, and a trace of some steps; nothing is trained."""

import json
import logging
import time
from pathlib import Path
from typing import Any

import jax

from tif_jax.commands import _arguments
from tif_jax.errors import InputError
from tif_jax.experiment.sections import Experiment
from tif_jax.experiment.stages import STAGES
from tif_jax.runtime import processes, records
from tif_jax.runtime.mesh import shard
from tif_jax.training import speed
from tif_jax.training.stage import Stage, prepare

logger = logging.getLogger(__name__)

_NUM_TRACED = 5
_NUM_WARM = 3  # steps before anything is measured


def main(argv: list[str]) -> None:
    arguments = _arguments.parse(
        "profile",
        __doc__,
        argv,
        stage=dict(choices=STAGES, default="finetune", help="whose step (default: finetune)"),
        steps=dict(type=int, default=20, metavar="N", help="how many steps to time (default: 20)"),
        **processes.FLAGS,
    )
    if arguments.steps < 1:
        raise InputError(f"--steps is {arguments.steps}; at least 1")
    processes.join(arguments)
    found = profile(arguments.stage, arguments.config, arguments.workdir, arguments.steps)
    if processes.is_first():
        print(json.dumps(found, indent=2))


def profile(stage: str, config: Experiment, workdir: Path, num_steps: int) -> dict[str, Any]:
    """DIR/profile/STAGE.json, and in DIR/profile/STAGE/ a trace for xprof or Perfetto (of every process its own).

    Seconds are means per step: step_seconds of training as it is, device_seconds with the same batch again and again,
    dispatch_seconds until the call of a step returns, data_seconds that a step waits for its batch.
    """
    if stage == "backbone" and config.backbone.init_from:
        raise InputError(
            "the backbone is imported (backbone.init_from) and has no training step; choose another --stage"
        )
    made = STAGES[stage](config, workdir)
    try:
        found = _measure(made, workdir / "profile" / stage, num_steps)
    finally:
        made.batches.close()
    records.write(workdir / "profile" / f"{stage}.json", found)
    return found


def _measure(stage: Stage, directory: Path, num_steps: int) -> dict[str, Any]:
    prepared = prepare(stage)
    state, step = prepared.fresh(), prepared.step(stage.model)
    batches = (shard(batch, prepared.mesh) for batch in stage.batches)
    batch = next(batches)
    began = time.perf_counter()
    lowered = step.func.lower(*step.args, state, batch)  # type: ignore[attr-defined]
    memory = lowered.compile().memory_analysis()
    compile_seconds = time.perf_counter() - began
    for _ in range(_NUM_WARM):
        state, metrics = step(state, batch)
    jax.block_until_ready(metrics)

    waited = called = 0.0
    began = time.perf_counter()
    for _ in range(num_steps):
        before = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - before
        before = time.perf_counter()
        state, metrics = step(state, batch)
        called += time.perf_counter() - before
    jax.block_until_ready(metrics)
    step_seconds = (time.perf_counter() - began) / num_steps

    began = time.perf_counter()
    for _ in range(num_steps):
        state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    device_seconds = (time.perf_counter() - began) / num_steps

    with jax.profiler.trace(str(directory)):
        for number in range(_NUM_TRACED):
            with jax.profiler.StepTraceAnnotation("train", step_num=number):
                state, metrics = step(state, next(batches))
        jax.block_until_ready(metrics)
    logger.info("%s: a trace of %d steps", directory, _NUM_TRACED)
    images_per_second = stage.recipe.batch_size / step_seconds
    meter = speed.meter(stage.model if stage.trains_network else None, prepared.mesh, stage.peak_tflops)
    return {
        "device": f"{prepared.mesh.size} x {jax.devices()[0].device_kind}",
        "batch_size": stage.recipe.batch_size,
        "num_steps": num_steps,
        "compile_seconds": compile_seconds,
        "step_seconds": step_seconds,
        "device_seconds": device_seconds,
        "dispatch_seconds": called / num_steps,
        "data_seconds": waited / num_steps,
        "images_per_second": images_per_second,
        "planned_memory_bytes": None if memory is None else memory.peak_memory_in_bytes,  # on one device
        **meter(images_per_second),
    }
