"""A run of two processes with two devices each: it computes what one process does, ends as one, and goes on."""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from trainer import NUM_STEPS, TINY

from tif_jax import metrics_log, processes, records, state
from tif_jax.__main__ import main
from tif_jax.errors import InputError

TRAINER = str(Path(__file__).with_name("trainer.py"))
# Parameters are divided over all four devices, so that each process writes half of a checkpoint.
DIVIDED = ["--config.sharding.fsdp=4", "--config.backbone.num_epochs=2.0"]


def start(command, folder):
    """Both processes of a command."""
    with socket.create_server(("localhost", 0)) as free:
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": "2",
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
    }
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=environment | {"JAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            stderr=(folder / f"log-{i}").open("w"),
            text=True,
        )
        for i in range(2)
    ]


def ends(both):
    return [process.wait(timeout=120) for process in both], [process.communicate()[0] for process in both]


def wait_for_step(file, step, both):
    while not file.exists() or int(file.read_text() or 0) < step:
        assert all(process.poll() is None for process in both)
        time.sleep(0.05)


def test_stopped_killed_and_finished_it_is_as_one_process(tmp_path):
    workdir, logs = tmp_path / "run", [tmp_path / "log-0", tmp_path / "log-1"]
    training = [TRAINER, "0.6", str(tmp_path / "steps"), f"--workdir={workdir}", *DIVIDED]

    both = start(training, tmp_path)
    wait_for_step(tmp_path / "steps", 5, both)
    both[1].send_signal(signal.SIGTERM)  # one is told, both stop, at the same step
    assert ends(both)[0] == [75, 75], logs[0].read_text()
    checkpoints = workdir / "backbone" / "checkpoints"
    with state.Checkpoints(checkpoints) as found:
        saved, stopped = found.steps()
    assert saved == NUM_STEPS // 5 // 2 < stopped
    parts = {part.name for part in (checkpoints / str(stopped) / "params").glob("ocdbt.process_*")}
    assert parts == {"ocdbt.process_0", "ocdbt.process_1"}

    (tmp_path / "steps").unlink()
    both = start(training, tmp_path)
    wait_for_step(tmp_path / "steps", 1, both)
    both[1].kill()
    began = time.monotonic()
    assert ends(both)[0] == [1, -signal.SIGKILL] and time.monotonic() - began < 30
    assert "process 1 of 2 is lost" in logs[0].read_text().splitlines()[-1]

    # What only one of the processes finds damaged is damaged for both.
    for file in (checkpoints / str(stopped) / "params" / "ocdbt.process_1").rglob("d/*"):
        file.write_bytes(b"")
    both = start([TRAINER, "0", str(tmp_path / "steps"), f"--workdir={workdir}", *DIVIDED, "evaluate"], tmp_path)
    assert ends(both)[0] == [0, 0], logs[0].read_text()
    assert f"{stopped} is damaged" in logs[0].read_text() and f"steps {saved} to 8" in logs[0].read_text()
    assert "backbone: 8 of 8 step" in logs[0].read_text() and "8 of 8 step" not in logs[1].read_text()

    alone = tmp_path / "alone"
    assert main(["train", "--stage=backbone", *TINY, DIVIDED[1], f"--workdir={alone}"]) == 0
    assert main(["evaluate", "--stage=backbone", *TINY, DIVIDED[1], f"--workdir={alone}"]) == 0
    ours, theirs = (state.load_params(folder / "backbone" / "checkpoints")[0] for folder in (workdir, alone))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs)
    ours, theirs = (metrics_log.read(folder / "backbone") for folder in (workdir, alone))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == list(range(1, NUM_STEPS // 5 + 1))
    np.testing.assert_allclose(*([line["loss"] for line in lines] for lines in (ours, theirs)), atol=1e-5)
    ours, theirs = (records.read(folder / "backbone" / "metrics.json") for folder in (workdir, alone))
    np.testing.assert_allclose(*([m["loss"], m["top1"]] for m in (ours, theirs)), atol=1e-5)


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
