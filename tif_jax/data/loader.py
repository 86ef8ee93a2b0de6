"""Batches of views of images, read and preprocessed by threads, and by worker processes where threads are not enough.

A record is (index, view): the image at `index` of the source, and which picture of it. View 0 is the evaluation view;
view v > 0 is an augmentation drawn from (index, v) and nothing else, so that impacts scored once fit every later run.

Legend: B images of a batch, R records, Y rows, X columns.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from jaxtyping import Float32, Int, Shaped, UInt8
from PIL import Image

from tif_jax.data.augment import Augmentation
from tif_jax.data.options import DataOptions, Settings, read_options
from tif_jax.data.preprocess import NONE, augmented_view, evaluation_view, normalise
from tif_jax.data.source import Example, Source, UnreadableImage
from tif_jax.errors import InputError

logger = logging.getLogger(__name__)

FRESH = -1  # in place of a view: an augmentation drawn anew whenever the image comes round

_ROWS_PER_TASK = 32
_ENDLESS = 10**9  # epochs: Grain's own endless repetition can not be batched in ones

Batch = dict[str, Any]


class Batches:
    """An iterator over batches that knows where it is. Close it when done, so that its threads end.

    Where a run has several processes, each gets its rows of every batch, in the order of the processes: together they
    see what one process alone would.
    """

    def __init__(self, rows: Callable[[int], int], num_rows: int, load: "_Loader", batch_size: int, shared: bool):
        """rows: from a position among num_rows, batch after batch, to a row of the records."""
        self.unreadable = load.unreadable  # index -> error of each image left out so far (data.on_error='skip')
        processes, process = (jax.process_count(), jax.process_index()) if shared else (1, 0)
        if batch_size % processes:
            raise InputError(f"a batch of {batch_size} can not be divided over {processes} processes")
        # A thread's task is a few rows at once: handing over small images one by one takes longer than reading them.
        num_rows_of_task = math.gcd(batch_size // processes, _ROWS_PER_TASK)
        self._tasks = batch_size // processes // num_rows_of_task  # of a batch, in this process
        self._read = _Task(load, rows, num_rows_of_task, self._tasks, processes, process)
        self._num_batches = num_rows // batch_size
        self._iterator = self._from(0)

    def _from(self, batch: int) -> Any:
        import grain

        self._next = batch
        options = self._read.load.options
        tasks = grain.MapDataset.range(batch * self._tasks, self._num_batches * self._tasks).map(self._read)
        ahead = max(options.num_workers, 2 * self._tasks)
        results = tasks.to_iter_dataset(grain.ReadOptions(options.num_workers, prefetch_buffer_size=ahead))
        if options.worker_processes:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain's worker processes ask for flags, which we do not use
            workers = grain.MultiprocessingOptions(
                options.worker_processes, per_worker_buffer_size=-(-ahead // options.worker_processes)
            )
            results = results.mp_prefetch(workers)
        return iter(results.batch(self._tasks, batch_fn=_concatenate))

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
class _Task:
    """Reads this process's t-th few rows, counted through all batches."""

    load: "_Loader"
    rows: Callable[[int], int]
    num_rows: int
    per_batch: int  # in each process
    num_processes: int
    process: int

    def __call__(self, task: int) -> Batch:
        batch, task = divmod(task, self.per_batch)
        first = self.num_rows * ((batch * self.num_processes + self.process) * self.per_batch + task)
        return self.load(first, np.array([self.rows(position) for position in range(first, first + self.num_rows)]))


@dataclasses.dataclass(frozen=True)
class _Shuffled:
    """The row of the records at a position of endless epochs. (No closure: worker processes get it.)"""

    order: Any  # a permutation of the rows for each epoch, by position
    num_rows: int
    repeats: int

    def __call__(self, position: int) -> int:
        epoch, place = divmod(position, self.num_rows)
        return self.order[epoch * self.num_rows + place // self.repeats]


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

    A batch: image float32 (B, Y, X, 3), label int32 (B,), index int64 (B,), view int32 (B,), and the rows of `extra`
    that belong to its records. Without `records`, every image of the source once an epoch, freshly augmented (view
    FRESH) unless data.augment is 'none' (view 0); augmentation says what is done to it beyond. repeats: an epoch has as
    many rows, but that many times fewer images, each so many times in a row (Hoffer et al. 2020). With
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
    order = grain.MapDataset.range(len(records)).shuffle(seed).repeat(_ENDLESS)
    load = _Loader(source, options, records, extra or {}, seed, augmentation)
    rows = _Shuffled(order, len(records), repeats)
    return Batches(rows, len(records) * _ENDLESS, load, batch_size, shared=True)


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
    num_rows = -(-len(records) // batch_size) * batch_size
    return Batches(_in_order, num_rows, _Loader(source, options, records, {}, seed=None), batch_size, shared)


class _Loader:
    """Reads records, several at a time. seed: of the fresh augmentations; None for evaluation."""

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
        self._augmentation = augmentation
        self._num_images = len(np.unique(records[:, 0]))

    def __call__(self, first: int, rows: Int[np.ndarray, " b"]) -> Batch:
        """A few rows, the first of which is the first-th of all. Rows beyond the last stand for copies of it."""
        images = np.zeros((len(rows), *self.options.size, 3), np.float32)
        ids, labels, used, weights = [], [], [], []
        for i, row in enumerate(rows.tolist()):
            row, example = self._read(row)
            used.append(row)
            ids.append(example["id"] if example else "")
            labels.append(example["label"] if example else -1)
            weights.append(example is not None and row == rows[i])
            if example:
                # first + i counts through all epochs, so that every epoch has augmentations of its own.
                images[i] = self._view(example["image"], first + i, *map(int, self._records[row]))
        batch = {
            "image": images,
            "label": np.array(labels, np.int32),
            "index": self._records[used, 0].astype(np.int64),
            "view": self._records[used, 1].astype(np.int32),
            **{name: values[used] for name, values in self._extra.items()},
        }
        if self._seed is None:
            batch |= {"id": np.array(ids, object), "weight": np.array(weights, np.float32)}
        return batch

    def _read(self, row: int) -> tuple[int, Example | None]:
        """A row and its example: this one, or where it is unreadable, for training the next, for evaluation None."""
        row = min(row, len(self._records) - 1)
        while True:
            index = int(self._records[row, 0])
            if index not in self.unreadable:
                try:
                    return row, self._source[index]
                except UnreadableImage as error:
                    if self.options.on_error == "raise":
                        raise
                    self._leave_out(index, str(error))
            if self._seed is None:
                return row, None
            if len(self.unreadable) == self._num_images:
                raise InputError(
                    f"none of the {self._num_images} images can be read; one of them: {self.unreadable[index]}"
                )
            row = (row + 1) % len(self._records)

    def _view(
        self, image: Image.Image | UInt8[np.ndarray, "_ _ 3"], position: int, index: int, view: int
    ) -> Float32[np.ndarray, "Y X 3"]:
        size, mean, std = self.options.size, self.options.mean, self.options.std
        if view == 0 and self.options.crop_fraction == 1 and isinstance(image, np.ndarray) and image.shape[:2] == size:
            return normalise(image, mean, std)  # is its own evaluation view
        image = image if isinstance(image, Image.Image) else Image.fromarray(image)
        if view == 0:
            return evaluation_view(image, size, self.options.crop_fraction, mean, std)
        # The first number keeps the two families of streams apart.
        if view == FRESH:
            rng = np.random.default_rng((0, self._seed or 0, position))
            return augmented_view(image, size, rng, mean, std, augmentation=self._augmentation)
        return augmented_view(image, size, np.random.default_rng((1, index, view)), mean, std)

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
