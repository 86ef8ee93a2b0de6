"""Impact shards: the files between scoring and filter training, one parquet file per part of a data split.

    impact/manifest.json                    what was scored and how (`manifest`): written once, never changed
    impact/part-00017-of-00064.parquet      one row per example and view, in split order
    impact/part-00017-of-00064.json         its rows and sha256, renamed into place after it: now the part is complete
    impact/.part-00017-of-00064.begun       the rows so far of a part that is being scored, behind their sha256
    impact/.part-00017-of-00064.lock        held (flock) by the process that scores the part

Legend: R rows, N patch tokens.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int, Shaped

from tif_jax.errors import InputError, WorkError
from tif_jax.impact.manifest import read_manifest
from tif_jax.runtime import files, locks

logger = logging.getLogger(__name__)

StrPath = str | os.PathLike[str]

_RESUME = "run `tif score` again with the same config: it scores only the parts that are missing or damaged"
_TYPES = dict(  # of every column but impact
    index=pa.int64(), view=pa.int32(), id=pa.string(), label=pa.int32(), prediction=pa.int32(), loss=pa.float32()
)


@dataclass(frozen=True)
class ImpactTable:
    """Rows of impact shards."""

    index: Int[np.ndarray, " R"]  # position in the split; (index, view) is unique
    view: Int[np.ndarray, " R"]
    id: Shaped[np.ndarray, " R"]  # strings: file path or TFDS id
    label: Int[np.ndarray, " R"]  # -1 if there is none
    prediction: Int[np.ndarray, " R"]
    loss: Float[np.ndarray, " R"]  # nats, all tokens present
    impact: Float[np.ndarray, "R N"]  # nats, raster order, positive: the token helps; float32 or float16, as stored


def part_rows(num_rows: int, part: int, num_parts: int) -> range:
    """The rows of a part, counted from 1: contiguous, and the sizes of the parts differ by at most one."""
    if not 1 <= part <= num_parts:
        raise InputError(f"part is {part}/{num_parts}; it is K/N with 1 <= K <= N")
    return range(num_rows * (part - 1) // num_parts, num_rows * part // num_parts)


def write_part(directory: StrPath, part: int, num_parts: int, columns: Mapping[str, Any]) -> None:
    """Writes a part, counted from 1; whatever interrupts it, the part is complete or absent afterwards.

    columns: the fields of `ImpactTable`. Raises WorkError if an impact is not finite or the disk is full, InputError if
    the folder can not be written to.
    """
    data = _table_bytes(columns)
    path = _part_path(directory, part, num_parts)
    files.write(path, data)
    digest = hashlib.sha256(data).hexdigest()
    files.write(path.with_suffix(".json"), json.dumps({"rows": len(columns["index"]), "sha256": digest}).encode())
    with suppress(OSError):
        _hidden(path, "begun").unlink(missing_ok=True)


def write_begun(directory: StrPath, part: int, num_parts: int, columns: Mapping[str, Any]) -> None:
    """Keeps the rows so far of a part; `write_part` removes them. Arguments and errors as there."""
    data = _table_bytes(columns)
    digest = hashlib.sha256(data).hexdigest().encode()
    files.write(_hidden(_part_path(directory, part, num_parts), "begun"), digest + data)


def read_begun(directory: StrPath, part: int, num_parts: int) -> dict[str, np.ndarray] | None:
    """The columns that `write_begun` kept; None if there are none or they are damaged."""
    path = _hidden(_part_path(directory, part, num_parts), "begun")
    if not path.exists():
        return None
    content = files.read(path)
    digest, data = content[:64], content[64:]
    if hashlib.sha256(data).hexdigest().encode() != digest:
        logger.warning("%s is damaged: its rows are scored again", path)
        return None
    return vars(_parse(path, data))


@contextmanager
def lock_part(directory: StrPath, part: int, num_parts: int) -> Iterator[bool]:
    """Whether the part is this process's to score: False while another process holds it. A lock ends with its process.

    Where the file system knows no locks (some mounted buckets; Windows) the answer is always True: then two jobs started
    by mistake do the same work, and write the same files.
    """
    path = _hidden(_part_path(directory, part, num_parts), "lock")
    with locks.lock(path) as ours:
        if ours:
            for abandoned in path.parent.glob(f".*{path.stem.removeprefix('.')}.*.tmp"):  # by a writer that was killed
                abandoned.unlink(missing_ok=True)
        yield ours is not False


def tidy(directory: StrPath, part: int, num_parts: int) -> None:
    """Removes what a job that was killed left beside a part that is finished: its lock, the rows it had begun with."""
    path = _part_path(directory, part, num_parts)
    for left in path.parent.glob(f".{path.stem}.*"):
        with suppress(OSError):
            left.unlink(missing_ok=True)


def missing_parts(directory: StrPath, num_parts: int, verify: bool = True) -> list[int]:
    """The parts, counted from 1, that are still to be scored: absent or (with `verify`) damaged, which is logged."""
    return [part for part in range(1, num_parts + 1) if is_missing(directory, part, num_parts, verify)]


def is_missing(directory: StrPath, part: int, num_parts: int, verify: bool = True) -> bool:
    """Whether one part is; see `missing_parts`."""
    path = _part_path(directory, part, num_parts)
    if not (path.exists() and path.with_suffix(".json").exists()):
        return True
    if damaged := verify and not _is_whole(path, files.read(path)):
        logger.warning("%s is damaged (its sha256 is not that of its .json) and counts as missing", path)
    return damaged


def iter_impact(
    path: StrPath, *, verify: bool = True, expected: Mapping[str, Any] | None = None
) -> Iterator[ImpactTable]:
    """The rows of one part after the other, with one part in memory at a time.

    path: a workdir or its impact folder. verify: check digests. expected: entries that the manifest must have, such as
    {"backbone": backbone_digest(params)}. Raises InputError naming what is missing, damaged or does not match.
    """
    directory = Path(path) / "impact" if (Path(path) / "impact").is_dir() else Path(path)
    manifest = read_manifest(directory, expected)
    if missing := missing_parts(directory, manifest["num_parts"], verify=False):
        parts = ", ".join(map(str, missing[:10])) + ", ..." * (len(missing) > 10)
        raise InputError(f"{directory} lacks {len(missing)} of {manifest['num_parts']} parts: {parts}; {_RESUME}")
    return _iter_parts(directory, manifest, verify)


def read_impact(path: StrPath, *, verify: bool = True, expected: Mapping[str, Any] | None = None) -> ImpactTable:
    """All rows of a workdir or impact folder, sorted by (index, view); InputError if there are none.

    Arguments and other errors as in `iter_impact`.
    """
    parts = [vars(part).values() for part in iter_impact(path, verify=verify, expected=expected)]
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    if not len(columns[0]):
        raise InputError(f"{path} has no impacts: none of the images could be read when they were to be scored")
    order = np.lexsort((columns[1], columns[0]))
    return ImpactTable(*(column[order] for column in columns))


def _iter_parts(directory: Path, manifest: Mapping[str, Any], verify: bool) -> Iterator[ImpactTable]:
    num_examples, views, num_tokens = (manifest[key] for key in ("num_examples", "views", "num_tokens"))
    seen = np.zeros(num_examples * views, bool)
    for part in range(1, manifest["num_parts"] + 1):
        path = _part_path(directory, part, manifest["num_parts"])
        data = files.read(path)
        if verify and not _is_whole(path, data):
            raise InputError(f"{path} is damaged (its sha256 is not that of its .json); {_RESUME}")
        table = _parse(path, data)
        inside = (0 <= table.index) & (table.index < num_examples) & (0 <= table.view) & (table.view < views)
        rows, counts = np.unique(table.index * views + table.view, return_counts=True)
        if not inside.all():
            raise InputError(f"{path} goes beyond {num_examples} examples x {views} views; delete it, then {_RESUME}")
        if (again := rows[(counts > 1) | seen[rows]]).size:
            example, view = divmod(int(again[0]), views)
            raise InputError(f"{path} repeats example {example}, view {view}; delete it, then {_RESUME}")
        if table.impact.shape[1] != num_tokens or not np.isfinite(table.impact).all():
            raise InputError(f"{path} needs {num_tokens} finite impacts a row; delete it, then {_RESUME}")
        seen[rows] = True
        yield table


def _table_bytes(columns: Mapping[str, Any]) -> bytes:
    impact = np.asarray(columns["impact"])
    assert impact.dtype in (np.float32, np.float16) and columns.keys() == {*_TYPES, "impact"}
    if (bad := ~np.isfinite(impact).all(axis=1)).any():
        raise WorkError(
            f"impact of {columns['id'][int(bad.argmax())]} is not finite: do the backbone's weights overflow?"
        )
    arrays = {name: pa.array(np.asarray(columns[name], kind.to_pandas_dtype()), kind) for name, kind in _TYPES.items()}
    arrays["impact"] = pa.FixedSizeListArray.from_arrays(pa.array(impact.reshape(-1)), impact.shape[1])
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table(arrays), buffer, compression="zstd", use_dictionary=False)
    return buffer.getvalue().to_pybytes()


def _parse(path: Path, data: bytes) -> ImpactTable:
    try:
        columns = pq.ParquetFile(pa.BufferReader(data)).read()
        impact = columns["impact"].combine_chunks()
        values = impact.flatten().to_numpy().reshape(-1, impact.type.list_size)
        return ImpactTable(**{name: columns[name].to_numpy() for name in _TYPES}, impact=values)
    except (pa.ArrowException, OSError, KeyError) as error:
        raise InputError(f"{path} is damaged (not an impact part); delete it, then {_RESUME}") from error


def _part_path(directory: StrPath, part: int, num_parts: int) -> Path:
    return Path(directory) / f"part-{part:05}-of-{num_parts:05}.parquet"


def _hidden(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.stem}.{suffix}")


def _is_whole(path: Path, data: bytes) -> bool:
    try:
        return json.loads(files.read(path.with_suffix(".json")))["sha256"] == hashlib.sha256(data).hexdigest()
    except (ValueError, KeyError, TypeError):  # the .json itself is damaged
        return False
