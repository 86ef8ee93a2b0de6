"""Parts of impact shards: what is written is read, and what was interrupted, damaged or contradictory is told."""

import errno
import json
import logging
import os
import tracemalloc

import numpy as np
import pyarrow.parquet as pq
import pytest
from small_shards import (
    NUM_EXAMPLES,
    NUM_PARTS,
    NUM_TOKENS,
    VIEWS,
    error_numbered,
    manifest,
    one_line,
    part_columns,
    rows_of,
    write_all,
)  # fmt: skip

from tif_jax.errors import InputError, WorkError
from tif_jax.impact.manifest import open_manifest
from tif_jax.impact.shards import iter_impact, missing_parts, part_rows, read_impact, write_part


@pytest.fixture
def workdir(tmp_path):
    write_all(tmp_path)
    return tmp_path


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_what_is_written_is_read(tmp_path, dtype):
    write_all(tmp_path, dtype)
    index = np.repeat(np.arange(NUM_EXAMPLES), VIEWS)
    wanted = rows_of(index, np.tile(np.arange(VIEWS), NUM_EXAMPLES), dtype=dtype)
    for path in (tmp_path, tmp_path / "impact", str(tmp_path)):
        table = read_impact(path)
        for name, column in wanted.items():
            np.testing.assert_array_equal(getattr(table, name), column)
        assert table.impact.dtype == dtype
        assert (table.index.dtype, table.view.dtype, table.label.dtype, table.loss.dtype) == (
            np.int64,
            np.int32,
            np.int32,
            np.float32,
        )


@pytest.mark.parametrize("dtype, name", [(np.float32, "float"), (np.float16, "halffloat")])
def test_files_are_those_of_the_format(tmp_path, dtype, name):
    write_all(tmp_path, dtype)
    names = sorted(path.name for path in (tmp_path / "impact").iterdir())
    parts = [f"part-0000{k}-of-00003.{kind}" for k in (1, 2, 3) for kind in ("json", "parquet")]
    assert names == ["manifest.json", *parts]
    table = pq.read_table(tmp_path / "impact" / parts[1])
    types = {field.name: str(field.type).replace("element", "item") for field in table.schema}
    assert types == {
        "index": "int64",
        "view": "int32",
        "id": "string",
        "label": "int32",
        "prediction": "int32",
        "loss": "float",
        "impact": f"fixed_size_list<item: {name}>[{NUM_TOKENS}]",
    }
    assert table["impact"].to_pylist() == part_columns(1, dtype)["impact"].tolist()
    assert pq.ParquetFile(tmp_path / "impact" / parts[1]).metadata.row_group(0).column(0).compression == "ZSTD"
    assert json.loads((tmp_path / "impact" / parts[0]).read_text())["rows"] == table.num_rows


def test_rows_come_back_sorted_by_example_and_view(tmp_path):
    open_manifest(tmp_path, manifest(num_parts=2))
    write_part(tmp_path, 1, 2, rows_of([9, 3, 3], [0, 1, 0]))
    write_part(tmp_path, 2, 2, rows_of([4, 0], [0, 1]))
    table = read_impact(tmp_path)
    assert list(zip(table.index, table.view, strict=True)) == [(0, 1), (3, 0), (3, 1), (4, 0), (9, 0)]
    np.testing.assert_array_equal(table.impact, rows_of(table.index, table.view)["impact"])


def test_a_part_without_rows(tmp_path):
    open_manifest(tmp_path, manifest(num_parts=2))
    write_part(tmp_path, 1, 2, rows_of(np.arange(0), np.arange(0)))
    write_part(tmp_path, 2, 2, rows_of([1], [0]))
    assert read_impact(tmp_path).impact.shape == (1, NUM_TOKENS)
    empty, full = (pq.read_schema(path) for path in sorted(tmp_path.glob("*.parquet")))
    assert empty.equals(full)


@pytest.mark.parametrize("num_rows", [0, 1, 5, 64, 101])
@pytest.mark.parametrize("num_parts", [1, 3, 7, 64])
def test_parts_are_contiguous_and_balanced(num_rows, num_parts):
    parts = [part_rows(num_rows, part, num_parts) for part in range(1, num_parts + 1)]
    assert [row for rows in parts for row in rows] == list(range(num_rows))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("part, num_parts", [(0, 3), (4, 3), (-1, 3), (1, 0)])
def test_a_part_that_does_not_exist(part, num_parts):
    with pytest.raises(InputError) as error:
        part_rows(10, part, num_parts)
    assert f"{part}/{num_parts}" in one_line(error)


# Interrupted and damaged work


@pytest.mark.parametrize("num_renames", [0, 1])
def test_killed_while_writing_a_part(tmp_path, monkeypatch, num_renames):
    """After any number of renames the part is absent, and it is written whole by the next start."""
    open_manifest(tmp_path, manifest(num_parts=1))
    rename, done = os.replace, []

    def killed(*args):
        if len(done) == num_renames:
            raise KeyboardInterrupt
        done.append(rename(*args))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_part(tmp_path, 1, 1, rows_of([0, 1], [0, 0]))
    assert missing_parts(tmp_path, 1) == [1]
    with pytest.raises(InputError, match="lacks 1 of 1 parts: 1; run `tif score` again"):
        read_impact(tmp_path)
    write_part(tmp_path, 1, 1, rows_of([0, 1, 2], [0, 0, 0]))
    assert missing_parts(tmp_path, 1) == []
    assert len(read_impact(tmp_path).index) == 3


def test_temporary_files_left_by_a_kill_are_not_parts(workdir):
    (workdir / "impact" / ".part-00001-of-00003.parquet.0123.tmp").write_bytes(b"half a par")
    assert missing_parts(workdir / "impact", NUM_PARTS) == []
    assert len(read_impact(workdir).index) == NUM_EXAMPLES * VIEWS


def test_a_rewritten_part_is_absent_until_both_files_are_there(workdir, monkeypatch):
    """The old .json next to the new parquet must not pass for a complete part."""
    rename = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda a, b: rename(a, b) if str(b).endswith("parquet") else error_numbered(5)())
        with pytest.raises(WorkError):
            write_part(workdir / "impact", 2, NUM_PARTS, rows_of([4], [0]))
    assert missing_parts(workdir / "impact", NUM_PARTS) == [2]


@pytest.mark.parametrize("position", [0, 0.5, 0.999])
@pytest.mark.parametrize("suffix", ["parquet", "json"])
def test_a_flipped_byte_is_found(workdir, caplog, suffix, position):
    path = workdir / "impact" / f"part-00002-of-00003.{suffix}"
    data = bytearray(path.read_bytes())
    data[int(position * len(data))] ^= 1
    path.write_bytes(data)
    if suffix == "json" and position == 0.5:
        assert json.loads(data)  # a flip inside of the digest itself, still readable
    with pytest.raises(InputError) as error:
        read_impact(workdir)
    assert (
        "part-00002-of-00003" in one_line(error) and "damaged" in str(error.value) and "tif score" in str(error.value)
    )
    with caplog.at_level(logging.WARNING):
        assert missing_parts(workdir / "impact", NUM_PARTS) == [2]
    assert "part-00002-of-00003" in caplog.text and "damaged" in caplog.text
    assert missing_parts(workdir / "impact", NUM_PARTS, verify=False) == []
    write_part(workdir / "impact", 2, NUM_PARTS, part_columns(2))
    assert len(read_impact(workdir).index) == NUM_EXAMPLES * VIEWS


def test_without_verification_a_truncated_part_is_still_an_error(workdir):
    path = workdir / "impact" / "part-00003-of-00003.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"part-00003-of-00003.parquet is damaged"):
        read_impact(workdir, verify=False)


@pytest.mark.parametrize("suffix", ["parquet", "json"])
def test_a_removed_part_is_named(workdir, suffix):
    (workdir / "impact" / f"part-00002-of-00003.{suffix}").unlink()
    assert missing_parts(workdir / "impact", NUM_PARTS) == [2]
    with pytest.raises(InputError) as error:
        iter_impact(workdir)  # before the first part is read
    assert "lacks 1 of 3 parts: 2; run `tif score` again" in one_line(error)


def test_no_impact_at_all(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError) as error:
            read_impact(path)
        assert str(path) in one_line(error) and "run `tif score`" in str(error.value)


@pytest.mark.parametrize(
    "columns, problem",
    [
        (rows_of([7, 7], [0, 0]), "repeats example 7, view 0"),
        (rows_of([7, 0], [0, 1]), "repeats example 0, view 1"),  # it is in part 1
        (rows_of([10], [0]), "beyond 10 examples x 2 views"),
        (rows_of([7], [2]), "beyond 10 examples x 2 views"),
        (rows_of([7], [0], num_tokens=4), "needs 5 finite impacts"),
    ],
)
def test_parts_that_contradict_each_other(workdir, columns, problem):
    write_part(workdir / "impact", 3, NUM_PARTS, columns)
    with pytest.raises(InputError) as error:
        read_impact(workdir)
    assert problem in one_line(error) and "part-00003-of-00003" in str(error.value)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_impacts_that_are_not_finite_are_not_written(workdir, value):
    columns = part_columns(2)
    columns["impact"][1, 3] = value
    with pytest.raises(WorkError) as error:
        write_part(workdir / "impact", 2, NUM_PARTS, columns)
    assert columns["id"][1] in one_line(error)
    assert len(read_impact(workdir).index) == NUM_EXAMPLES * VIEWS


def test_impacts_that_are_not_finite_are_not_read(workdir, monkeypatch):
    columns = part_columns(2)
    columns["impact"][1, 3] = np.nan
    with monkeypatch.context() as patch:
        patch.setattr(np, "isfinite", lambda x: np.ones_like(x, bool))
        write_part(workdir / "impact", 2, NUM_PARTS, columns)
    with pytest.raises(InputError, match=r"part-00002-of-00003.parquet needs 5 finite impacts"):
        read_impact(workdir)


# Folders that can not be written to


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_read_only_folder(tmp_path, monkeypatch, number):
    monkeypatch.setattr("builtins.open", error_numbered(number))
    for use in (
        lambda: open_manifest(tmp_path, manifest()),
        lambda: write_part(tmp_path, 1, NUM_PARTS, part_columns(1)),
    ):
        with pytest.raises(InputError) as error:
            use()
        assert str(tmp_path) in one_line(error) and os.strerror(number) in str(error.value)
        assert "choose a folder" in str(error.value)


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "file").touch()
    for directory in (tmp_path / "file", tmp_path / "file" / "impact"):
        with pytest.raises(InputError, match="can be written to"):
            open_manifest(directory, manifest())
        with pytest.raises(InputError, match="can be written to"):
            write_part(directory, 1, NUM_PARTS, part_columns(1))


def test_a_full_disk(workdir, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", error_numbered(errno.ENOSPC))
        with pytest.raises(WorkError) as error:
            write_part(workdir / "impact", 2, NUM_PARTS, part_columns(1))
    assert os.strerror(errno.ENOSPC) in one_line(error) and "part-00002-of-00003" in str(error.value)
    assert not list((workdir / "impact").glob(".*"))
    assert len(read_impact(workdir).index) == NUM_EXAMPLES * VIEWS  # the part that was there is still there


# Scale


def test_streaming_holds_one_part_at_a_time(tmp_path):
    num_parts, num_rows, num_tokens = 20, 20_000, 196
    numbers = dict(num_examples=num_rows, num_images=num_rows, views=1, num_parts=num_parts, num_tokens=num_tokens)
    open_manifest(tmp_path, manifest(**numbers, data={}))
    tracemalloc.start()
    for part in range(1, num_parts + 1):
        index = np.array(part_rows(num_rows, part, num_parts))
        write_part(tmp_path, part, num_parts, rows_of(index, 0 * index, num_tokens))
    count = 0
    for table in iter_impact(tmp_path):
        assert table.impact.shape == (num_rows // num_parts, num_tokens)
        np.testing.assert_array_equal(table.impact, rows_of(table.index, table.view, num_tokens)["impact"])
        count += len(table.index)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == num_rows
    assert peak < num_rows * num_tokens * 4 / 2  # bytes of half of all impacts
