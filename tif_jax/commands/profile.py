"""Where the time of a training step goes: figures, and a trace of some steps; nothing is trained."""

import itertools
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from tif_jax.commands import _arguments
from tif_jax.errors import InputError
from tif_jax.experiment.schema import Experiment
from tif_jax.experiment.stages import STAGES
from tif_jax.models.compiled import planned_memory
from tif_jax.runtime import processes, records
from tif_jax.runtime.mesh import shard
from tif_jax.runtime.workdir import begin_log
from tif_jax.training import speed
from tif_jax.training.stage import Stage, prepare
from tif_jax.training.state import State
from tif_jax.training.step import Batch, Step

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
    _arguments.at_least_1("--steps", arguments.steps)
    processes.join(arguments)
    begin_log(arguments.workdir)
    found = profile(arguments.stage, arguments.config, arguments.workdir, arguments.steps)
    if processes.is_first():
        print(json.dumps(records.strict(found), indent=2))


def profile(stage: str, config: Experiment, workdir: Path, num_steps: int) -> dict[str, Any]:
    """DIR/profile/STAGE.json, and in DIR/profile/STAGE/ a trace for xprof or Perfetto (of every process its own).

    Seconds are means per step: step_seconds of training as it is, device_seconds with the same batch again and again,
    dispatch_seconds until the call of a step returns, data_seconds that a step waits for its batch.
    """
    if stage == "backbone" and config.backbone.init_from and not config.backbone.is_trained:
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
    step, batches = prepared.step(stage.model), (shard(batch, prepared.mesh) for batch in stage.batches)
    state, batch = prepared.fresh(stage.model), next(batches)
    began = time.perf_counter()
    lowered = step.func.lower(*step.args, state, batch)  # type: ignore[attr-defined]
    compiled = lowered.compile()
    compile_seconds = time.perf_counter() - began
    state, _ = _timed(step, state, itertools.repeat(batch), _NUM_WARM)
    state, training = _timed(step, state, batches, num_steps)
    state, device = _timed(step, state, itertools.repeat(batch), num_steps)
    _trace(step, state, batches, directory)
    images_per_second = stage.recipe.batch_size / training.step
    meter = speed.meter(stage.model if stage.trains_network else None, prepared.mesh, stage.peak_tflops)
    return {
        "device": f"{prepared.mesh.size} x {jax.devices()[0].device_kind}",
        "batch_size": stage.recipe.batch_size,
        "num_steps": num_steps,
        "compile_seconds": compile_seconds,
        "step_seconds": training.step,
        "device_seconds": device.step,
        "dispatch_seconds": training.dispatch,
        "data_seconds": training.data,
        "images_per_second": images_per_second,
        "planned_memory_bytes": planned_memory(compiled),  # on one device
        **meter(images_per_second),
    }


class _Seconds(NamedTuple):
    """Means per step."""

    step: float
    dispatch: float  # until the call of the step returns
    data: float  # until the batch is there


def _timed(step: Step, state: State, batches: Iterator[Batch], num_steps: int) -> tuple[State, _Seconds]:
    data = dispatch = 0.0
    began = time.perf_counter()
    for _ in range(num_steps):
        before = time.perf_counter()
        batch = next(batches)
        there = time.perf_counter()
        state, metrics = step(state, batch)
        data += there - before
        dispatch += time.perf_counter() - there
    jax.block_until_ready(metrics)
    total = time.perf_counter() - began
    return state, _Seconds(step=total / num_steps, dispatch=dispatch / num_steps, data=data / num_steps)


def _trace(step: Step, state: State, batches: Iterator[Batch], directory: Path) -> None:
    with jax.profiler.trace(str(directory)):
        for number in range(_NUM_TRACED):
            with jax.profiler.StepTraceAnnotation("train", step_num=number):
                state, metrics = step(state, next(batches))
        jax.block_until_ready(metrics)
    logger.info("%s: a trace of %d steps", directory, _NUM_TRACED)
