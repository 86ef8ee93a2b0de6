"""Batches of views of images, read and preprocessed by threads, and by worker processes where threads are not enough.

The words for what is read, from the data set to a batch:
    record    (index, view): the image at `index` of the source, and which picture of it
    row       a record's place in the array `records`, and in the arrays of `extra` beside it
    position  a place in the stream of batches, which is in batch position // batch_size, whichever process reads it
    order     the function that says which row is shown at a position
    chunk     neighbouring positions of one batch, which one thread reads at once

View 0 is the evaluation view; view v > 0 is an augmentation drawn from (index, v) and nothing else, so that impacts
scored once fit every later run.

Legend: B images of a batch, R records, (Y, X) the size of a view in pixels.
"""

import dataclasses
import logging
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from jaxtyping import Int, Shaped

from tif_jax.data.augment import Augmentation
from tif_jax.data.options import DataOptions, Settings, read_options
from tif_jax.data.preprocess import NONE
from tif_jax.data.source import Example, Source, UnreadableImage
from tif_jax.data.views import FRESH, Views
from tif_jax.errors import InputError

logger = logging.getLogger(__name__)

_MAX_CHUNK = 32  # positions
_ENDLESS = 10**9  # epochs: Grain's own endless repetition can not be batched in ones

Batch = dict[str, Any]


class Batches:
    """An iterator over batches that knows where it is. Close it when done, so that its threads end.

    Where a run has several processes, each gets its part of every batch, in the order of the processes: together they
    see what one process alone would.
    """

    def __init__(self, order: Callable[[int], int], num_positions: int, load: "_Loader", batch_size: int, shared: bool):
        self.unreadable = load.unreadable  # index -> error of each image left out so far (data.on_error='skip')
        processes, process = (jax.process_count(), jax.process_index()) if shared else (1, 0)
        if batch_size % processes:
            raise InputError(f"a batch of {batch_size} can not be divided over {processes} processes")
        # Threads read chunks: handing over small images one by one takes longer than reading them.
        chunk_size = math.gcd(batch_size // processes, _MAX_CHUNK)
        self._num_chunks = batch_size // processes // chunk_size  # of a batch, in this process
        self._read_chunk = _ReadChunk(load, order, chunk_size, self._num_chunks, processes, process)
        self._num_batches = num_positions // batch_size
        self._iterator = self._from(0)

    def _from(self, batch: int) -> Any:
        import grain

        self._next = batch
        options = self._read_chunk.load.options
        chunks = grain.MapDataset.range(batch * self._num_chunks, self._num_batches * self._num_chunks)
        ahead = max(options.num_workers, 2 * self._num_chunks)
        threads = grain.ReadOptions(options.num_workers, prefetch_buffer_size=ahead)
        parts = chunks.map(self._read_chunk).to_iter_dataset(threads)
        if options.worker_processes:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain's worker processes ask for flags, which we do not use
            workers = grain.MultiprocessingOptions(
                options.worker_processes, per_worker_buffer_size=-(-ahead // options.worker_processes)
            )
            parts = parts.mp_prefetch(workers, worker_init_fn=_end_with_parent)
        return iter(parts.batch(self._num_chunks, batch_fn=_concatenate))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = next(self._iterator)
        self._next += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """Where the next batch begins, whatever the number of processes; JSON-serialisable."""
        return {"next_batch": self._next}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Goes where `get_state` was called on an iterator made with the same arguments."""
        self._iterator.close()
        self._iterator = self._from(state["next_batch"])

    def close(self) -> None:
        """Ends the threads. No batch can be read afterwards."""
        self._iterator.close()


@dataclasses.dataclass(frozen=True)
class _ReadChunk:
    """Reads this process's chunk of some number, counted through all batches. (No closure: worker processes get it.)"""

    load: "_Loader"
    order: Callable[[int], int]
    size: int
    per_batch: int  # in each process
    num_processes: int
    process: int

    def __call__(self, number: int) -> Batch:
        batch, chunk = divmod(number, self.per_batch)
        first = self.size * ((batch * self.num_processes + self.process) * self.per_batch + chunk)
        positions = range(first, first + self.size)
        return self.load(positions, [self.order(position) for position in positions])


@dataclasses.dataclass(frozen=True)
class _ShuffledOrder:
    """The order of endless epochs, in which a row comes `repeats` times in succession."""

    shuffled: Any  # row at a position, without repeats: a permutation for each epoch
    num_rows: int
    repeats: int

    def __call__(self, position: int) -> int:
        epoch, place = divmod(position, self.num_rows)
        return int(self.shuffled[epoch * self.num_rows + place // self.repeats])


def _end_with_parent(_worker: int, _num_workers: int) -> None:
    """Has a worker process end when its parent does, however that ends, and not before.

    Grain's workers outlive a parent that is killed, and a terminal's Ctrl-C comes to them, too.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_after, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_after(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _in_order(position: int) -> int:
    return position


def training_batches(
    source: Source,
    data: Settings,
    *,
    batch_size: int,
    seed: int,
    records: Int[np.ndarray, "R 2"] | None = None,
    extra: Mapping[str, Shaped[np.ndarray, "R ..."]] | None = None,
    augmentation: Augmentation = NONE,
    repeats: int = 1,
) -> Batches:
    """Endless batches, every epoch in a new order drawn from `seed`; a batch may span two epochs.

    A batch: image float32 (B, Y, X, 3), label int32 (B,), index int64 (B,), view int32 (B,), of every array of `extra` the
    rows of its records, and label_map (B, Y, X) where the data have some: float32 metres, 0 where not measured, or int32
    classes, -1 where ignored. Without `records`, every image of the source once an epoch, freshly augmented (view
    FRESH) unless data.augment is 'none' (view 0); `augmentation` sets what is done to it beyond. repeats: an epoch is as
    long, but has so many times fewer records, each that many times in succession (Hoffer et al. 2020). With
    data.on_error='skip' the next record that can be read takes the place of an unreadable one: steps and epochs do not
    depend on how many there are.
    """
    import grain

    if not 0 <= seed < 2**32:
        raise InputError(f"seed is {seed}; it must lie between 0 and 2**32 - 1")
    options = read_options(data)
    if records is None:
        records = _all_records(source, 0 if options.augment == "none" else FRESH)
    else:
        _check_records(records, source, options)
    if not len(records):
        raise InputError("no records to train on; score impacts first, or train without them")
    _check_batch_size(batch_size)
    if repeats < 1:
        raise InputError(f"augmentation.repeats is {repeats}; it must be at least 1")
    if batch_size > len(records):
        logger.warning("a batch of %d shows some of the %d images several times", batch_size, len(records))
    elif 2 * batch_size > len(records):
        logger.warning("an epoch of %d images is one step with a batch of %d", len(records), batch_size)
    shuffled = grain.MapDataset.range(len(records)).shuffle(_seed_of_order(seed)).repeat(_ENDLESS)
    order = _ShuffledOrder(shuffled, len(records), repeats)
    load = _Loader(source, options, records, extra or {}, seed, augmentation)
    return Batches(order, len(records) * _ENDLESS, load, batch_size, shared=True)


def _seed_of_order(seed: int) -> int:
    """Grain adds the epoch's number to the seed, so that epoch e + 1 of seed s would be epoch e of seed s + 1: spread out."""
    return int(np.random.SeedSequence(seed).generate_state(1)[0])


def evaluation_batches(
    source: Source,
    data: Settings,
    *,
    batch_size: int,
    records: Int[np.ndarray, "R 2"] | None = None,
    shared: bool = False,
) -> Batches:
    """Every record once, in order; without `records`, the evaluation view of every image.

    A batch is as in `training_batches`, with id, strings (B,), and weight float32 (B,): 1, or 0 for the copies of the
    last image that fill the last batch and for the black pictures in place of unreadable ones (data.on_error='skip').
    shared: divided among the processes of a run; otherwise each of them reads everything.
    """
    options = read_options(data)
    if records is None:
        records = _all_records(source, 0)
    else:
        _check_records(records, source, options)
    _check_batch_size(batch_size)
    num_positions = -(-len(records) // batch_size) * batch_size
    return Batches(_in_order, num_positions, _Loader(source, options, records, {}, seed=None), batch_size, shared)


class _Loader:
    """Reads chunks of records. seed: of the fresh augmentations; None for evaluation."""

    def __init__(
        self,
        source: Source,
        options: DataOptions,
        records: Int[np.ndarray, "R 2"],
        extra: Mapping[str, Shaped[np.ndarray, "R ..."]],
        seed: int | None,
        augmentation: Augmentation = NONE,
    ):
        self.options = options
        self.unreadable: dict[int, str] = {}
        self._source = source
        self._records = records
        self._extra = extra
        self._seed = seed
        self._views = Views(options, augmentation, seed or 0)
        self._num_images = len(np.unique(records[:, 0]))

    def __call__(self, positions: Sequence[int], rows: Sequence[int]) -> Batch:
        """What is shown at these positions. A row beyond the last stands for a copy of that."""
        images = np.zeros((len(rows), *self.options.size, 3), np.float32)
        kind = self.options.label_maps
        maps = np.stack([kind.without_labels(self.options.size)] * len(rows)) if kind else None
        ids, labels, rows_read, weights = [], [], [], []
        for i, (position, row) in enumerate(zip(positions, rows, strict=True)):
            row_read, example = self._read(row)
            rows_read.append(row_read)
            ids.append(example["id"] if example else "")
            labels.append(example["label"] if example else -1)
            weights.append(example is not None and row_read == row)
            if example:
                index, view = map(int, self._records[row_read])
                if maps is None:
                    images[i] = self._views.of_image(example["image"], position, index, view)
                else:
                    pair = self._views.of_pair(example["image"], example["label_map"], position, index, view)
                    images[i], maps[i] = pair
        batch = {
            "image": images,
            "label": np.array(labels, np.int32),
            "index": self._records[rows_read, 0].astype(np.int64),
            "view": self._records[rows_read, 1].astype(np.int32),
            **({} if maps is None else {"label_map": maps}),
            **{name: values[rows_read] for name, values in self._extra.items()},
        }
        if self._seed is None:
            batch |= {"id": np.array(ids, object), "weight": np.array(weights, np.float32)}
        return batch

    def _read(self, row: int) -> tuple[int, Example | None]:
        """A row and its example. For an unreadable one: training reads the next row instead, evaluation gets None."""
        row = min(row, len(self._records) - 1)
        while True:
            index = int(self._records[row, 0])
            if index not in self.unreadable:
                try:
                    return row, self._source[index]
                except UnreadableImage as error:
                    if self.options.on_error == "raise":
                        remedy = "replace the file, or leave such images out with data.on_error='skip'"
                        raise UnreadableImage(f"{error}; {remedy}") from error
                    self._leave_out(index, str(error))
            if self._seed is None:
                return row, None
            if len(self.unreadable) == self._num_images:
                raise InputError(
                    f"none of the {self._num_images} images can be read; one of them: {self.unreadable[index]}"
                )
            row = (row + 1) % len(self._records)

    def _leave_out(self, index: int, reason: str) -> None:
        if self.unreadable.setdefault(index, reason) is reason:  # one atomic step: several threads may come here
            logger.warning("Left out: %s", reason)


def _concatenate(parts: Sequence[Batch]) -> Batch:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it must be at least 1")


def _all_records(source: Source, view: int) -> Int[np.ndarray, "R 2"]:
    return np.stack([np.arange(len(source)), np.full(len(source), view)], axis=1)


def _check_records(records: Int[np.ndarray, "R 2"], source: Source, options: DataOptions) -> None:
    wrong = (records[:, 0] >= len(source)) | (records < 0).any(axis=1)
    if wrong.any():
        index, view = records[wrong][0]
        raise InputError(f"record (index {index}, view {view}) does not exist: the source has {len(source)} images")
    if options.augment == "none" and records[:, 1].any():
        raise InputError(f"records have view {records[:, 1].max()}; with data.augment 'none' there is only view 0")
