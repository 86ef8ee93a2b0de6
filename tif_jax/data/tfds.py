"""Data sets prepared by TensorFlow Datasets, read without TensorFlow."""

import bisect
import dataclasses
import itertools
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from tif_jax.data import remote
from tif_jax.data.classes import ClassIndex, names_by_output, outputs
from tif_jax.data.label_maps import LabelMaps, read_numbers
from tif_jax.data.pictures import described, read_image
from tif_jax.data.source import Example, LabelMap, UnreadableImage
from tif_jax.data.tfrecord import TFRecords
from tif_jax.errors import InputError, WorkError
from tif_jax.runtime import once, records
from tif_jax.tasks import SEGMENTATION

logger = logging.getLogger(__name__)


class Tfds:
    """A split of the data set `name` ('name', 'name/config' or 'name/config:version') prepared under `data_dir`.

    `split` is TFDS's: 'train', 'train[:90%]', 'train+validation'. The format is array_record or TFRecord; of TFRecord
    files, data_dir may also be a URL (gs://bucket/folder). An example's id is TFDS's own: file name, two underscores,
    position in the file; those of TFRecord files are what they are once converted to array_record, so that impacts scored on
    either belong to the same ids. Labels are TFDS's or what `class_index` has for their names or numbers; without a label
    feature all are -1. With `label_maps`, the name of a feature (a Tensor, or an Image with one channel) and what it says,
    examples have label maps instead, and class_index is not read.
    """

    def __init__(
        self,
        name: str,
        data_dir: str | os.PathLike,
        split: str,
        class_index: ClassIndex | None = None,
        label_maps: tuple[str, LabelMaps] | None = None,
    ):
        import tensorflow_datasets as tfds

        self._map, self._maps = "", label_maps and label_maps[1]
        if remote.is_url(data_dir):
            remote.open_filesystem(str(data_dir))  # says what is missing
        with remote.failures(str(data_dir)):
            folder = _prepared_folder(name, data_dir)
            with _damage_named(folder):
                _check_classes(json.loads((folder / "features.json").read_text()))
                builder: Any = tfds.builder_from_directory(str(folder))
                info = builder.info
                self._image, self._label = _feature_names(info, tfds, bool(label_maps))
                if label_maps:
                    self._map, self._maps = _map_feature(info, tfds, *label_maps)
                names = list(info.features[self._label].names) if self._label else []
        is_tfrecord = info.file_format == tfds.core.FileFormat.TFRECORD
        if not is_tfrecord and info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
            raise InputError(
                f"{folder} is prepared as {info.file_format.value}, and only array_record and tfrecord can be read; "
                f"prepare it again: tfds.builder({info.name!r}, file_format='array_record').download_and_prepare()"
            )
        if not is_tfrecord and remote.is_url(data_dir):
            raise InputError(f"{folder} is prepared as array_record, which is read from local files; {remote.LOCALLY}")
        known = ", ".join(info.splits)
        try:
            shards = info.splits[split].file_instructions
        except (ValueError, KeyError) as error:
            raise InputError(
                f"{folder} has no split {split!r}; it has: {known or 'none'}, and parts as in train[:90%]"
            ) from error
        if not shards:
            raise InputError(f"split {split!r} of {folder} holds no examples")
        self._outputs, self.class_names = _numbered(names, None if label_maps else class_index)
        if self._maps:
            self.class_names = self._maps.class_names
        self.num_classes = len(self.class_names)
        self._shards = [(os.path.basename(shard.filename), shard.skip) for shard in shards]
        self._starts = list(itertools.accumulate((shard.take for shard in shards), initial=0))
        skips = [skip for _, skip in self._shards]  # and no names of files, which differ between formats
        labels: Any = [self._map, dataclasses.asdict(self._maps)] if self._maps else self._outputs
        self.fingerprint = records.digest([info.full_name, list(info.splits), skips, self._starts, labels])
        self._features = info.features
        self._decoders = {self._image: tfds.decode.SkipDecoding()}
        if self._maps and isinstance(info.features[self._map], tfds.features.Image):
            self._decoders[self._map] = tfds.decode.SkipDecoding()
        self._records = TFRecords(shards) if is_tfrecord else _array_records(shards)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Example:
        number = bisect.bisect_right(self._starts, index) - 1
        file, skip = self._shards[number]
        name = f"{file}__{skip + index - self._starts[number]}"
        try:
            record = self._records[index]
            example = self._features.deserialize_example_np(record, decoders=self._decoders)
            image, label = example[self._image], self._output_of(int(example[self._label])) if self._label else -1
        except (InputError, WorkError, MemoryError):
            raise
        except Exception as error:  # of array_record's reader, of protobuf, of TFDS
            raise UnreadableImage(f"can not read {name}: the record is damaged ({described(error):.200})") from error
        made = Example(id=name.replace(".tfrecord-", ".array_record-"), image=read_image(image, name), label=label)
        if self._maps:
            made["label_map"] = _label_map(example[self._map], self._maps, name, made["image"])
        return made

    def _output_of(self, label: int) -> int:
        return self._outputs[label] if 0 <= label < len(self._outputs) else label


def _numbered(names: Sequence[str], class_index: ClassIndex | None) -> tuple[list[int], tuple[str, ...]]:
    """The output of each label of the data set, and the name of each output."""
    if class_index is None:
        return list(range(len(names))), tuple(names)
    keys = {name: name if name in class_index else str(i) for i, name in enumerate(names)}
    found = outputs(names, {name: class_index[key] for name, key in keys.items() if key in class_index}, what="label")
    return [found[name] for name in names], names_by_output(found)


def _array_records(shards: Sequence[Any]) -> Any:
    import resource

    from array_record.python.array_record_data_source import ArrayRecordDataSource

    for shard in shards:
        if not os.path.isfile(shard.filename):
            raise InputError(f"no such file: {shard.filename}; prepare or copy the data set again")
        if shard.examples_in_shard > os.path.getsize(shard.filename):
            raise InputError(
                f"{shard.filename} can not hold the {shard.examples_in_shard} records that dataset_info.json says; prepare "
                "or copy the data set again"
            )
    # Every file stays open once it has been read, and ImageNet has as many as a process may by default have open.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = soft + len(shards)
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )
    return ArrayRecordDataSource(shards)


def _prepared_folder(name: str, data_dir: str | os.PathLike) -> Any:
    """The one folder with a dataset_info.json that the name leads to."""
    root: Any = epath.Path(data_dir) if remote.is_url(data_dir) else Path(data_dir)
    if not root.is_dir():
        raise InputError(f"data.root {root} is not a folder; it must be TFDS's data_dir")
    folder = root / name.replace(":", "/")
    infos = [info for depth in ("", "*/", "*/*/") for info in sorted(folder.glob(f"{depth}dataset_info.json"))]
    if not infos:
        raise InputError(f"no data set prepared by TFDS in {folder}; prepare {name!r} there, or change data.root")
    if len(infos) > 1:
        found = ", ".join(str(info.parent.relative_to(root)) for info in infos)
        raise InputError(f"{name!r} may be any of {found} under {root}; set data.tfds_name to one of them")
    return infos[0].parent


def _check_classes(features: Any) -> None:
    """TFDS imports whatever module features.json names: a data set is to be data, and no code."""
    if isinstance(features, dict) and isinstance(name := features.get("pythonClassName", ""), str):
        if name and not name.startswith("tensorflow_datasets."):
            raise ValueError(f"features.json asks for code that is not TFDS's, {name}")
    for inner in features.values() if isinstance(features, dict) else features if isinstance(features, list) else ():
        _check_classes(inner)


@contextmanager
def _damage_named(folder: Any) -> Iterator[None]:
    """Makes an InputError of what TFDS has against the files that describe a data set."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # of protobuf, of TFDS, of what they call
        if remote.is_url(folder):
            raise  # it may be the network
        raise InputError(
            f"{folder}: dataset_info.json or features.json is damaged ({described(error):.200}); copy or prepare the "
            "data set again"
        ) from error


def _map_feature(info: Any, tfds: Any, name: str, label_maps: LabelMaps) -> tuple[str, LabelMaps]:
    """The name of the feature with the label maps, and what they say. InputError if it can not hold such."""
    feature: Any = dict(info.features).get(name)
    shape: tuple[int | None, ...] = getattr(feature, "shape", None) or ()
    plane = len(shape) == 2 or (len(shape) == 3 and shape[2] == 1)
    is_image = isinstance(feature, tfds.features.Image)
    whole = is_image and feature.np_dtype.kind == "u"
    if not plane or not (whole if is_image else type(feature) is tfds.features.Tensor):
        raise InputError(
            f"data.label_map is {name!r}, and a label map is a Tensor or a PNG Image with one number per pixel; data set "
            f"{info.name} has: {', '.join(sorted(info.features))}"
        )
    label_maps.check(feature.np_dtype, f"feature {name!r} of data set {info.name}")
    known = getattr(feature, "num_classes", None)  # of a LabeledImage
    if known and label_maps.kind == SEGMENTATION.name and not label_maps.class_index and not label_maps.num_classes:
        label_maps = dataclasses.replace(label_maps, num_classes=known)
    return name, label_maps


def _label_map(found: Any, label_maps: LabelMaps, name: str, image: Any) -> LabelMap:
    numbers = read_numbers(found, name, label_maps.kind) if isinstance(found, bytes) else np.asarray(found)
    label_map = label_maps.read(numbers.reshape(numbers.shape[:2]), name)
    if (image.height, image.width) != label_map.shape:
        raise InputError(
            f"the label map of {name} has {' x '.join(map(str, label_map.shape))} pixels (rows x columns), and its image "
            f"{image.height} x {image.width}: data.label_map names the feature with labels of the image"
        )
    return label_map


def _feature_names(info: Any, tfds: Any, with_maps: bool) -> tuple[str, str]:
    """Names of the image feature and of the label feature ('' if there is none, or labels are maps)."""
    image, label = (info.supervised_keys or ("image", "label"))[:2]
    features = dict(info.features)
    if not isinstance(features.get(image), tfds.features.Image):
        raise InputError(f"data set {info.name} has no image feature {image!r}; it has: {', '.join(features)}")
    if with_maps:
        return image, ""
    if label in features and not isinstance(features[label], tfds.features.ClassLabel):
        kind = type(features[label]).__name__
        once.warn(
            logger,
            f"labels of data set {info.name} are not read: feature {label!r} is a {kind}, no ClassLabel; if it "
            "is a label for every pixel, set data.label_map to its name",
        )
        return image, ""
    return image, label if label in features else ""
