"""Training that is killed at any moment loses little and ends as if nothing had been, and so does a whole experiment."""

import contextlib
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import runner
from cases import mostly_long
from forks import Server
from small_project import forget_handlers
from trainer import NUM_STEPS, SAVE_EVERY

from tif_jax.__main__ import main
from tif_jax.commands import benchmark
from tif_jax.runtime import metrics_log, records
from tif_jax.runtime import workdir as workdir_module
from tif_jax.runtime.digests import digest
from tif_jax.training.checkpoints import load_params


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
    """The step of the newest checkpoint. Orbax itself would clear away what the killed run left, in a thread."""
    folder = workdir / "backbone" / "checkpoints"
    return max((int(path.name) for path in folder.glob("*") if path.name.isdigit()), default=0)


@pytest.mark.parametrize("num_kills", [3, pytest.param(20, marks=pytest.mark.long)])
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
    # Of programs that are killed; this process has its own already. JAX writes no entry that is there.
    cache = tmp_path / "cache"
    cache.mkdir()
    for entry in Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).glob("*-cache"):
        (cache / entry.name).symlink_to(entry)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
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
    assert len(numbers) > 12 and len(rows) == 1
    numbers["rows"] = [{key: value for key, value in row.items() if key != "images_per_second"} for row in rows]
    return numbers


# In the normal suite: kills, a signal of each kind, and a signal that comes after a stage was killed in its training.
SHORT = ("backbone", "filter", "rank", "finetune", "benchmark", "report")


@pytest.mark.parametrize(("turn", "stages"), mostly_long([(0, SHORT), *((turn, runner.STAGES) for turn in (0, 1))]))
def test_ended_in_the_middle_of_every_stage(place, finished, capfd, turn, stages):
    """By kills and signals in turn. A signal is answered in one line; the same command goes on, and ends as if uncut."""
    killed = signal.SIGKILL
    ends = itertools.cycle([killed, signal.SIGTERM, killed, signal.SIGINT, killed, signal.SIGHUP])
    server = Server("runner")
    for stage, number in zip(runner.STAGES, itertools.islice(ends, turn, None), strict=False):
        if stage not in stages:
            continue
        if number == killed:
            run = server.start(stage, log=place / "log")
            wait_for(place / "waits", run)
            if stage in runner.STAGES[:2]:
                assert_second_is_refused(run, capfd)
            run.kill()
            run.wait()
            (place / "waits").unlink()
        else:
            assert stopped(stage, number) == ENDS[number], stage
            assert_stopped_in_one_line(capfd.readouterr().err)
    server.close()
    assert main(runner.LINE) == 0
    assert found(place / "run") == finished
    assert "Traceback" not in (place / "log").read_text() + capfd.readouterr().err


def wait_for(path, run):
    while not path.exists():
        assert run.poll() is None, run.log.read_text()
        time.sleep(0.01)


def stopped(stage, number):
    """The status of a run in this process, to which a signal comes in the middle of a stage."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    with pytest.MonkeyPatch.context() as patch:
        runner.in_the_middle(stage, lambda: os.kill(os.getpid(), number), patch.setattr)
        forget_handlers()
        status = main(runner.LINE)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)] == before
    return status


def assert_stopped_in_one_line(printed):
    *log, line = printed.splitlines()
    assert line.startswith("tif run: stopped") and "run the same command again" in line
    assert all(re.match(r"\d\d:\d\d:\d\d ", entry) for entry in log), log


def assert_second_is_refused(first, capfd):
    forget_handlers()
    assert main(runner.LINE) == 2
    assert re.search(rf"run is in use by `tif.*`, process {first.number} on", capfd.readouterr().err.splitlines()[-1])


ENDS = {signal.SIGTERM: 75, signal.SIGINT: 130, signal.SIGHUP: 75, signal.SIGKILL: -signal.SIGKILL}


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
def test_ended_at_random_moments(place, finished, seed):
    """Twelve times each, by whatever ends a program: whole processes, from before JAX is imported on."""
    rng, log = random.Random(seed), place / "log"
    for _ in range(12):
        number, moment = rng.choice([*ENDS]), rng.choice([rng.uniform(0, 2), rng.uniform(2, 25)])
        with log.open("w") as out:
            run = subprocess.Popen([sys.executable, "-m", "tif_jax", *runner.LINE], stdout=out, stderr=out)
        wait_for_handlers(run)
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.wait(moment)
        run.send_signal(number)
        status, lines = run.wait(), log.read_text().splitlines()
        print(f"{number.name} after {moment:.2f} s: {status}, {lines[-1:]}")
        assert status in (ENDS[number], 0)
        assert "Traceback" not in log.read_text()
        if status > 0:
            assert lines[-1].startswith("tif run: stopped"), lines
        if status == 0:
            assert found(place / "run") == finished
            shutil.rmtree(place / "run")
    assert main(runner.LINE) == 0
    assert found(place / "run") == finished


def wait_for_handlers(run):
    """Until Python has started and read our first lines; how long that takes is the machine's affair."""
    status = Path(f"/proc/{run.pid}/status")
    while "State:\tZ" not in (told := status.read_text()):
        caught = int(re.search(r"SigCgt:\s*(\w+)", told)[1], 16)
        if caught >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.01)


def test_signals_are_heeded_before_anything_large_is_imported():
    assert (
        subprocess.run(
            [sys.executable, "-c", "import sys, tif_jax.__main__; sys.exit('jax' in sys.modules)"]
        ).returncode
        == 0
    )


@pytest.mark.long
def test_worker_processes_do_not_outlive_a_run_that_is_killed(place):
    words = ["train", "--stage=backbone", "--config.data.worker_processes=2", "--config.backbone.num_epochs=1e5"]
    with (place / "log").open("w") as log:
        run = subprocess.Popen(
            [sys.executable, "-m", "tif_jax", *words, *runner.LINE[1:]], stdout=log, stderr=log, start_new_session=True
        )
    until = time.monotonic() + 120
    while not list(place.glob("run/backbone/checkpoints/[0-9]*")):
        assert run.poll() is None and time.monotonic() < until, (place / "log").read_text()
        time.sleep(0.1)
    run.kill()
    run.wait()
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.killpg(run.pid, 0)  # its group has members still
            time.sleep(0.1)
