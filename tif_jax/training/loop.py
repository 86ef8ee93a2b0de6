"""The loop around the training step: batches in; logs, checkpoints and a preempted end out."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from tif_jax.errors import Preempted, WorkError
from tif_jax.runtime.progress import Progress
from tif_jax.training.state import State
from tif_jax.training.step import Step

logger = logging.getLogger(__name__)


def run(
    step: Step,
    state: State,
    batches: Iterator[Mapping[str, Array]],
    *,
    until: int,
    log_every: int,
    save_every: int,
    log: Callable[[int, dict[str, float]], None],
    save: Callable[[State], None],
    stop: Callable[[], bool] = lambda: False,
    title: str = "train",
    of: int | None = None,
) -> State:
    """Steps until state.step == until. Logs mean metrics every log_every steps and saves every save_every and at the end.

    The order is fixed: log, save, next batch, step. So a saved state has passed the check for NaN, and the iterator's
    state at a save is that of the next batch. Between logs and saves nothing waits for the device, and nothing is copied
    to it that was not put there on purpose (jax.transfer_guard). Raises WorkError at a loss or gradient that is not
    finite, and Preempted, after logging and saving, once stop() is true; it is asked at every step and at the end.
    title: of the progress bar. of: its steps, where other programs go on after `until`.
    """
    start = int(jax.device_get(state.step))
    pending: list[tuple[Mapping[str, Any], Any]] = []
    began, waited = time.perf_counter(), 0.0
    with Progress(title, of or until, "step", start) as progress:
        for at in range(start, until + 1):
            stopping = stop()
            if pending and (stopping or at % log_every == 0 or at % save_every == 0 or at == until):
                num_images = sum(len(indices) for _, indices in pending)
                means = _check(at - len(pending), pending)
                elapsed = time.perf_counter() - began
                means |= {
                    "images_per_second": num_images / elapsed,
                    "step_seconds": elapsed / len(pending),
                    "data_wait": waited / elapsed,
                }
                if means.get("valid") == 0:  # a dense loss of nothing is 0
                    logger.warning(
                        "%s: no pixel of the label maps of steps %d to %d counts, so nothing is learnt; are "
                        "data.label_folder and data.label_scale theirs?", title, at - len(pending), at - 1,
                    )  # fmt: skip
                log(at, means)
                progress.update(len(pending), loss=means["loss"], images_per_second=means["images_per_second"])
                pending, began, waited = [], time.perf_counter(), 0.0
            if at > start and (stopping or at % save_every == 0 or at == until):
                save(state)
            if stopping:
                raise Preempted(f"stopped at step {at}, nothing is lost; run the same command again to go on")
            if at == until:
                break
            with jax.transfer_guard("disallow"):
                before = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - before
                state, metrics = step(state, batch)
            pending.append((metrics, batch["index"]))
    return state


def _check(first: int, pending: list[tuple[Mapping[str, Any], Any]]) -> dict[str, float]:
    """Means of the metrics of steps first, first + 1, ..., fetched from the device at once."""
    rows = jax.device_get([metrics for metrics, _ in pending])
    for i, row in enumerate(rows):
        if not all(map(math.isfinite, (row["loss"], row["grad_norm"]))):
            images = np.concatenate([rows.data for rows in pending[i][1].addressable_shards]).tolist()
            raise WorkError(
                f"loss {row['loss']}, gradient norm {row['grad_norm']} at step {first + i} (images {str(images)[:200]}); "
                "the last checkpoint is intact: lower the learning rate or look at these images, then run again"
            )
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
