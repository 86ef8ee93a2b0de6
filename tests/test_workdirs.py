"""Workdirs: names that can and can not be used, the lock that one run holds, and what killed runs leave there."""

import json
import os
import re

import pytest
from small_project import CONFIG, finish, forget_handlers, last_line, tif

from tif_jax.__main__ import main
from tif_jax.errors import InputError
from tif_jax.runtime import files, locks, workdir
from tif_jax.training.checkpoints import Checkpoints, load_params


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.py").write_text(CONFIG)
    yield tmp_path
    forget_handlers()


@pytest.mark.parametrize(
    "name, named",
    [
        ("runs/exp[1]", "exp[1] has [ in its name; choose a folder without any of * ? ["),
        ("runs/*/?", "has * and ? in its name"),
        ("gs://bucket/run", "gs://bucket/run, but results are written to folders; mount the bucket"),
        ("", "--workdir is empty"),
        ("x/" * 2000, "bytes; choose a folder with a path below 3000"),
        ("x" * 256, "File name too long"),
        (os.fsdecode(b"r\xff"), "is not UTF-8"),
    ],
)
@pytest.mark.parametrize("command", [["train", "--stage=backbone"], ["score"], ["run"]], ids=lambda words: words[0])
def test_names_that_can_not_be_used_are_refused_before_anything_is_done(place, capsys, command, name, named):
    assert main([*command, "--config=config.py", f"--workdir={name}"]) == 2
    assert named in last_line(capsys)
    assert [path.name for path in place.iterdir()] == ["config.py"]


def test_checkpoints_of_a_library_call_are_refused_there_too(tmp_path):
    with pytest.raises(InputError, match="choose a folder without any of"):
        Checkpoints(tmp_path / "exp[1]")


def test_odd_names_are_names(place, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(place))
    name = "a b {x} 50% #1 'ü'."
    finish(place)
    (place / "run").rename(place / name)
    words = ["--config=~/config.py", f"--workdir=~/{name}"]
    assert main(["train", "--stage=backbone", *words]) == main(["evaluate", "--stage=backbone", *words]) == 0
    assert main(["train", "--stage=filter", *words]) == 0
    assert load_params(place / name / "filter" / "checkpoints")[0] and not (place / "~").exists()
    (place / name).rename(place / "[1]")  # what can not be written there can be read
    assert load_params(place / "[1]" / "filter" / "checkpoints")[0]


# The lock


@pytest.mark.parametrize(
    "line",
    ["train --stage=backbone", "benchmark", "run"],
    ids=lambda line: line.split()[0],
)
def test_the_second_run_is_told_who_has_the_folder(place, capsys, line):
    (place / "run").mkdir()
    with workdir.only_run(place / "run"):
        assert tif(line) == 2
        assert re.search(
            rf"run is in use by `tif.*`, process {os.getpid()} on \S+ since \d.*: wait for it", last_line(capsys)
        )
    assert not list(place.glob("run/*")) + list(place.glob("run/.*"))


def test_a_lock_is_held_by_one_and_ends_with_its_block(tmp_path):
    path = tmp_path / "lock"
    with locks.lock(path, "me") as first, locks.lock(path, "you") as second:
        assert (first, second) == (True, False) and path.read_text() == "me"
    assert not path.exists()
    path.write_text("of one that was killed, and longer than what comes now")
    with locks.lock(path, json.dumps("now")) as third:
        assert third and json.loads(path.read_text()) == "now"


def test_a_lock_that_its_holder_has_removed_meanwhile_is_none(tmp_path, monkeypatch):
    """Whoever opens the file while it is held, and locks it when it has gone, has nothing: others lock a new file."""
    path, opened, open_ = tmp_path / "lock", [], os.open

    def removed_meanwhile(name, *arguments):
        opened.append(open_(name, *arguments))
        if len(opened) == 1:
            path.unlink()
        return opened[-1]

    monkeypatch.setattr(os, "open", removed_meanwhile)
    with locks.lock(path) as first:
        monkeypatch.undo()
        with locks.lock(path) as second:
            assert (first, second, len(opened)) == (True, False, 2)


def test_where_there_are_no_locks_everybody_goes_on(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(locks.fcntl, "flock", no_locks)
    with workdir.only_run(tmp_path), workdir.only_run(tmp_path), locks.lock(tmp_path / "lock") as ours:
        assert ours is None


# What killed runs leave


def test_what_killed_runs_left_is_removed_by_the_next_and_nothing_else(tmp_path):
    name = "0123456789abcdef" * 2
    litter = [
        f".report.md.{name}.tmp", f"backbone/.config.json.{name}.tmp",
        "backbone/checkpoints/4.orbax-checkpoint-tmp/params.orbax-checkpoint-tmp/d/x",
        "filter/checkpoints/2.orbax-checkpoint-tmp-1700/x", f"impact/..part-00001-of-00002.begun.{name}.tmp",
    ]  # fmt: skip
    kept = [
        "report.md", "notes.tmp", ".mine.tmp", ".weights.partial/weights/half", "backbone/checkpoints/2/params/x",
        "backbone/damaged-4/x", "impact/manifest.json", "impact/.part-00001-of-00002.begun",
        f"impact/.part-00002-of-00002.parquet.{name}.tmp",
    ]  # fmt: skip
    for path in [tmp_path / name for name in (*litter, *kept)]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    os.utime(tmp_path / litter[-1], (0, 0))  # nobody can still be writing it
    with workdir.only_run(tmp_path):
        left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {*kept, ".lock"}
    assert not list(tmp_path.rglob("*orbax-checkpoint-tmp*"))


def test_an_unfinished_folder_of_a_writer_that_was_killed_is_made_anew(tmp_path):
    (tmp_path / ".folder.partial" / "folder").mkdir(parents=True)
    (tmp_path / ".folder.partial" / "folder" / "half").touch()
    with files.appearing(tmp_path / "folder") as unfinished:
        unfinished.mkdir()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder"]
