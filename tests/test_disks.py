"""Disks that are full in one way or another: the program ends, with status 1 and one line; then it goes on."""

import subprocess

import pytest
import runner
from forks import Server
from small_project import forget_handlers

from tif_jax.__main__ import main

UNLIMITED = str(2**40)


@pytest.fixture(scope="module")
def server():
    server = Server("runner")
    yield server
    server.close()


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner.line_of(tmp_path)
    (tmp_path / "run").mkdir()
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path / "run"], capture_output=True)
    forget_handlers()


def mount(folder, options):
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no right to mount a file system: {done.stderr}")


def assert_one_line(run, *named):
    """It comes last; before it there is nothing but the log."""
    *log, line = run.log.read_text().splitlines()
    assert line.startswith("tif run: can not write") and all(word in line for word in named), line
    assert all(entry[2:3] == entry[5:6] == ":" for entry in log), log


@pytest.mark.parametrize(
    "options, where",
    [
        ("size=1m,nr_inodes=30", "run/backbone/checkpoints"),  # no inodes are left for the first checkpoint
        ("size=60k", "run/backbone/checkpoints"),
        ("size=20k", "run/backbone/metrics.jsonl"),
    ],
)
def test_a_full_disk(server, place, options, where):
    mount(place / "run", options)
    run = server.start("", UNLIMITED, log=place / "log")
    assert run.wait(60) == 1, run.log.read_text()
    assert_one_line(run, where, "No space left on device", "make room")
    if options == "size=60k":
        mount(place / "run", "remount,size=50m")
        assert main(["train", "--stage=backbone", *runner.LINE[1:]]) == 0


@pytest.mark.parametrize("limit, where", [(200, "run/run.json"), (12000, "run/backbone/checkpoints")])
def test_a_limit_on_the_size_of_a_file(server, place, limit, where, monkeypatch):
    run = server.start("", limit, log=place / "log")
    assert run.wait(60) == 1, run.log.read_text()
    assert_one_line(run, where, "File too large", "ulimit -f")
