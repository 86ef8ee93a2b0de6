"""Weights to an Orbax checkpoint or back to .safetensors; TFDS folders from TFRecord to array_record."""

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import safetensors.numpy

from tif_jax.commands import _arguments
from tif_jax.data import remote
from tif_jax.data.tfrecord import TFRecords
from tif_jax.errors import InputError, WorkError
from tif_jax.models import built_with
from tif_jax.models.params import params_of
from tif_jax.runtime import files
from tif_jax.runtime.progress import Progress
from tif_jax.training.checkpoints import Checkpoints, load_params
from tif_jax.training.state import State
from tif_jax.weights import described, hub, pretrained
from tif_jax.weights.layout import shortened
from tif_jax.weights.loading import TRAINING_HEADS, description_of, load_with_fields
from tif_jax.weights.where import checkpoint_directory, located

logger = logging.getLogger(__name__)

_INFO = "dataset_info.json"
# Records one by one, for random access. JPEG files do not get smaller: compression made writing a quarter as fast (230
# against 890 MB/s, one core) and, because it holds the interpreter's lock, threads no faster.
_WRITER_OPTIONS = "group_size:1,uncompressed"


def main(argv: list[str]) -> None:
    parser = _arguments.Parser(prog="tif convert", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "src",
        metavar="SRC",
        help="weights (a file, a folder, hf:OWNER/NAME), a checkpoint or workdir, or a TFDS folder with dataset_info.json",
    )
    parser.add_argument("dst", metavar="DST", help="what to make of it; nothing may be there yet")
    parser.add_argument(
        "--to",
        choices=_CONVERSIONS,
        help="default: orbax for a weight file, safetensors for a checkpoint, array_record for a TFDS folder",
    )
    arguments = parser.parse_args(argv)
    _arguments.log_to_stderr()
    for path in (arguments.src, arguments.dst):
        if remote.is_url(path):
            raise InputError(f"{path}: convert works on local files; {remote.LOCALLY}")
    src = hub.pinned(arguments.src) if hub.is_name(arguments.src) else located(arguments.src)
    dst = Path(arguments.dst).expanduser()
    possible = _possible(located(src))
    to = arguments.to or possible[0]
    if to not in possible:
        raise InputError(f"{src} can not be converted to {to}; allowed: {', '.join(possible)}")
    _CONVERSIONS[to](src, dst)
    logger.info("%s is written", dst)


def _possible(src: Path) -> tuple[str, ...]:
    """What SRC can be converted to, the default first. Raises InputError if that is nothing."""
    if not src.exists():
        raise InputError(f"no such file or folder: {src}")
    if src.is_file():
        if not pretrained.is_weight_file(src):
            raise InputError(f"{src} is not a weight file by its name; allowed: {', '.join(pretrained.READERS)}")
        return "orbax", "safetensors"
    if (src / _INFO).is_file():
        return ("array_record",)
    if below := sorted(str(info.parent) for depth in ("*/", "*/*/", "*/*/*/") for info in src.glob(depth + _INFO)):
        raise InputError(f"{src} holds data sets; give the folder of one: {shortened(below)}")
    try:
        checkpoint_directory(src)
    except InputError:
        raise InputError(
            f"{src} holds neither a checkpoint nor, prepared by TFDS, a data set ({_INFO}); SRC is a weight file or a "
            "folder with one of these"
        ) from None
    return ("safetensors",)


# Weights


def _to_orbax(src: str | Path, dst: Path) -> None:
    """DST/checkpoints, as a training stage leaves them."""
    with files.appearing(dst) as partial:
        model, fields = load_with_fields(src)
        with Checkpoints(partial / "checkpoints") as checkpoints:
            description = {
                "model": fields,
                "reducer": built_with(model)["reducer"],
                "config": {"init_from": model.origin or str(src)},
                **described.carried(description_of(src)),
            }
            checkpoints.save(State(jnp.int32(0), params_of(model), ()), description, {})


def _to_safetensors(src: str | Path, dst: Path) -> None:
    """The backbone alone, in timm's layout; what that leaves open is in the file's metadata."""
    if dst.suffix != ".safetensors":
        raise InputError(f"{dst} has to end in .safetensors")
    with files.appearing(dst) as partial:
        if located(src).is_file():
            model, fields = load_with_fields(src)
            params, said = params_of(model), description_of(src)
        else:
            params, stored = load_params(checkpoint_directory(Path(src)))
            fields, said = stored["model"], described.of_checkpoint(src, stored)
        left_out = [name for name in params if name == "reducer" or f"{name}/" in TRAINING_HEADS]
        if left_out:
            logger.warning("%s: left out, because timm's layout has no place for it: %s", dst, ", ".join(left_out))
        kept = {name: value for name, value in params.items() if name not in left_out}
        tensors, free = pretrained.to_tensors(kept, fields)
        alone = dataclasses.replace(said, reducer={}, reducer_digest="")
        partial.write_bytes(safetensors.numpy.save(tensors, metadata=described.metadata(alone, free)))


# Data


def _to_array_record(src: Path, dst: Path) -> None:
    """The same data set with each TFRecord file copied, record by record, to an array_record file."""
    import tensorflow_datasets as tfds

    info = tfds.builder_from_directory(str(src)).info
    if info.file_format != tfds.core.FileFormat.TFRECORD:
        raise InputError(f"{src} is prepared as {info.file_format.value}; only TFRecord is converted to array_record")
    with files.appearing(dst) as partial:
        partial.mkdir()
        shards = {name: split.file_instructions for name, split in info.splits.items() if split.num_examples}
        to_convert = {Path(shard.filename).name for of_split in shards.values() for shard in of_split}
        for path in src.iterdir():
            if path.is_file() and path.name not in to_convert:
                shutil.copy(path, partial)
        described = json.loads((src / _INFO).read_text()) | {"fileFormat": "array_record"}
        (partial / _INFO).write_text(json.dumps(described, indent=2))
        names = tfds.builder_from_directory(str(partial)).info.splits  # the names that TFDS will look for
        pairs = [
            (old, new.filename)
            for name in shards
            for old, new in zip(shards[name], names[name].file_instructions, strict=True)
        ]
        records = TFRecords([old for old, _ in pairs])
        start = 0
        with Progress("convert", len(records), "record") as progress:
            for old, new in pairs:
                _write_array_record(new, records, range(start, start + old.take))
                start += old.take
                progress.update(old.take)


def _write_array_record(path: str, records: TFRecords, positions: range) -> None:
    """Writes the records at these positions and makes sure that the file has them all."""
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

    try:
        writer = ArrayRecordWriter(path, _WRITER_OPTIONS)
        try:
            for position in positions:
                writer.write(records[position])
        finally:
            writer.close()
        reader = ArrayRecordReader(path)
        num_written = reader.num_records()
        reader.close()
    except RuntimeError as error:
        raise WorkError(f"{path} was not written: {error}; make room, then run the same command again") from None
    if num_written != len(positions):
        raise WorkError(f"{path} has {num_written} records, not the {len(positions)} written; check the disk")


_CONVERSIONS: dict[str, Callable[[Any, Path], None]] = {
    "orbax": _to_orbax,
    "safetensors": _to_safetensors,
    "array_record": _to_array_record,
}
