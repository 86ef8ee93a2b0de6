"""Files and folders appear whole or not at all."""

import errno
import os

import pytest
from small_shards import error_numbered

from tif_jax.errors import InputError, WorkError
from tif_jax.runtime import files


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_or_written_once(tmp_path):
    path = tmp_path / "new" / "file"
    files.write(path, b"one")
    files.write(path, b"two", once=True)
    assert files.read(path) == b"one"
    files.write(path, b"two")
    assert files.read(path) == b"two" and names(path.parent) == ["file"]


@pytest.mark.parametrize(
    "number, kind, remedy",
    [
        (errno.ENOSPC, WorkError, "make room"),
        (errno.EIO, WorkError, "check the disk"),
        (errno.ESTALE, WorkError, "check the disk"),  # a network file system has lost it
        (errno.EFBIG, WorkError, "ulimit -f"),
        (errno.EROFS, InputError, "choose a folder"),
    ],
)
def test_what_could_not_be_written_is_named_and_the_old_file_stays(tmp_path, monkeypatch, number, kind, remedy):
    files.write(tmp_path / "file", b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", error_numbered(number))
        with pytest.raises(kind, match=f"can not write {tmp_path}/file: .*{remedy}"):
            files.write(tmp_path / "file", b"new")
    assert files.read(tmp_path / "file") == b"old" and names(tmp_path) == ["file"]


def test_a_file_that_can_not_be_read_is_named(tmp_path):
    with pytest.raises(InputError, match=f"can not read {tmp_path}/file: No such file"):
        files.read(tmp_path / "file")


def test_a_folder_appears_when_it_is_done(tmp_path):
    with files.appearing(tmp_path / "folder") as unfinished:
        unfinished.mkdir()
        (unfinished / "file").touch()
        assert not (tmp_path / "folder").exists()
        with pytest.raises(InputError, match="it is being written"), files.appearing(tmp_path / "folder"):
            pass
    assert names(tmp_path) == ["folder"] and names(tmp_path / "folder") == ["file"]
    with pytest.raises(InputError, match="folder exists already"), files.appearing(tmp_path / "folder"):
        pass


def test_a_folder_that_was_not_finished_is_not_there(tmp_path):
    with pytest.raises(KeyError), files.appearing(tmp_path / "folder") as unfinished:
        unfinished.mkdir()
        raise KeyError
    assert names(tmp_path) == []
