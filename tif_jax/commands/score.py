"""Measure the impact of every patch token of a data split: a batch job that goes on where it stopped."""

import importlib.metadata
import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from jaxtyping import Bool, Int
from ml_collections import ConfigDict

from tif_jax import data
from tif_jax.commands import _arguments, train
from tif_jax.data.loader import Batch, evaluation_batches
from tif_jax.data.source import Source
from tif_jax.errors import InputError, Preempted
from tif_jax.impact import oracle, shards
from tif_jax.impact.manifest import Manifest, open_manifest
from tif_jax.impact.scoring import Scorer
from tif_jax.models import Model
from tif_jax.runtime import processes
from tif_jax.runtime.preemption import sigterm_flag
from tif_jax.runtime.progress import Progress
from tif_jax.weights.loading import load

logger = logging.getLogger(__name__)

_ROWS_PER_PART = 256
_SECONDS_BETWEEN_SAVES = 60.0  # what a killed job loses at most
_AGAIN = "run the same command again to go on"

Columns = dict[str, np.ndarray]  # of a shard


def main(argv: list[str]) -> None:
    arguments = _arguments.parse("score", __doc__, argv, **processes.FLAGS)
    processes.join(arguments)
    score(arguments.config, arguments.workdir)


def score(config: ConfigDict, workdir: Path) -> None:
    """DIR/impact: shards of the training split, with the estimator, mask, target and views of config.score."""
    _score(config, workdir, workdir / "impact", "train", config.score.target, config.score.num_images)


def score_heldout(config: ConfigDict, workdir: Path) -> None:
    """DIR/heldout-label and DIR/heldout-teacher: both oracles on config.evaluate.num_images test images."""
    for target in oracle.TARGETS:
        if (config.score.estimator, target) != ("gradient", "teacher"):  # zero everywhere
            _score(config, workdir, workdir / f"heldout-{target}", "test", target, config.evaluate.num_images)


def _score(config: ConfigDict, workdir: Path, directory: Path, split: str, target: str, num_images: int) -> None:
    recipe = config.score
    views, part = (1, "") if split == "test" else (recipe.views, recipe.part)
    settings = check(config, split, target)
    model = load(workdir / "backbone", dtype=_dtype(recipe.dtype, recipe.estimator))
    source = train.open_source(config, split, model)
    rows = _rows(len(source), num_images, views)
    chosen, num_parts = _parts(part, len(rows))
    open_manifest(directory, _manifest(config, model, settings, split, source, len(rows), num_parts))
    todo = [k for k in shards.missing_parts(directory, num_parts) if k in chosen]
    for k in set(chosen).difference(todo):
        shards.tidy(directory, k, num_parts)
    if not todo:
        return
    with sigterm_flag() as stop:
        scorer = Scorer(model, recipe.batch_size, seed=config.seed, chunk=recipe.chunk or None, **settings)
        logger.info(
            "%s: %d of %d parts to score, in %s, on %d devices with %d masked images at once on each",
            directory, len(todo), len(chosen), np.dtype(model.dtype).name, scorer.mesh.size, scorer.chunk,
        )  # fmt: skip
        sizes = {k: len(shards.part_rows(len(rows), k, num_parts)) for k in chosen}
        finished = sum(sizes[k] for k in chosen if k not in todo)
        with Progress(directory.name, sum(sizes.values()), "image", finished) as progress:
            meter = _Meter(progress, scorer.units_per_image)
            for k in _locked_in_turn(directory, todo, num_parts, stop):
                if shards.is_missing(directory, k, num_parts):
                    its_rows = rows[shards.part_rows(len(rows), k, num_parts)]
                    begun = shards.read_begun(directory, k, num_parts)
                    progress.skip(0 if begun is None else len(begun["index"]))
                    scored = _scored(scorer, source, config, target, _without(its_rows, begun), meter)
                    _write_part(directory, k, num_parts, begun, scored, stop)
                else:  # another job has finished it meanwhile
                    progress.skip(sizes[k])


def _locked_in_turn(directory: Path, parts: Sequence[int], num_parts: int, stop: threading.Event) -> Iterator[int]:
    """The parts, each locked until the next is asked for.

    Those that another job has locked come last, once it lets go of them: it may be stopped before they are finished.
    """
    told = False
    while parts:
        held = []
        for k in parts:
            with shards.lock_part(directory, k, num_parts) as ours:
                if ours:
                    yield k
                else:
                    held.append(k)
            if stop.is_set():
                raise Preempted(f"stopped; {_AGAIN}")
        if held and not told:
            logger.warning("%s: another job is scoring parts %s; waiting for it", directory, held)
            told = True
        if held:
            stop.wait(timeout=1.0)
        parts = held


def _write_part(
    directory: Path, k: int, num_parts: int, begun: Columns | None, scored: Iterable[Columns], stop: threading.Event
) -> None:
    """The rows that were there and those that come. All are kept every minute and at SIGTERM: no more is ever lost."""
    columns = [] if begun is None else [begun]
    kept_at = time.monotonic()
    for more in scored:
        columns.append(more)
        if stop.is_set() or time.monotonic() - kept_at > _SECONDS_BETWEEN_SAVES:
            columns = [_joined(columns)]
            shards.write_begun(directory, k, num_parts, columns[0])
            kept_at = time.monotonic()
        if stop.is_set():
            raise Preempted(f"stopped, everything scored so far is saved; {_AGAIN}")
    shards.write_part(directory, k, num_parts, _joined(columns))


def _scored(
    scorer: Scorer, source: Source, config: ConfigDict, target: str, rows: Int[np.ndarray, "R 2"], meter: "_Meter"
) -> Iterator[Columns]:
    """The shard columns of one batch of rows after the other; the device has the next before one is waited for."""
    if not len(rows):
        return
    batches = evaluation_batches(source, config.data, batch_size=config.score.batch_size, records=rows)
    try:
        running = None
        for batch in meter.timed(batches):
            real = batch["weight"] > 0
            if target == "label" and (unlabelled := real & (batch["label"] < 0)).any():
                raise InputError(f"{batch['id'][unlabelled][0]} has no label; set score.target to 'teacher'")
            before, running = running, (batch, real, scorer(batch["image"], batch["label"]))
            if before is not None:
                yield meter.counted(_columns(*before))
        if running is not None:
            yield meter.counted(_columns(*running))
    finally:
        batches.close()


def _columns(batch: Batch, real: Bool[np.ndarray, " B"], wait: Callable[[], oracle.Scores]) -> Columns:
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


def check(config: ConfigDict, split: str, target: str) -> dict[str, Any]:
    """The oracle's options for a split. Raises InputError where config.score is wrong, before any work is done."""
    recipe = config.score
    if recipe.views < 1:
        raise InputError(f"score.views is {recipe.views}; at least 1 (the evaluation view)")
    if recipe.views > 1 and data.read_options(config.data).augment == "none":
        raise InputError(
            f"score.views is {recipe.views}, but data.augment 'none' has the evaluation view only: set score.views=1"
        )
    for name, least in (("batch_size", 1), ("chunk", 0)):
        if recipe[name] < least:
            raise InputError(f"score.{name} is {recipe[name]}; at least {least}")
    _parts(recipe.part, 1)
    return oracle.check_options(
        estimator=recipe.estimator,
        mask=recipe.mask if recipe.estimator == "exact" else "drop",
        target=target,
        num_samples=(config.evaluate if split == "test" else recipe).num_samples,
        keep_ratio=recipe.keep_ratio,
    )


def _rows(num_examples: int, num_images: int, views: int) -> np.ndarray:
    """(index, view) of what is scored: all examples, or num_images of them evenly spaced; in split order."""
    count = min(num_images or num_examples, num_examples)
    index = np.arange(count) * num_examples // count
    return np.stack([np.repeat(index, views), np.tile(np.arange(views), count)], axis=1)


def _parts(part: str, num_rows: int) -> tuple[Sequence[int], int]:
    """This process's parts and the number of parts of all jobs together.

    part: 'K/N', the K-th of N; or '' for all, of which each process of a multi-process run takes its share.
    """
    if not part:
        num_parts = -(-num_rows // _ROWS_PER_PART)
        return range(1 + jax.process_index(), num_parts + 1, jax.process_count()), num_parts
    match = re.fullmatch(r"(\d+)/(\d+)", part)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise InputError(f"score.part is {part!r}; it is K/N with 1 <= K <= N, as in 3/64")
    return [int(match[1])], int(match[2])


def _dtype(name: str, estimator: str) -> str:
    """score.dtype, where '' stands for what suits: differences of losses lose in bfloat16 what gradients do not."""
    fast = estimator != "exact" and jax.default_backend() != "cpu"
    return name or ("bfloat16" if fast else "float32")


def _manifest(
    config: ConfigDict, model: Model, settings: dict, split: str, source: Source, num_rows: int, num_parts: int
) -> Manifest:
    estimator = {"name": settings["estimator"], "seed": config.seed, "dtype": np.dtype(model.dtype).name}
    if settings["estimator"] == "sampled":
        estimator |= {key: settings[key] for key in ("num_samples", "keep_ratio")}
    views = 1 if split == "test" else config.score.views
    manifest = {
        "num_examples": len(source),
        "num_images": num_rows // views,
        "views": views,
        "num_parts": num_parts,
        "estimator": estimator,
        "mask": settings["mask"],
        "target": settings["target"],
        "data": {"name": config.data.name, "split": split},
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "tif_jax")},
    }
    return cast(Manifest, manifest | train.expected_manifest(config, model))
