"""Records of TFRecord files by position, without TensorFlow.

A record is the length of its data (8 bytes, little-endian), the checksum of these 8 bytes, the data and the checksum of
the data; a checksum is a rotated CRC-32C. Where records begin is written nowhere, so a file's lengths are followed once
from its beginning to its end, and what was found is kept in ~/.cache/tif_jax. For files like ImageNet's (1,024 with
1,281,167 records) that is 12 s with the files in memory, half a minute from an SSD, and then 1 s; it takes 10 MB.

A file is a path, or a URL (gs://...) that fsspec can read.
"""

import bisect
import hashlib
import io
import itertools
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol, runtime_checkable

import google_crc32c
import numpy as np
from jaxtyping import Int64

from tif_jax.data import remote
from tif_jax.data.source import UnreadableImage
from tif_jax.errors import InputError, WorkError
from tif_jax.runtime import files
from tif_jax.runtime.progress import Progress

Index = Int64[np.ndarray, " _"]

_HEADER = struct.Struct("<QI")  # length of the data, checksum of these 8 bytes
_CHECKSUM = struct.Struct("<I")
_CACHE = "~/.cache/tif_jax/tfrecord"
_NUM_THREADS = 8  # that make indices: more do not make an SSD faster
_REMEDY = "copy or prepare the data set again"


@runtime_checkable
class Shard(Protocol):
    """Which records of a file; TFDS's FileInstruction."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class TFRecords:
    """The records of shards one after another, by position; safe to read from many threads.

    Raises InputError for a file that is missing, cut short, no TFRecord file or of another number of records.
    A record whose data do not have their checksum is an UnreadableImage when it is read.
    """

    def __init__(self, shards: Sequence[Shard]):
        self._shards = [(shard.filename, shard.skip) for shard in shards]
        self._indices = _indices(list({shard.filename: None for shard in shards}))
        for shard in shards:
            if (found := len(self._indices[shard.filename]) - 1) != shard.examples_in_shard:
                raise InputError(
                    f"{shard.filename} holds {found} records, and dataset_info.json says {shard.examples_in_shard}; "
                    f"{_REMEDY}"
                )
        self._starts = list(itertools.accumulate((shard.take for shard in shards), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, position: int) -> bytes:
        position = range(len(self))[position]
        number = bisect.bisect_right(self._starts, position) - 1
        file, skip = self._shards[number]
        record = skip + position - self._starts[number]
        start, end = self._indices[file][record : record + 2].tolist()
        start += _HEADER.size
        read = _read(file, start, end - start)
        data, checksum = read[: -_CHECKSUM.size], read[-_CHECKSUM.size :]
        if len(read) != end - start or _CHECKSUM.unpack(checksum) != (_masked_crc(data),):
            raise UnreadableImage(
                f"record {record} of {file} is damaged: its data do not have the checksum that was written with them"
            )
        return data


def _indices(files: Sequence[str]) -> dict[str, Index]:
    """Of each file where its records begin and, as the last number, where it ends."""
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        notes = dict(zip(files, threads.map(_note, files), strict=True))
        noted = zip(notes, threads.map(_noted, notes.values()), strict=True)
        indices = {file: index for file, index in noted if index is not None}
        if new := [file for file in notes if file not in indices]:
            with Progress("index of TFRecord files", len(new), "file") as progress:
                for file, index in zip(new, threads.map(_make_index, new), strict=True):
                    indices[file] = index
                    _keep(notes[file], index)
                    progress.update(1)
    return indices


def _note(file: str) -> Path:
    """Where the index of the file, as it is now, is kept."""
    try:
        state = _state(file)
    except FileNotFoundError:
        raise InputError(f"no such file: {file}; {_REMEDY}") from None
    return Path(os.path.expanduser(_CACHE), hashlib.sha256(state.encode()).hexdigest()[:40] + ".npy")


def _noted(note: Path) -> Index | None:
    try:
        return np.load(note)
    except (OSError, ValueError, EOFError):  # not there, or damaged
        return None


def _state(file: str) -> str:
    """Which file this is, and that it has not changed since."""
    if remote.is_url(file):
        filesystem, name = remote.open_filesystem(file)
        with remote.failures(file):
            return f"{file} {filesystem.ukey(name)}"
    stat = os.stat(file)
    return f"{os.path.realpath(file)} {stat.st_size} {stat.st_mtime_ns}"


def _make_index(file: str) -> Index:
    with _opened(file) as (size, read):
        starts = [0]
        while (start := starts[-1]) < size:
            number = len(starts) - 1
            header = read(start, _HEADER.size)
            if len(header) == _HEADER.size:
                length, checksum = _HEADER.unpack(header)
                if checksum != _masked_crc(header[:8]):
                    raise InputError(
                        f"{file} is no TFRecord file, or damaged: at byte {start}, where record {number} should begin, "
                        f"there is no length with its checksum; {_REMEDY}"
                    )
                starts.append(start + _HEADER.size + length + _CHECKSUM.size)
            if len(header) < _HEADER.size or starts[-1] > size:
                raise InputError(f"{file} is cut short: it ends in record {number}, at byte {size}; {_REMEDY}")
    return np.array(starts, np.int64)


def _keep(note: Path, index: Index) -> None:
    """Saves an index for the next time. Where it can not, the next time takes as long."""
    buffer = io.BytesIO()
    np.save(buffer, index)
    with suppress(InputError, WorkError):
        files.write(note, buffer.getvalue())


@contextmanager
def _opened(file: str) -> Iterator[tuple[int, Callable[[int, int], bytes]]]:
    """The size of a file, and a function that reads (start, length) of it: fast if starts ascend."""
    if remote.is_url(file):
        filesystem, name = remote.open_filesystem(file)
        # Blocks of many records: a request for every length would take longer than all the data.
        with remote.failures(file), filesystem.open(name, "rb", block_size=2**23, cache_type="readahead") as opened:
            yield opened.size, lambda start, length: (opened.seek(start), opened.read(length))[1]
        return
    descriptor = os.open(file, os.O_RDONLY)
    try:
        yield os.fstat(descriptor).st_size, lambda start, length: os.pread(descriptor, length, start)
    finally:
        os.close(descriptor)


def _read(file: str, start: int, length: int) -> bytes:
    if remote.is_url(file):
        filesystem, name = remote.open_filesystem(file)
        with remote.failures(file):
            return filesystem.cat_file(name, start, start + length)
    # Opened for every record, which takes 5 microseconds: ImageNet has as many files as a process may often have open.
    try:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            return os.pread(descriptor, length, start)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UnreadableImage(f"can not read {file}: {error.strerror}; {_REMEDY}") from error


def _masked_crc(data: bytes) -> int:
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
