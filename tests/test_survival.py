"""Training that is killed at any moment loses little and ends as if nothing had been."""

import random
import signal
import time

import jax
import numpy as np
import pytest
from forks import Server
from trainer import NUM_STEPS, SAVE_EVERY

from tif_jax.runtime import metrics_log
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
