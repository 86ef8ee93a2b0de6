"""Batches of views of images, read and preprocessed by threads.

A record is (index, view): the image at `index` of the source, and which picture of it. View 0 is the evaluation view;
view v > 0 is an augmentation drawn from (index, v) and nothing else, so that impacts scored once fit every later run.

Legend: B images of a batch, R records, Y rows, X columns.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Int, Shaped
from PIL import Image

from tif_jax.data.options import DataOptions, Settings, read_options
from tif_jax.data.preprocess import augmented_view, evaluation_view
from tif_jax.data.source import Source, UnreadableImage
from tif_jax.errors import InputError

logger = logging.getLogger(__name__)

FRESH = -1  # in place of a view: an augmentation drawn anew whenever the image comes round

Batch = dict[str, Any]


class Batches:
    """An iterator over batches that knows where it is. Close it when done, so that its threads end."""

    def __init__(self, order: Any, load: "_Loader", batch_size: int, stack: Callable[[Sequence[Batch]], Batch]):
        import grain

        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; it must be at least 1")
        self.unreadable = load.unreadable  # index -> error of each image left out so far (data.on_error='skip')
        read = grain.ReadOptions(num_threads=load.options.num_workers, prefetch_buffer_size=2 * batch_size)
        self._iterator = iter(order.map_with_index(load).to_iter_dataset(read).batch(batch_size, batch_fn=stack))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, int]:
        """Where the next batch begins; JSON-serialisable."""
        return self._iterator.get_state()

    def set_state(self, state: dict[str, int]) -> None:
        """Goes where `get_state` was called on an iterator made with the same arguments."""
        self._iterator.set_state(state)

    def close(self) -> None:
        """Ends the threads. No batch can be read afterwards."""
        self._iterator.close()


def training_batches(
    source: Source,
    data: Settings,
    *,
    batch_size: int,
    seed: int,
    records: Int[np.ndarray, "R 2"] | None = None,
    extra: Mapping[str, Shaped[np.ndarray, "R ..."]] | None = None,
) -> Batches:
    """Endless batches, every epoch in a new order drawn from `seed`; a batch may span two epochs.

    A batch: image float32 (B, Y, X, 3), label int32 (B,), index int64 (B,), view int32 (B,), and the rows of `extra`
    that belong to its records. Without `records`, every image of the source once an epoch, freshly augmented (view
    FRESH) unless data.augment is 'none' (view 0).
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
    load = _Loader(source, options, records, extra or {}, seed=seed, endless=True)
    order = grain.MapDataset.range(len(records)).shuffle(seed).repeat()
    return Batches(order, load, batch_size, _stack)


def evaluation_batches(
    source: Source,
    data: Settings,
    *,
    batch_size: int,
    records: Int[np.ndarray, "R 2"] | None = None,
) -> Batches:
    """Every record once, in order; without `records`, the evaluation view of every image.

    A batch is as in `training_batches`, with id, a list of B strings, and weight float32 (B,): 1, or 0 for the copies
    of the last image that fill the last batch.
    """
    import grain

    options = read_options(data)
    if records is None:
        records = _all_records(source, 0)
    else:
        _check_records(records, source, options)
    load = _Loader(source, options, records, {}, seed=0, endless=False)

    def stack(rows: Sequence[Batch]) -> Batch:
        padded = [*rows, *[rows[-1]] * (batch_size - len(rows))]
        weight = (np.arange(batch_size) < len(rows)).astype(np.float32)
        return _stack(padded) | {"id": [row["id"] for row in padded], "weight": weight}

    return Batches(grain.MapDataset.range(len(records)), load, batch_size, stack)


class _Loader:
    """Reads the record in a row; `position` counts rows through all epochs. None stands for an unreadable image."""

    def __init__(
        self,
        source: Source,
        options: DataOptions,
        records: Int[np.ndarray, "R 2"],
        extra: Mapping[str, Shaped[np.ndarray, "R ..."]],
        seed: int,
        endless: bool,
    ):
        self.options = options
        self.unreadable: dict[int, str] = {}
        self._source = source
        self._records = records
        self._extra = extra
        self._seed = seed
        self._endless = endless
        self._num_images = len(np.unique(records[:, 0]))

    def __call__(self, position: int, row: int) -> Batch | None:
        index, view = map(int, self._records[row])
        try:
            example = self._source[index]
        except UnreadableImage as error:
            if self.options.on_error == "raise":
                raise
            self._leave_out(index, str(error))
            return None
        image = example["image"]
        image = image if isinstance(image, Image.Image) else Image.fromarray(image)
        return {
            "id": example["id"],
            "image": self._view(image, position, index, view),
            "label": np.int32(example["label"]),
            "index": np.int64(index),
            "view": np.int32(view),
            **{name: values[row] for name, values in self._extra.items()},
        }

    def _view(self, image: Image.Image, position: int, index: int, view: int) -> Float32[np.ndarray, "Y X 3"]:
        size, mean, std = self.options.size, self.options.mean, self.options.std
        if view == 0:
            return evaluation_view(image, size, self.options.crop_fraction, mean, std)
        # The first number keeps the two families of streams apart.
        entropy = (0, self._seed, position) if view == FRESH else (1, index, view)
        return augmented_view(image, size, np.random.default_rng(entropy), mean, std)

    def _leave_out(self, index: int, reason: str) -> None:
        if self.unreadable.setdefault(index, reason) is reason:  # one atomic step: several threads may come here
            logger.warning("Left out: %s", reason)
        if self._endless and len(self.unreadable) == self._num_images:
            raise InputError(f"none of the {self._num_images} images can be read; one of them: {reason}")


def _stack(rows: Sequence[Batch]) -> Batch:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0] if name != "id"}


def _all_records(source: Source, view: int) -> Int[np.ndarray, "R 2"]:
    return np.stack([np.arange(len(source)), np.full(len(source), view)], axis=1)


def _check_records(records: Int[np.ndarray, "R 2"], source: Source, options: DataOptions) -> None:
    wrong = (records[:, 0] >= len(source)) | (records < 0).any(axis=1)
    if wrong.any():
        index, view = records[wrong][0]
        raise InputError(f"record (index {index}, view {view}) does not exist: the source has {len(source)} images")
    if options.augment == "none" and records[:, 1].any():
        raise InputError(f"records have view {records[:, 1].max()}; with data.augment 'none' there is only view 0")
