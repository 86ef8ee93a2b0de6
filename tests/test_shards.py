import errno
import json
import logging
import os
import threading
import tracemalloc

import numpy as np
import pyarrow.parquet as pq
import pytest

from tif_jax.errors import InputError, WorkError
from tif_jax.impact.shards import iter_impact, missing_parts, open_manifest, part_rows, read_impact, write_part

NUM_EXAMPLES, VIEWS, NUM_PARTS, NUM_TOKENS = 10, 2, 3, 5


def manifest(**changes):
    return {
        "num_examples": NUM_EXAMPLES,
        "num_images": NUM_EXAMPLES,
        "num_tokens": NUM_TOKENS,
        "views": VIEWS,
        "num_parts": NUM_PARTS,
        "estimator": {"name": "sampled", "num_samples": 16},
        "mask": "drop",
        "target": "label",
        "data": {"name": "digits", "split": "train"},
        "image_size": (64, 64),
        "preprocessing": {"crop": "centre"},
        "backbone": "b" * 64,
        "versions": {"jax": "0.10.0"},
    } | changes


def rows_of(index, view, num_tokens=NUM_TOKENS, dtype=np.float32):
    """Columns in which every number is a function of (index, view)."""
    index, view = np.asarray(index), np.asarray(view)
    impact = (index[:, None] + 100 * view[:, None] + 0.1 * np.arange(num_tokens)).astype(dtype)
    return {
        "index": index,
        "view": view,
        "id": [f"train/ß {i}.jpg" for i in index],
        "label": index % 3 - 1,
        "prediction": index % 4,
        "loss": np.asarray(index / 7, np.float32),
        "impact": impact,
    }


def part_columns(part, dtype=np.float32):
    rows = np.array(part_rows(NUM_EXAMPLES * VIEWS, part, NUM_PARTS))
    return rows_of(rows // VIEWS, rows % VIEWS, dtype=dtype)


@pytest.fixture
def workdir(tmp_path):
    write_all(tmp_path)
    return tmp_path


def write_all(workdir, dtype=np.float32):
    open_manifest(workdir / "impact", manifest())
    for part in range(1, NUM_PARTS + 1):
        write_part(workdir / "impact", part, NUM_PARTS, part_columns(part, dtype))


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


def error_numbered(number):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return fail


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


# Manifest


def test_the_manifest_is_written_once_and_then_verified(workdir):
    path = workdir / "impact" / "manifest.json"
    before = path.stat()
    open_manifest(workdir / "impact", manifest())
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    stored = json.loads(path.read_text())
    assert stored.pop("format_version") == 1
    assert stored == manifest(image_size=[64, 64])


def test_another_manifest_is_refused_by_the_keys_that_differ(workdir):
    before = (workdir / "impact" / "manifest.json").read_bytes()
    other = manifest(estimator={"name": "sampled", "num_samples": 32}, mask="zero", versions={"jax": "0.12.0"})
    with pytest.raises(InputError) as error:
        open_manifest(workdir / "impact", other)
    text = one_line(error)
    assert "estimator.num_samples is 16 there, 32 here" in text and "mask is 'drop' there, 'zero' here" in text
    assert "--workdir" in text and "delete" in text
    assert "estimator.name" not in text and "backbone" not in text
    assert (workdir / "impact" / "manifest.json").read_bytes() == before


def test_other_versions_alone_are_a_warning(workdir, caplog):
    with caplog.at_level(logging.WARNING):
        open_manifest(workdir / "impact", manifest(versions={"jax": "0.12.0"}))
    assert "versions.jax is '0.10.0' there, '0.12.0' here" in caplog.text


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format_version": 1}', '{"format_version": 2, "'])
def test_a_damaged_manifest(workdir, content):
    (workdir / "impact" / "manifest.json").write_text(content)
    for use in (lambda: read_impact(workdir), lambda: open_manifest(workdir / "impact", manifest())):
        with pytest.raises(InputError) as error:
            use()
        assert "manifest.json is damaged or not of format_version 1" in one_line(error)


def test_another_format_version(workdir):
    path = workdir / "impact" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 2}))
    with pytest.raises(InputError, match="format_version 1"):
        read_impact(workdir)


def test_parts_without_a_manifest_are_not_adopted(workdir):
    (workdir / "impact" / "manifest.json").unlink()
    with pytest.raises(InputError, match="unknown origin"):
        open_manifest(workdir / "impact", manifest(backbone="c" * 64))


def test_what_is_expected_of_the_manifest(workdir):
    read_impact(workdir, expected={"backbone": "b" * 64, "image_size": (64, 64), "estimator": {"name": "sampled"}})
    with pytest.raises(InputError) as error:
        read_impact(workdir, expected={"backbone": "c" * 64, "views": 4, "target": "label", "data": {"split": "test"}})
    text = one_line(error)
    assert f"backbone is {'b' * 64!r} there, {'c' * 64!r} here" in text
    assert "views is 2 there, 4 here" in text and "data.split is 'train' there, 'test' here" in text
    assert "target" not in text and "data.name" not in text


def test_of_starters_at_once_one_writes_the_manifest(tmp_path):
    """Every starter that gets through finds its own manifest in the end; the others are told."""
    for attempt in range(20):
        directory, outcomes, barrier = tmp_path / str(attempt), {}, threading.Barrier(8)

        def start(k, directory=directory, outcomes=outcomes, barrier=barrier):
            barrier.wait()
            try:
                open_manifest(directory, manifest(backbone=str(k % 2)))
                outcomes[k] = "accepted"
            except InputError:
                outcomes[k] = "refused"

        threads = [threading.Thread(target=start, args=(k,)) for k in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        winner = int(json.loads((directory / "manifest.json").read_text())["backbone"])
        assert outcomes == {k: "accepted" if k % 2 == winner else "refused" for k in range(8)}
        assert [path.name for path in directory.iterdir()] == ["manifest.json"]


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", error_numbered(errno.EPERM))
    open_manifest(tmp_path, manifest())
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    with pytest.raises(InputError, match="mask is"):
        open_manifest(tmp_path, manifest(mask="zero"))


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
        assert "--workdir" in str(error.value)


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
    open_manifest(
        tmp_path, manifest(num_examples=num_rows, views=1, num_parts=num_parts, num_tokens=num_tokens, data={})
    )
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
