"""Scoring a data split as a batch job that may be stopped at any time and goes on where it was.

An image's way: read (`data.loader`), scored on the devices (`scoring.Scorer`), a row of a part's columns, a Parquet file
(`shards`).

Legend: B images, R rows.
"""

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from tif_jax.data.loader import Batch, evaluation_batches
from tif_jax.data.options import DataOptions
from tif_jax.data.source import Source
from tif_jax.errors import InputError, Preempted
from tif_jax.impact import shards
from tif_jax.impact.manifest import Manifest, open_manifest
from tif_jax.impact.objective import has_label
from tif_jax.impact.oracle import Scores
from tif_jax.impact.scoring import Scorer
from tif_jax.models import Model, plain_vit
from tif_jax.runtime.preemption import stop_flag
from tif_jax.runtime.progress import Progress
from tif_jax.tasks import CLASSIFICATION

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_SAVES = 60.0  # what a killed job loses at most
_AGAIN = "run the same command again to go on"

Columns = dict[str, np.ndarray]  # of a shard


@dataclasses.dataclass(frozen=True)
class Job:
    """What is scored, how, and where the rows go."""

    directory: Path
    manifest: Manifest
    model: Model
    source: Source
    data: DataOptions
    rows: Int[np.ndarray, "R 2"]  # (index, view) of all rows of all parts, in split order
    parts: Sequence[int]  # those that this job scores, counted from 1
    batch_size: int
    seed: int
    chunk: int | None  # masked images at once on a device; None: what suits
    options: Mapping[str, Any]  # of `oracle.check_options`

    @property
    def num_parts(self) -> int:
        return self.manifest["num_parts"]

    def rows_of(self, part: int) -> Int[np.ndarray, "R 2"]:
        indices = shards.part_rows(len(self.rows), part, self.num_parts)
        return self.rows[indices.start : indices.stop]


def run(job: Job) -> None:
    """Scores the job's parts that are missing or damaged. Raises Preempted, with everything saved, after SIGTERM."""
    directory, num_parts = job.directory, job.num_parts
    open_manifest(directory, job.manifest)
    todo = [part for part in job.parts if shards.is_missing(directory, part, num_parts)]
    for part in set(job.parts).difference(todo):
        shards.tidy(directory, part, num_parts)
    if not todo:
        return
    with stop_flag() as stop:
        scorer = Scorer(job.model, job.batch_size, seed=job.seed, chunk=job.chunk, **job.options)
        logger.info(
            "%s: %d of %d parts to score, in %s, on %d devices with %d masked images at once on each",
            directory, len(todo), len(job.parts), np.dtype(job.model.dtype).name, scorer.mesh.size, scorer.chunk,
        )  # fmt: skip
        sizes = {part: len(job.rows_of(part)) for part in job.parts}
        finished = sum(sizes[part] for part in job.parts if part not in todo)
        with Progress(directory.name, sum(sizes.values()), "image", finished) as progress:
            meter = _Meter(progress, scorer.units_per_image)
            for part in _locked_in_turn(directory, todo, num_parts, stop):
                if shards.is_missing(directory, part, num_parts):
                    begun = shards.read_begun(directory, part, num_parts)
                    progress.skip(0 if begun is None else len(begun["index"]))
                    with closing(_scored(scorer, job, _without(job.rows_of(part), begun), meter)) as scored:
                        _write_part(job, part, begun, scored, stop)
                else:  # another job has finished it meanwhile
                    progress.skip(sizes[part])


def _locked_in_turn(directory: Path, parts: Sequence[int], num_parts: int, stop: threading.Event) -> Iterator[int]:
    """The parts, each locked until the next is asked for.

    Those that another job has locked come last, once it lets go of them: it may be stopped before they are finished.
    """
    told = False
    while parts:
        held = []
        for part in parts:
            with shards.lock_part(directory, part, num_parts) as ours:
                if ours:
                    yield part
                else:
                    held.append(part)
            if stop.is_set():
                raise Preempted(f"stopped; {_AGAIN}")
        if held and not told:
            logger.warning("%s: another job is scoring parts %s; waiting for it", directory, held)
            told = True
        if held:
            stop.wait(timeout=1.0)
        parts = held


def _write_part(job: Job, part: int, begun: Columns | None, scored: Iterable[Columns], stop: threading.Event) -> None:
    """The rows that were there and those that come. All are kept every minute and at SIGTERM: no more is ever lost."""
    columns = [] if begun is None else [begun]
    kept_at = time.monotonic()
    for more in scored:
        columns.append(more)
        if stop.is_set() or time.monotonic() - kept_at > _SECONDS_BETWEEN_SAVES:
            columns = [_joined(columns)]
            shards.write_begun(job.directory, part, job.num_parts, columns[0])
            kept_at = time.monotonic()
        if stop.is_set():
            raise Preempted(f"stopped, everything scored so far is saved; {_AGAIN}")
    shards.write_part(job.directory, part, job.num_parts, _joined(columns))


def _scored(scorer: Scorer, job: Job, rows: Int[np.ndarray, "R 2"], meter: "_Meter") -> Generator[Columns, None, None]:
    """The shard columns of one batch of rows after the other; the device has the next before one is waited for."""
    if not len(rows):
        return
    model = plain_vit(job.model, "impact")
    batches = evaluation_batches(job.source, job.data, batch_size=job.batch_size, records=rows)
    try:
        running = None
        for batch in meter.timed(batches):
            labels, real = batch[scorer.label_key], batch["weight"] > 0
            if job.options["target"] == "label":
                real = _with_label(job, batch, real, has_label(model, labels))
            before, running = running, (batch, real, scorer(batch["image"], labels))
            if before is not None:
                yield meter.counted(_columns(*before))
        if running is not None:
            yield meter.counted(_columns(*running))
    finally:
        batches.close()


def _with_label(
    job: Job, batch: Batch, real: Bool[np.ndarray, " B"], labelled: Bool[np.ndarray, " B"]
) -> Bool[np.ndarray, " B"]:
    """The real images that are scored: one without a class is an error, one whose label map is empty is left out."""
    for name in batch["id"][real & ~labelled]:
        if job.model.task == CLASSIFICATION.name:
            raise InputError(f"{name} has no label; set score.target to 'teacher'")
        logger.warning("Left out: the label map of %s has no pixel that counts", name)
    return real & labelled


def _columns(batch: Batch, real: Bool[np.ndarray, " B"], wait: Callable[[], Scores]) -> Columns:
    columns = {name: batch[name] for name in ("index", "view", "id", "label")} | wait()._asdict()
    return {name: column[real] for name, column in columns.items()}


def _joined(columns: Sequence[Columns]) -> Columns:
    return {name: np.concatenate([c[name] for c in columns]) for name in columns[0]}


def _without(rows: Int[np.ndarray, "R 2"], begun: Columns | None) -> Int[np.ndarray, "_ 2"]:
    if begun is None:
        return rows
    done = set(zip(begun["index"].tolist(), begun["view"].tolist(), strict=True))
    return rows[[tuple(row) not in done for row in rows.tolist()]]


class _Meter:
    """Counts what was scored and how long the devices waited for data."""

    def __init__(self, progress: Progress, units_per_image: int):
        self.progress, self.units_per_image = progress, units_per_image
        self.began, self.waited, self.num_images = time.perf_counter(), 0.0, 0

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            before = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - before
            if batch is None:
                return
            yield batch

    def counted(self, columns: Columns) -> Columns:
        self.num_images += len(columns["index"])
        elapsed = time.perf_counter() - self.began
        speed = self.num_images / elapsed
        self.progress.update(
            len(columns["index"]),
            images_per_second=speed,
            masked_forwards_per_second=speed * self.units_per_image,
            data_wait=self.waited / elapsed,
        )
        return columns
