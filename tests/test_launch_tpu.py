"""tpu_vm.sh against a fake gcloud, and tpu_worker.sh, which it starts on every host."""

import os
import shlex
import signal
import subprocess
import tarfile

import pytest
from launched import PYTHON, TIF, VM, Place, wait_until


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


# A TPU VM whose state is in a file. `runs` lists the exit statuses of the coming runs, and the states they leave behind.
GCLOUD = r"""
next() { head -n 1 "$FAKE/$1" 2>/dev/null; sed -i 1d "$FAKE/$1"; }
case "$4 $*" in
  describe*)
    [[ -e "$FAKE/state" ]] || { echo "ERROR: (gcloud.compute.tpus.tpu-vm.describe) NOT_FOUND: Resource" >&2; exit 1; }
    cat "$FAKE/state" ;;
  create*)
    refusal="$(next refusals)"
    [[ -z "$refusal" ]] || { echo "$refusal" >&2; exit 1; }
    echo READY >"$FAKE/state" ;;
  delete*) rm "$FAKE/state" ;;
  scp*) cp "$5" "$FAKE/shipped.tar.gz" ;;
  ssh*install*) ;;
  ssh*)
    read -r status state < <(next runs)
    [[ -z "$state" ]] || echo "$state" >"$FAKE/state"
    exit "$status" ;;
esac
"""


@pytest.fixture
def cloud(place):
    place.fake("gcloud", GCLOUD)
    (place.folder / "refusals").touch()
    subprocess.run(["git", "init", "--quiet", place.folder], check=True)
    (place.folder / ".gitignore").write_text("bin/\n.venv/\n")
    return place


def tpu_vm(cloud, runs: list[str], *flags: str, state: str = "") -> subprocess.CompletedProcess:
    (cloud.folder / "runs").write_text("".join(f"{run}\n" for run in runs))
    if state:
        (cloud.folder / "state").write_text(state)
    return cloud.run("tpu_vm.sh", *VM, *flags, "--", *TIF)


def verbs(cloud) -> str:
    """What gcloud was asked for, without `describe`: create, scp, install, run, delete."""
    calls = [call for call in cloud.calls("gcloud", "compute", "tpus", "tpu-vm") if call[0] != "describe"]
    return " ".join("install" if "install" in " ".join(c) else "run" if c[0] == "ssh" else c[0] for c in calls)


def remote_commands(cloud, action: str) -> list[list[str]]:
    """The arguments that the workers' shells hand to tpu_worker.sh."""
    sent = [call[-1].removeprefix("--command=") for call in cloud.calls("gcloud", "compute", "tpus", "tpu-vm", "ssh")]
    script = 'bash() { printf "%s\\0" "$@"; }; mkdir() { :; }; tar() { :; }\n'
    given = [subprocess.check_output(["sh", "-c", script + command], text=True).split("\0")[:-1] for command in sent]
    assert all(arguments[0] == "tif_jax/launch/tpu_worker.sh" for arguments in given)
    return [arguments[2:] for arguments in given if arguments[1] == action]


def test_tpu_vm_is_made_installed_and_run(cloud):
    done = tpu_vm(cloud, ["0"], "--spot", "--bucket=gs://my-bucket", "--project", "p")
    assert done.returncode == 0, done.stderr
    assert verbs(cloud) == "create scp install run"
    calls = cloud.calls("gcloud", "compute", "tpus", "tpu-vm")
    assert all({"--zone=us-central1-a", "--project=p"} <= set(call) for call in calls)
    assert all("--worker=all" in call for call in calls if call[0] in ("ssh", "scp"))
    create = cloud.calls("gcloud", "compute", "tpus", "tpu-vm", "create")[0]
    assert {"tpu", "--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite", "--spot"} <= set(create)
    assert remote_commands(cloud, "install") == [["my-bucket"]]
    ((bucket, _, *arguments),) = remote_commands(cloud, "run")
    assert (bucket, arguments) == ("my-bucket", TIF)
    assert "still there and is paid for" in done.stderr


def test_the_working_tree_is_shipped(cloud):
    (cloud.folder / "my reducer.py").touch()
    (cloud.folder / ".venv").mkdir()
    (cloud.folder / ".venv/big").touch()
    tpu_vm(cloud, ["0"])
    with tarfile.open(cloud.folder / "shipped.tar.gz") as archive:
        names = archive.getnames()
    assert {"launch/tpu_worker.sh", "launch/install.sh", "my reducer.py"} <= set(names)
    assert not [name for name in names if name.startswith((".venv", ".git/", "bin/"))]


@pytest.mark.parametrize(
    "runs, expected, status",
    [
        (["0"], "run", 0),
        (["42"], "run", 2),  # a mistake of the user's
        (["41"], "run", 1),  # failed
        (["43"], "run", 1),  # somebody else runs there now
        (["75", "0"], "run run", 0),
        (["134", "137", "0"], "run run run", 0),  # a process died and took the others with it
        (["134"] * 9, "run run run run run", 1),
        (["134", "134", "75"] * 3 + ["0"], " ".join(["run"] * 10), 0),  # only those in a row count
        (["255 PREEMPTED", "0"], "run delete create scp install run", 0),
        (["75 PREEMPTED", "41 TERMINATED", "0"], "run" + " delete create scp install run" * 2, 0),
    ],
)
def test_what_becomes_of_a_run(cloud, runs, expected, status):
    done = tpu_vm(cloud, runs, state="READY")
    assert verbs(cloud) == f"scp install {expected}"
    assert done.returncode == status, done.stderr


def test_only_a_lost_connection_leaves_the_attempt_the_same(cloud):
    tpu_vm(cloud, ["255", "1", "75", "134", "0"])
    attempts = [attempt for _, attempt, *_ in remote_commands(cloud, "run")]
    numbers = [int(attempt.split("-")[-1]) for attempt in attempts]
    assert numbers == [1, 1, 1, 2, 3]
    assert len({attempt.rpartition("-")[0] for attempt in attempts}) == 1


def test_a_preempted_vm_from_before_is_made_again(cloud):
    assert tpu_vm(cloud, ["0"], state="PREEMPTED").returncode == 0
    assert verbs(cloud) == "delete create scp install run"


@pytest.mark.parametrize(
    "refusal, status, expected",
    [
        ('There is no more capacity in the zone "us-central1-a"', 0, "create create scp install run"),
        ("Quota limit 'TPUV5sLitepodPerProjectPerZone' has been exceeded.", 2, "create"),
    ],
)
def test_creation_refused(cloud, refusal, status, expected):
    (cloud.folder / "refusals").write_text(f"{refusal}\n")
    done = tpu_vm(cloud, ["0"])
    assert (done.returncode, verbs(cloud)) == (status, expected)
    assert refusal in done.stderr


def test_gcloud_that_does_not_answer(cloud):
    cloud.fake("gcloud", "echo 'ERROR: you do not have an active account' >&2; exit 1")
    done = tpu_vm(cloud, [])
    assert done.returncode == 2
    assert "active account" in done.stderr
    assert verbs(cloud) == ""


@pytest.mark.parametrize("status", ["0", "42"])
def test_delete_in_the_end(cloud, status):
    tpu_vm(cloud, [status], "--delete")
    assert verbs(cloud) == "create scp install run delete"


def test_dry_run_of_tpu_vm(cloud):
    done = tpu_vm(cloud, [], "--dry-run", "--delete")
    assert done.returncode == 0, done.stderr
    assert not cloud.calls("gcloud")
    printed = [shlex.split(line.removeprefix("+ ")) for line in done.stdout.splitlines()]
    assert [words[4] for words in printed] == ["describe", "create", "scp", "ssh", "ssh", "delete"]
    assert shlex.split(printed[4][-1].removeprefix("--command="))[-len(TIF) :] == TIF


@pytest.fixture
def worker(place):
    place.fake("python", PYTHON, path=".venv/bin")
    yield place
    (place.folder / "go_on").write_text("0")


def begun(worker) -> bool:
    log = worker.folder / "tif.log"
    return log.exists() and "begun" in log.read_text()


@pytest.mark.parametrize("status, seen", [(0, 0), (1, 41), (2, 42), (134, 134)])
def test_worker_runs_tif(worker, status, seen):
    (worker.folder / "go_on").write_text(str(status))
    done = worker.run("tpu_worker.sh", "run", "", "1", *TIF)
    assert done.returncode == seen, done.stderr
    assert done.stdout == "begun\n"
    assert worker.calls("python") == [["-m", "tif_jax", *TIF]]


def test_a_lost_connection_does_not_end_the_run(worker):
    connection = worker.start("tpu_worker.sh", "run", "", "1", *TIF)
    wait_until(lambda: begun(worker))
    os.killpg(connection.pid, signal.SIGKILL)
    connection.communicate(timeout=30)
    again = worker.start("tpu_worker.sh", "run", "", "1", *TIF)
    assert again.stdout.readline() == "begun\n"
    (worker.folder / "go_on").write_text("75")
    again.communicate(timeout=30)
    assert again.returncode == 75
    assert worker.run("tpu_worker.sh", "run", "", "1", *TIF).returncode == 75  # asked once more, too late
    assert len(worker.calls("python")) == 1


def test_a_new_attempt_stops_the_earlier_one(worker):
    first = worker.start("tpu_worker.sh", "run", "", "1", *TIF)
    wait_until(lambda: begun(worker))
    second = worker.start("tpu_worker.sh", "run", "", "2", *TIF)
    assert "stopped" in first.communicate(timeout=30)[0]
    assert first.returncode == 43
    (worker.folder / "go_on").write_text("0")
    assert "stopping the earlier run" in second.communicate(timeout=30)[1]
    assert second.returncode == 0
    assert len(worker.calls("python")) == 2


@pytest.mark.parametrize("mounted", [False, True])
def test_worker_mounts_the_bucket_once(worker, mounted):
    (worker.folder / "go_on").write_text("0")
    worker.fake("mountpoint", "exit 0" if mounted else "exit 1")
    worker.fake("sudo")
    worker.fake("gcsfuse")
    worker.run("tpu_worker.sh", "run", "my-bucket", "1", *TIF)
    assert worker.calls("mountpoint") == [["-q", "/mnt/my-bucket"]]
    calls = worker.calls("gcsfuse")
    assert len(calls) == (0 if mounted else 1)
    for call in calls:
        assert call[-2:] == ["my-bucket", "/mnt/my-bucket"]
        assert {"--metadata-cache-ttl-secs=0", "--metadata-cache-negative-ttl-secs=0"} <= set(call)


def test_worker_installs(place):
    place.fake("uv")
    for name in ("sudo", "curl", "lsb_release"):
        place.fake(name, "cat >/dev/null")
    place.fake("install.sh", path="launch")
    done = place.run("tpu_worker.sh", "install", "my-bucket")
    assert done.returncode == 0, done.stderr
    assert place.calls("install.sh") == [["tpu"]]
    assert place.calls("sudo")[-1] == ["apt-get", "install", "-qy", "gcsfuse"]
