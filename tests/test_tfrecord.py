"""TFRecord files and TFDS folders of them: the same examples as from array_record, and damage that is named."""

import io
import os
import resource
import shutil
import struct
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from PIL import Image

from benchmarks.tfds_folder import crc32c, masked, tfrecord, write_tfds_folder
from tif_jax.data import open_source
from tif_jax.data import tfrecord as tfrecord_module
from tif_jax.data.loader import evaluation_batches
from tif_jax.data.source import UnreadableImage
from tif_jax.data.tfds import Tfds
from tif_jax.data.tfrecord import TFRecords
from tif_jax.errors import InputError, WorkError

RECORDS = [b"", b"one", bytes(range(256)), b"x" * 3_000]
SPLITS = ["train", "test", "train[2:5]", "train[1:]+test[:1]", "train[:50%]", "train[4:6]+train[:1]"]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Where indices are kept."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def shard(path, count, skip=0, take=None):
    return SimpleNamespace(
        filename=str(path), skip=skip, take=count - skip if take is None else take, examples_in_shard=count
    )


def write(path, records=RECORDS):
    path.write_bytes(b"".join(map(tfrecord, records)))
    return path


def features():
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict(
        {"image": tfds.features.Image(encoding_format="jpeg"), "label": tfds.features.ClassLabel(names=["a", "b"])}
    )


def example(i):
    buffer = io.BytesIO()
    Image.new("RGB", (6, 5), (20 * i, 0, 0)).save(buffer, "JPEG")
    return {"image": buffer.getvalue(), "label": i % 2}


def write_both(root):
    """`tiny` under root/tfrecord and root/array_record: train 3 + 4 examples, test 2. Returns the TFRecord files."""
    splits = {"train": [range(3), range(3, 7)], "test": [range(7, 9)]}
    splits = {name: [[example(i) for i in shard] for shard in shards] for name, shards in splits.items()}
    write_tfds_folder(root / "array_record" / "tiny" / "1.0.0", "array_record", splits, features())
    return write_tfds_folder(root / "tfrecord" / "tiny" / "1.0.0", "tfrecord", splits, features())


# Files ----------------------------------------------------------------------------------------------------------------


def test_reference_checksum():
    assert crc32c(b"123456789") == 0xE3069283  # the catalogue's check value
    assert crc32c(bytes(32)) == 0x8A9136AA and crc32c(b"\xff" * 32) == 0x62A8AB43  # RFC 3720, B.4
    assert masked(0) == 0xA282EAD8 and masked(1 << 15) == 0xA282EAD9


def test_records_by_position(tmp_path):
    path, other = write(tmp_path / "a"), write(tmp_path / "b", [b"last"])
    records = TFRecords([shard(path, 4), shard(other, 1)])
    assert [records[i] for i in range(len(records))] == [*RECORDS, b"last"]
    assert records[-1] == b"last"
    with pytest.raises(IndexError):
        records[5]
    parts = TFRecords([shard(path, 4, skip=2), shard(other, 1), shard(path, 4, skip=1, take=1)])
    assert [parts[i] for i in range(len(parts))] == [*RECORDS[2:], b"last", b"one"]


def test_many_threads_read_what_one_reads(tmp_path):
    records = [os.urandom(1 + i % 50) for i in range(500)]
    files = [write(tmp_path / str(i), records[i::5]) for i in range(5)]
    opened = TFRecords([shard(path, 100) for path in files])
    positions = np.random.default_rng(0).permutation(500).tolist() * 4
    with ThreadPoolExecutor(16) as threads:
        read = list(threads.map(opened.__getitem__, positions))
    assert read == [records[p // 100 + 5 * (p % 100)] for p in positions]


def test_no_file_stays_open(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    opened = TFRecords([shard(write(tmp_path / str(i)), 4) for i in range(20)])
    assert [opened[i] for i in range(80)] == RECORDS * 20
    assert len(os.listdir("/proc/self/fd")) == before


def test_index_is_made_once_and_again_for_a_changed_file(tmp_path, home, monkeypatch):
    path = write(tmp_path / "a")
    made = []
    make = tfrecord_module._make_index
    monkeypatch.setattr(tfrecord_module, "_make_index", lambda file: made.append(file) or make(file))
    for _ in range(3):
        assert TFRecords([shard(path, 4)])[2] == RECORDS[2]
    assert made == [str(path)]
    write(path, [b"now", b"two"])
    assert TFRecords([shard(path, 2)])[1] == b"two"
    assert len(made) == 2
    for note in home.rglob("*.npy"):
        note.write_bytes(note.read_bytes()[:-3])
    assert TFRecords([shard(path, 2)])[1] == b"two"
    assert len(made) == 3


def test_home_that_can_not_be_written(tmp_path, home):
    home.write_text("a file")
    assert TFRecords([shard(write(tmp_path / "a"), 4)])[1] == b"one"


@pytest.mark.parametrize("cut", [1, 5, 3_003, 3_015, 3_016 + 200])
def test_file_that_is_cut_short(tmp_path, cut):
    """In the last record's checksum, data, length; and in the record before."""
    path = write(tmp_path / "a")
    path.write_bytes(path.read_bytes()[:-cut])
    number = 2 if cut > 3_016 else 3
    with pytest.raises(InputError, match=rf"/a is cut short: it ends in record {number}, .*; copy or prepare"):
        TFRecords([shard(path, 4)])


def test_file_without_its_last_record(tmp_path):
    path = write(tmp_path / "a", RECORDS[:3])
    with pytest.raises(InputError, match=r"/a holds 3 records, and dataset_info.json says 4; copy or prepare"):
        TFRecords([shard(path, 4)])


@pytest.mark.parametrize("byte", [0, 7, 8, 11])
def test_damaged_length(tmp_path, byte):
    path = write(tmp_path / "a")
    content = bytearray(path.read_bytes())
    content[16 + byte] ^= 4  # of the second record
    path.write_bytes(content)
    with pytest.raises(
        InputError, match=r"/a is no TFRecord file, or damaged: at byte 16, where record 1 should begin"
    ):
        TFRecords([shard(path, 4)])


def test_other_files(tmp_path):
    (tmp_path / "text").write_text("not a TFRecord file")
    with pytest.raises(InputError, match=r"/text is no TFRecord file, or damaged: at byte 0"):
        TFRecords([shard(tmp_path / "text", 1)])
    with pytest.raises(InputError, match=r"no such file: .*/missing; copy or prepare"):
        TFRecords([shard(tmp_path / "missing", 1)])


@pytest.mark.parametrize("byte", [12, 14, 15, 18])  # data and their checksum
def test_damaged_data_are_one_record_less(tmp_path, byte):
    path = write(tmp_path / "a")
    content = bytearray(path.read_bytes())
    content[16 + byte] ^= 1
    path.write_bytes(content)
    records = TFRecords([shard(path, 4)])
    with pytest.raises(UnreadableImage, match=r"record 1 of .*/a is damaged: .*checksum"):
        records[1]
    assert records[2] == RECORDS[2]


def test_file_that_changes_while_it_is_open(tmp_path):
    path = write(tmp_path / "a")
    records = TFRecords([shard(path, 4)])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UnreadableImage, match="record 3 of"):
        records[3]
    path.unlink()
    with pytest.raises(UnreadableImage, match=r"can not read .*/a: No such file"):
        records[1]


# Folders --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_same_examples_as_from_array_record(tmp_path, split):
    write_both(tmp_path)
    ours, theirs = (
        [source[i] for i in range(len(source))]
        for source in (Tfds("tiny", tmp_path / kind, split) for kind in ("tfrecord", "array_record"))
    )
    assert [x["id"] for x in ours] == [x["id"] for x in theirs] and len(ours) > 1
    assert [x["label"] for x in ours] == [x["label"] for x in theirs]
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])


def test_images_come_through_the_loader(tmp_path):
    write_both(tmp_path)
    data = {"name": "tfds", "root": str(tmp_path / "tfrecord"), "tfds_name": "tiny", "image_size": 8, "num_workers": 3}
    source = open_source(data, "train")
    assert source.num_classes == 2 and source.class_names == ("a", "b")
    batches = evaluation_batches(source, data, batch_size=7)
    batch = next(batches)
    batches.close()
    assert batch["label"].tolist() == [0, 1, 0, 1, 0, 1, 0] and batch["weight"].all()
    red = batch["image"][:, 4, 4, 0] * 0.229 + 0.485
    np.testing.assert_allclose(red * 255, 20 * np.arange(7), atol=2)


def test_unreadable_examples_can_be_left_out(tmp_path):
    path = write_both(tmp_path)[0]
    content = path.read_bytes()
    first = 16 + struct.unpack("<Q", content[:8])[0]
    path.write_bytes(content[:100] + b"?" + content[101 : first + 12] + b"?" + content[first + 13 :])
    data = {"name": "tfds", "root": str(tmp_path / "tfrecord"), "tfds_name": "tiny", "image_size": 8, "num_workers": 0}
    source = open_source(data, "train")
    with pytest.raises(UnreadableImage, match=r"record 0 of .*tiny-train.tfrecord-00000-of-00002 is damaged"):
        source[0]
    batches = evaluation_batches(source, {**data, "on_error": "skip"}, batch_size=7)
    assert next(batches)["weight"].tolist() == [0, 0, 1, 1, 1, 1, 1]
    batches.close()


def test_missing_file_is_named_before_anything_is_read(tmp_path):
    write_both(tmp_path)[1].unlink()
    assert len(Tfds("tiny", tmp_path / "tfrecord", "train[:3]")) == 3  # does not need it
    with pytest.raises(InputError, match=r"no such file: .*tiny-train.tfrecord-00001-of-00002"):
        Tfds("tiny", tmp_path / "tfrecord", "train")


def test_more_array_record_files_than_may_be_open(tmp_path):
    shards = [[example(i % 9)] for i in range(60)]
    write_tfds_folder(tmp_path / "tiny", "array_record", {"train": shards}, features())
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 30, limits[1]))
    try:
        source = Tfds("", tmp_path / "tiny", "train")
        assert [source[i]["label"] for i in range(60)] == [i % 9 % 2 for i in range(60)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


# URLs -----------------------------------------------------------------------------------------------------------------


class Bucket(MemoryFileSystem):
    """gs:// in memory."""

    protocol = ("gs", "gcs")
    store = {}  # noqa: RUF012  (fsspec's own way)
    pseudo_dirs = [""]  # noqa: RUF012
    broken = False

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("gs://").removeprefix("gcs://"))

    def cat_file(self, *arguments, **options):
        if self.broken:
            raise ConnectionError("no route to host")
        return super().cat_file(*arguments, **options)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """gs://bucket, with the folders of `write_both`."""
    backend.fsspec_backend._get_filesystem.cache_clear()
    for protocol in ("gs", "gcs"):
        monkeypatch.setitem(_registry, protocol, Bucket)
    monkeypatch.setattr(Bucket, "store", {})
    monkeypatch.setattr(Bucket, "pseudo_dirs", [""])
    write_both(tmp_path / "local")
    filesystem = Bucket()
    filesystem.put(str(tmp_path / "local"), "gs://bucket/data", recursive=True)
    yield filesystem
    backend.fsspec_backend._get_filesystem.cache_clear()


def test_tfrecord_behind_a_url(tmp_path, bucket):
    here = Tfds("tiny", tmp_path / "local" / "tfrecord", "train[1:]+test")
    shutil.rmtree(tmp_path / "local")
    there = Tfds("tiny", "gs://bucket/data/tfrecord", "train[1:]+test")
    assert len(there) == len(here) == 8
    example = there[7]
    assert example["id"] == "tiny-test.array_record-00000-of-00001__1" and example["label"] == 0
    assert abs(np.asarray(example["image"])[0, 0, 0].astype(int) - 160) <= 2


def test_network_failure_is_not_an_unreadable_image(bucket, monkeypatch):
    source = Tfds("tiny", "gs://bucket/data/tfrecord", "test")
    monkeypatch.setattr(Bucket, "broken", True)
    with pytest.raises(WorkError, match=r"can not read gs://bucket/.*-test.tfrecord-.*: no route to host; check"):
        source[0]


def test_what_a_url_can_not_be_read_for(bucket):
    with pytest.raises(
        InputError, match=r"gs://bucket/data/array_record/.* array_record, which is read from local.*gcsfuse"
    ):
        Tfds("tiny", "gs://bucket/data/array_record", "test")
    with pytest.raises(InputError, match=r"gs://bucket/none is not a folder"):
        Tfds("tiny", "gs://bucket/none", "test")
    for name in ("image_folder", "image_table"):
        with pytest.raises(InputError, match=r"data.root gs://bucket/photos: image_.* local files; mount .*gcsfuse"):
            open_source({"name": name, "root": "gs://bucket/photos"}, "train")


def test_url_without_a_library_for_it():
    with pytest.raises(InputError, match=r"can not read nfs9://x: .*; for gs:// `pip install 'tif_jax\[gcs\]'`"):
        Tfds("tiny", "nfs9://x", "train")
