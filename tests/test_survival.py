"""Training that is killed at any moment loses little and ends as if nothing had been."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from trainer import NUM_STEPS, SAVE_EVERY

from tif_jax import metrics_log, state

TRAINER = str(Path(__file__).with_name("trainer.py"))


class Server:
    """Training runs that start at once: `trainer.py serve`."""

    def __init__(self, folder):
        self.folder, self.log = folder, open(folder / "log", "a")
        self.process = subprocess.Popen(
            [sys.executable, TRAINER, "serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )

    def start(self, *arguments):
        """The process number of a run."""
        print(*arguments, file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def status(self):
        return int(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.log.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    # A run that is killed may leave half a program in its cache, which is noticed, but costs a warning.
    folder = tmp_path_factory.mktemp("survival")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder / "cache"))
        patch.setenv("JAX_NUM_CPU_DEVICES", "2")
        server = Server(folder)
        yield server
        server.close()


@pytest.fixture(scope="module")
def uncut(server):
    """The workdir of a run that nothing disturbed."""
    server.start(0, server.folder / "steps", f"--workdir={server.folder / 'uncut'}")
    assert server.status() == 0, (server.folder / "log").read_text()
    return server.folder / "uncut"


def arrays(workdir):
    return state.load_params(workdir / "backbone" / "checkpoints")[0]


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
    with state.Checkpoints(workdir / "backbone" / "checkpoints") as checkpoints:
        return max(checkpoints.steps(), default=0)


@pytest.mark.parametrize("num_kills", [5, pytest.param(20, marks=pytest.mark.long)])
def test_killed_at_random_moments(server, uncut, tmp_path, num_kills):
    rng, workdir, begun = random.Random(num_kills), tmp_path / "run", tmp_path / "steps"
    for _ in range(num_kills):
        begun.unlink(missing_ok=True)
        start = newest(workdir) if workdir.exists() else 0
        child = server.start(0.02, begun, f"--workdir={workdir}")
        # Before, during or between steps and checkpoints; some way on, since nothing is left to kill after the last.
        after, moment = rng.randrange(0, min(2 * SAVE_EVERY, NUM_STEPS - start)), rng.uniform(0, 0.3)
        wait_for_step(begun, after)
        time.sleep(moment)
        subprocess.run(["kill", "-KILL", str(child)], check=False)
        assert server.status() in (-signal.SIGKILL, 0)
        reached = start + number_in(begun)
        # Lost are the steps since the newest checkpoint, and those that were done while the next one was being written.
        assert newest(workdir) >= (reached - 1) // SAVE_EVERY * SAVE_EVERY - SAVE_EVERY
        if newest(workdir) >= NUM_STEPS - SAVE_EVERY:
            workdir = tmp_path / f"run-{reached}-{moment}"
    server.start(0, begun, f"--workdir={workdir}")
    assert server.status() == 0, (server.folder / "log").read_text()
    jax.tree.map(np.testing.assert_array_equal, arrays(workdir), arrays(uncut))
    lines, expected = (metrics_log.read(folder / "backbone") for folder in (workdir, uncut))
    assert [(line["step"], line["loss"]) for line in lines] == [(line["step"], line["loss"]) for line in expected]


def test_sigterm_saves(server, tmp_path):
    child = server.start(0.2, tmp_path / "steps", f"--workdir={tmp_path / 'run'}")
    wait_for_step(tmp_path / "steps", 3)
    subprocess.run(["kill", "-TERM", str(child)], check=True)
    assert server.status() == 75
    assert newest(tmp_path / "run") == number_in(tmp_path / "steps")  # not one step is lost
    assert "run the same command again" in (server.folder / "log").read_text().splitlines()[-1]
