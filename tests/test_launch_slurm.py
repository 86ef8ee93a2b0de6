"""slurm.sh and score_array.sh against a fake SLURM."""

import re
import shlex
import shutil
import signal
import subprocess
import time

import pytest
from launched import LAUNCH, PYTHON, TIF, Place, wait_until


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


@pytest.fixture
def cluster(place):
    place.fake("srun", 'exit "${STATUS:-0}"')
    place.fake("squeue", 'echo "${STATE:-RUNNING}"')
    place.fake("scontrol")
    place.fake("sbatch")
    place.fake("python", path=".venv/bin")
    return place


def in_job(cluster, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """As SLURM runs it: a copy elsewhere."""
    elsewhere = cluster.folder / "spool"
    (elsewhere / "launch").mkdir(parents=True)
    shutil.copy(LAUNCH / script, elsewhere / "launch" / script)
    job = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(cluster.folder), "SLURM_CPUS_PER_TASK": "8"}
    return cluster.run(script, *arguments, cwd=elsewhere, **job | environment)


def test_slurm_submits_outside_of_a_job(cluster):
    assert cluster.run("slurm.sh", "--", *TIF).returncode == 0
    assert cluster.calls("sbatch") == [["launch/slurm.sh", *TIF]]
    assert not cluster.calls("srun")


@pytest.mark.parametrize(
    "status, state, requeued",
    [("0", "RUNNING", []), ("1", "RUNNING", []), ("2", "RUNNING", []), ("75", "RUNNING", [["requeue", "7"]])]
    + [("75", state, []) for state in ("COMPLETING", "CANCELLED", "PENDING")],
)
def test_slurm_job(cluster, status, state, requeued):
    done = in_job(cluster, "slurm.sh", *TIF, STATUS=status, STATE=state)
    assert done.returncode == int(status), done.stderr
    assert cluster.calls("srun") == [["--cpus-per-task=8", ".venv/bin/python", "-m", "tif_jax", *TIF]]
    assert cluster.calls("scontrol") == requeued


def test_slurm_job_outlives_sigterm(cluster):
    cluster.fake("srun", "sleep 1; exit 75")
    job = cluster.start("slurm.sh", *TIF, SLURM_JOB_ID="7")
    wait_until(lambda: cluster.calls("srun"))
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=30)
    assert job.returncode == 75
    assert cluster.calls("scontrol") == [["requeue", "7"]]


def test_slurm_without_an_installation(cluster):
    (cluster.folder / ".venv/bin/python").unlink()
    done = in_job(cluster, "slurm.sh", *TIF)
    assert (done.returncode, cluster.calls("srun")) == (2, [])
    assert "bash launch/install.sh" in done.stderr


def test_slurm_submitted_from_elsewhere(cluster):
    done = in_job(cluster, "slurm.sh", *TIF, SLURM_SUBMIT_DIR=str(cluster.bin))
    assert (done.returncode, cluster.calls("srun")) == (2, [])
    assert "submit from the project's folder" in done.stderr


@pytest.mark.parametrize("script", ["slurm.sh", "score_array.sh"])
def test_what_slurm_is_asked_for(script):
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", (LAUNCH / script).read_text(), re.MULTILINE))
    assert {"requeue", "open-mode"} <= asked.keys()
    assert re.fullmatch(r"TERM@\d+", asked["signal"])  # with B: it would reach the shell alone
    if script == "slurm.sh":
        assert asked["ntasks-per-node"] == asked["gpus-per-node"]


def test_dry_run_of_slurm(cluster):
    done = cluster.run("slurm.sh", "--dry-run", *TIF)
    assert done.returncode == 0
    submit, step = (shlex.split(line) for line in done.stdout.splitlines())
    assert submit == ["+", "sbatch", "launch/slurm.sh", *TIF]
    assert step == ["+", "srun", "--cpus-per-task=1", ".venv/bin/python", "-m", "tif_jax", *TIF]
    assert not cluster.calls_file.exists()


SCORE = ["--config", "c d.py", "--workdir", "w"]


def scored(place) -> list[int]:
    """The parts of PARTS=5 that were begun, in order."""
    calls = place.calls("python", "-m", "tif_jax", "score", *SCORE)
    return [int(re.fullmatch(r"--config\.score\.part=(\d)/5", part)[1]) for (part,) in calls]


@pytest.mark.parametrize("jobs", [1, 2, 5, 7])
def test_every_part_is_scored_once(cluster, jobs):
    cluster.fake("python", 'echo "${CUDA_VISIBLE_DEVICES-all}" >>"$FAKE/gpus"', path=".venv/bin")
    done = cluster.run("score_array.sh", "--parts=5", "--jobs", str(jobs), *SCORE)
    assert done.returncode == 0, done.stderr
    assert sorted(scored(cluster)) == [1, 2, 3, 4, 5]
    gpus = sorted((cluster.folder / "gpus").read_text().split())
    assert gpus == (["all"] * 5 if jobs == 1 else sorted(str(part % jobs) for part in range(5)))


@pytest.mark.parametrize(
    "statuses, expected", [({2: 75}, 75), ({2: 75, 3: 1}, 1), ({3: 2}, 2), ({2: 1, 1: 75}, 1), ({}, 0)]
)
def test_the_status_of_a_failure_is_passed_on(cluster, statuses, expected):
    cases = "".join(f"*part={part}/5) exit {status} ;; " for part, status in statuses.items())
    cluster.fake("python", f'case "$*" in {cases} esac' if cases else "", path=".venv/bin")
    assert cluster.run("score_array.sh", "--parts", "5", "--jobs=5", *SCORE).returncode == expected


def test_scoring_processes_are_stopped_together(cluster):
    cluster.fake("python", PYTHON.replace("echo stopped", 'echo >>"$FAKE/stopped"'), path=".venv/bin")
    job = cluster.start("score_array.sh", "--parts=5", "--jobs=2", *SCORE)
    wait_until(lambda: len(scored(cluster)) == 2)
    time.sleep(0.3)  # until they have their traps
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=30)
    assert job.returncode == 75
    assert (cluster.folder / "stopped").read_text().count("\n") == 2
    assert sorted(scored(cluster)) == [1, 2]


@pytest.mark.parametrize("status", ["0", "75"])
def test_score_array_in_slurm(cluster, status):
    task = {"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "10", "SLURM_ARRAY_TASK_ID": "3"}
    done = in_job(cluster, "score_array.sh", "--parts", "5", "--", *SCORE, STATUS=status, **task)
    assert done.returncode == int(status)
    (call,) = cluster.calls("srun", "--cpus-per-task=8")
    assert call == [".venv/bin/python", "-m", "tif_jax", "score", *SCORE, "--config.score.part=3/5"]
    # 12 is task 3; of the last task of an array the number is that of the array, which stands for all tasks.
    assert cluster.calls("scontrol") == ([["requeue", "10_3"]] if status == "75" else [])
    assert all("10_3" in call for call in cluster.calls("squeue"))


def test_dry_run_of_score_array(cluster):
    done = cluster.run("score_array.sh", "--dry-run", "--parts=5", "--jobs=2", *SCORE)
    printed = [shlex.split(line) for line in done.stdout.splitlines()]
    assert sorted(words[-1] for words in printed) == [f"--config.score.part={k}/5" for k in range(1, 6)]
    assert all(words[3:-1] == [".venv/bin/python", "-m", "tif_jax", "score", *SCORE] for words in printed)
    assert not cluster.calls_file.exists()
