"""A run of two processes with two devices each: it computes what one process does, ends as one, and goes on."""

import argparse
import os
import runpy
import signal
import socket
import time

import jax
import numpy as np
import pytest
from forks import Server
from trainer import NUM_STEPS, TINY

from tif_jax.__main__ import main
from tif_jax.errors import InputError
from tif_jax.runtime import metrics_log, processes, records
from tif_jax.runtime.workdir import only_run
from tif_jax.training.checkpoints import Checkpoints, load_params

# Parameters are divided over all four devices, so that each process writes half of a checkpoint.
DIVIDED = ["--config.sharding.fsdp=4", "--config.backbone.num_epochs=2.0"]


@pytest.fixture(scope="module")
def servers():
    """Of the two processes."""
    servers = [Server("trainer", JAX_NUM_CPU_DEVICES="2") for _ in range(2)]
    yield servers
    for server in servers:
        server.close()


def start(servers, arguments, logs):
    """Both processes of a run."""
    with socket.create_server(("localhost", 0)) as free:
        address = f"localhost:{free.getsockname()[1]}"
    together = (f"--coordinator={address}", "--num_processes=2")
    return [
        server.start(*arguments[:2], *together, f"--process_id={i}", *arguments[2:], log=log)
        for i, (server, log) in enumerate(zip(servers, logs, strict=True))
    ]


def ends(both):
    return [process.wait() for process in both]


def wait_for_step(file, step, both):
    while not file.exists() or int(file.read_text() or 0) < step:
        assert all(process.poll() is None for process in both)
        time.sleep(0.05)


def test_stopped_killed_and_finished_it_is_as_one_process(servers, tmp_path):
    workdir, logs = tmp_path / "run", [tmp_path / "log-0", tmp_path / "log-1"]
    training = ["0.6", tmp_path / "steps", f"--workdir={workdir}", *DIVIDED]

    both = start(servers, training, logs)
    wait_for_step(tmp_path / "steps", 5, both)
    both[1].send_signal(signal.SIGTERM)  # one is told, both stop, at the same step
    assert ends(both) == [75, 75], logs[0].read_text()
    checkpoints = workdir / "backbone" / "checkpoints"
    with Checkpoints(checkpoints) as found:
        saved, stopped = found.steps()
    assert saved == NUM_STEPS // 5 // 2 < stopped
    parts = {part.name for part in (checkpoints / str(stopped) / "params").glob("ocdbt.process_*")}
    assert parts == {"ocdbt.process_0", "ocdbt.process_1"}

    (tmp_path / "steps").unlink()
    logs = [tmp_path / "again-0", tmp_path / "again-1"]
    both = start(servers, training, logs)
    wait_for_step(tmp_path / "steps", 1, both)
    both[1].kill()
    began = time.monotonic()
    assert ends(both) == [1, -signal.SIGKILL] and time.monotonic() - began < 30
    assert "process 1 of 2 is lost" in logs[0].read_text().splitlines()[-1]

    # What only one of the processes finds damaged is damaged for both.
    for file in (checkpoints / str(stopped) / "params" / "ocdbt.process_1").rglob("d/*"):
        file.write_bytes(b"")
    logs = [tmp_path / "last-0", tmp_path / "last-1"]
    both = start(servers, ["0", tmp_path / "steps", f"--workdir={workdir}", *DIVIDED, "evaluate"], logs)
    assert ends(both) == [0, 0], logs[0].read_text()
    assert f"{stopped} is damaged" in logs[0].read_text() and f"steps {saved} to 8" in logs[0].read_text()
    assert "backbone: 8 of 8 step" in logs[0].read_text() and "8 of 8 step" not in logs[1].read_text()

    alone = tmp_path / "alone"
    assert main(["train", "--stage=backbone", *TINY, DIVIDED[1], f"--workdir={alone}"]) == 0
    assert main(["evaluate", "--stage=backbone", *TINY, DIVIDED[1], f"--workdir={alone}"]) == 0
    ours, theirs = (load_params(folder / "backbone" / "checkpoints")[0] for folder in (workdir, alone))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs)
    ours, theirs = (metrics_log.read(folder / "backbone") for folder in (workdir, alone))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == list(range(1, NUM_STEPS // 5 + 1))
    np.testing.assert_allclose(*([line["loss"] for line in lines] for lines in (ours, theirs)), atol=1e-5)
    ours, theirs = (records.read(folder / "backbone" / "metrics.json") for folder in (workdir, alone))
    np.testing.assert_allclose(*([m["loss"], m["top1"]] for m in (ours, theirs)), atol=1e-5)


def test_a_second_run_is_refused_as_a_whole(servers, tmp_path):
    logs = [tmp_path / "log-0", tmp_path / "log-1"]
    (tmp_path / "run").mkdir()
    with only_run(tmp_path / "run"):
        both = start(servers, ["0", tmp_path / "steps", f"--workdir={tmp_path / 'run'}", *DIVIDED], logs)
        assert ends(both) == [2, 2], logs[0].read_text()
    for log in logs:
        assert f"process {os.getpid()} on" in log.read_text().splitlines()[-1]


def test_without_the_first_process_the_other_ends(servers, tmp_path):
    logs = [tmp_path / "log-0", tmp_path / "log-1"]
    both = start(servers, ["0.6", tmp_path / "steps", f"--workdir={tmp_path / 'run'}", *DIVIDED], logs)
    wait_for_step(tmp_path / "steps", 1, both)
    both[0].kill()
    assert ends(both) == [-signal.SIGKILL, 1]
    assert "process 0 of 2 is lost" in logs[1].read_text().splitlines()[-1]


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(process_id=2, num_processes=2, coordinator="host:1"), "--process_id is 2 of --num_processes=2"),
        (dict(process_id=0, num_processes=2, coordinator=""), "go together"),
        (dict(process_id=0, num_processes=None, coordinator="host:1"), "go together"),
        (dict(process_id=1, num_processes=None, coordinator=""), "--process_id is 1 of --num_processes=1"),
    ],
)
def test_flags_that_do_not_fit(flags, message):
    with pytest.raises(InputError, match=message):
        processes.join(argparse.Namespace(**flags))


def test_flags_default_to_the_environment(monkeypatch):
    for name, value in dict(COORDINATOR_ADDRESS="host:1", NUM_PROCESSES="2", PROCESS_ID="1").items():
        monkeypatch.setenv(f"JAX_{name}", value)
    flags = runpy.run_path(processes.__file__)["FLAGS"]  # they are read when the module is
    assert {name: flag["default"] for name, flag in flags.items()} == dict(
        coordinator="host:1", num_processes="2", process_id="1"
    )


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, False),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, False),  # a batch script, before srun
        ({"SLURM_JOB_ID": "1", "SLURM_STEP_NUM_TASKS": "8"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True),
    ],
)
def test_clusters_are_recognised(environment, expected, monkeypatch):
    for name in ("SLURM_STEP_NUM_TASKS", "KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert processes._in_a_cluster() == expected


def test_a_cluster_without_the_others_is_told(monkeypatch):
    monkeypatch.setattr(processes, "_in_a_cluster", lambda: True)

    def fail(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    flags = argparse.Namespace(coordinator="", num_processes=None, process_id=0)
    with pytest.raises(InputError, match=r"coordinator_address should be defined.*--num_processes=1"):
        processes.join(flags)
    processes.join(argparse.Namespace(coordinator="", num_processes=1, process_id=0))  # asked to be alone
