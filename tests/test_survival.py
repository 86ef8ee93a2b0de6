"""Training that is killed at any moment loses little and ends as if nothing had been, and so does a whole experiment."""

import itertools
import os
import random
import re
import signal
import time

import jax
import numpy as np
import pytest
import runner
from forks import Server
from small_project import forget_handlers
from trainer import NUM_STEPS, SAVE_EVERY

from tif_jax.__main__ import main
from tif_jax.commands import benchmark
from tif_jax.runtime import metrics_log, records
from tif_jax.runtime import workdir as workdir_module
from tif_jax.runtime.digests import digest
from tif_jax.training.checkpoints import Checkpoints, load_params


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    # A run that is killed may leave half a program in its cache, which is noticed, but costs a warning.
    folder = tmp_path_factory.mktemp("survival")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder / "cache"))
        server = Server("trainer", JAX_NUM_CPU_DEVICES="2")
        yield server
        server.close()


@pytest.fixture(scope="module")
def uncut(server, tmp_path_factory):
    """The workdir of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("uncut")
    run = server.start(0, folder / "steps", f"--workdir={folder / 'run'}", log=folder / "log")
    assert run.wait() == 0, run.log.read_text()
    return folder / "run"


def arrays(workdir):
    return load_params(workdir / "backbone" / "checkpoints")[0]


def wait_for_step(file, step, seconds=120):
    """Longer it does not take: a run that died at once would be waited for for ever."""
    until = time.monotonic() + seconds
    while number_in(file) < step:
        assert time.monotonic() < until
        time.sleep(0.01)


def number_in(file):
    return int(file.read_text() or 0) if file.exists() else 0


def newest(workdir):
    """The step of the newest checkpoint, as a run would find it."""
    with Checkpoints(workdir / "backbone" / "checkpoints") as checkpoints:
        return max(checkpoints.steps(), default=0)


@pytest.mark.parametrize("num_kills", [5, pytest.param(20, marks=pytest.mark.long)])
def test_killed_at_random_moments(server, uncut, tmp_path, num_kills):
    rng, workdir, begun, log = random.Random(num_kills), tmp_path / "run", tmp_path / "steps", tmp_path / "log"
    for _ in range(num_kills):
        begun.unlink(missing_ok=True)
        start = newest(workdir) if workdir.exists() else 0
        run = server.start(0.02, begun, f"--workdir={workdir}", log=log)
        # Before, during or between steps and checkpoints; some way on, since nothing is left to kill after the last.
        after, moment = rng.randrange(0, min(2 * SAVE_EVERY, NUM_STEPS - start)), rng.uniform(0, 0.3)
        wait_for_step(begun, after)
        time.sleep(moment)
        run.kill()
        assert run.wait() in (-signal.SIGKILL, 0)
        reached = start + number_in(begun)
        # Lost are the steps since the newest checkpoint, and those that were done while the next one was being written.
        assert newest(workdir) >= (reached - 1) // SAVE_EVERY * SAVE_EVERY - SAVE_EVERY
        if newest(workdir) >= NUM_STEPS - SAVE_EVERY:
            workdir = tmp_path / f"run-{reached}-{moment}"
    run = server.start(0, begun, f"--workdir={workdir}", log=log)
    assert run.wait() == 0, log.read_text()
    jax.tree.map(np.testing.assert_array_equal, arrays(workdir), arrays(uncut))
    lines, expected = (metrics_log.read(folder / "backbone") for folder in (workdir, uncut))
    assert [(line["step"], line["loss"]) for line in lines] == [(line["step"], line["loss"]) for line in expected]


def test_sigterm_saves(server, tmp_path):
    run = server.start(0.2, tmp_path / "steps", f"--workdir={tmp_path / 'run'}", log=tmp_path / "log")
    wait_for_step(tmp_path / "steps", 3)
    run.send_signal(signal.SIGTERM)
    assert run.wait() == 75
    assert newest(tmp_path / "run") == number_in(tmp_path / "steps")  # not one step is lost
    assert "run the same command again" in run.log.read_text().splitlines()[-1]


# A whole experiment: tests/runner.py


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """What a run that nothing disturbed found."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(benchmark, "_SECONDS_PER_ROUND", 0.02)
        assert main(runner.line_of(folder)) == 0
    forget_handlers()
    return found(folder / "run")


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner.line_of(tmp_path)
    yield tmp_path
    forget_handlers()


def found(workdir):
    """All numbers of a finished run but those that a clock gave, and the digest of all weights; there is no litter."""
    numbers = {}
    for path in sorted(workdir.rglob("*")):
        assert not workdir_module._UNFINISHED.fullmatch(path.name) and not path.name.startswith("."), path
        name = str(path.relative_to(workdir))
        if path.name == "metrics.json":
            numbers[name] = records.read(path)
        elif path.name == "metrics.jsonl":
            numbers[name] = [(line["step"], line["loss"]) for line in metrics_log.read(path.parent)]
        elif path.name == "checkpoints":
            numbers[name] = digest(load_params(path)[0])
        elif path.suffix == ".parquet":
            numbers[name] = path.read_bytes()
    rows = records.read(workdir / "report.json")["rows"]
    assert len(numbers) > 15 and len(rows) == 2
    numbers["rows"] = [{key: value for key, value in row.items() if key != "images_per_second"} for row in rows]
    return numbers


def test_killed_in_the_middle_of_every_stage(place, finished):
    server = Server("runner", JAX_COMPILATION_CACHE_DIR=str(place / "cache"))
    for stage in runner.STAGES:
        run = server.start(stage, log=place / "log")
        assert run.wait() == -signal.SIGKILL, (stage, run.log.read_text())
    run = server.start("", log=place / "log")
    assert run.wait() == 0, run.log.read_text()
    server.close()
    assert found(place / "run") == finished
    assert "Traceback" not in run.log.read_text()


def test_stopped_in_the_middle_of_every_stage(place, finished, capfd):
    """By SIGTERM, Ctrl-C and the end of a terminal in turn: each time in one line, and the same command goes on."""
    ends = itertools.cycle([(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGHUP, 75)])
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    for stage, (number, status) in zip(runner.STAGES, ends, strict=False):
        with pytest.MonkeyPatch.context() as patch:
            runner.in_the_middle(stage, lambda number=number: os.kill(os.getpid(), number), patch.setattr)
            forget_handlers()
            assert main(runner.LINE) == status, stage
        *log, line = capfd.readouterr().err.splitlines()
        assert line.startswith("tif run: stopped") and "run the same command again" in line
        assert all(re.match(r"\d\d:\d\d:\d\d ", entry) for entry in log), log
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)] == before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "_SECONDS_PER_ROUND", 0.02)
        assert main(runner.LINE) == 0
    assert found(place / "run") == finished
