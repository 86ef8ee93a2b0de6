"""The launch scripts against fake gcloud, srun and the like, which note how they were called; what the YAML files say."""

import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import pytest
import yaml

from tif_jax import commands
from tif_jax.experiment import config as config_file

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
TOOLS = (
    "bash cat chmod cp date dirname env flock git grep gzip head id mkdir mktemp rm sed setsid sleep tail tar tee touch true"
).split()
TIF = ["train", "--stage", "finetune", "--config", "configs/digits.py", "--config.x=(1, 2)", "--workdir", "it's a\tdir"]
VM = ["--name=tpu", "--zone", "us-central1-a", "--type=v5litepod-16", "--pause=0"]


class Place:
    """A copy of the project's launch folder, with programs of ours before (and few others) on PATH."""

    def __init__(self, folder: Path):
        self.folder, self.bin, self.calls_file = folder, folder / "bin", folder / "calls"
        self.bin.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        shutil.copytree(LAUNCH, folder / "launch")
        self.environment = {"PATH": str(self.bin), "HOME": str(folder), "FAKE": str(folder)}

    def fake(self, name: str, body: str = "", path: str = "bin") -> None:
        """A program that notes its name and arguments (see `calls`), then does what `body` says."""
        program = self.folder / path / name
        program.parent.mkdir(parents=True, exist_ok=True)
        # In one piece, as several may do so at once.
        note = f"""{{ printf '%s\\0' {name} "$@"; echo; }} >"$FAKE/call.$$"; cat "$FAKE/call.$$" >>"$FAKE/calls"\n"""
        program.write_text(f"#!{shutil.which('bash')}\n{note}{body}\n")
        program.chmod(0o755)

    def calls(self, *beginning: str) -> list[list[str]]:
        """The arguments of each call that begins so, without the beginning."""
        text = self.calls_file.read_text() if self.calls_file.exists() else ""
        every = [line.split("\0")[:-1] for line in text.splitlines()]
        return [call[len(beginning) :] for call in every if call[: len(beginning)] == list(beginning)]

    def start(self, script: str, *arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", str((cwd or self.folder) / "launch" / script), *arguments],
            cwd=self.folder, env=self.environment | environment, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def run(self, script: str, *arguments: str, **options) -> subprocess.CompletedProcess:
        process = self.start(script, *arguments, **options)
        stdout, stderr = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def wait_until(condition) -> None:
    for _ in range(300):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("waited for 30 s")


# All of them


@pytest.mark.parametrize("script", ["tpu_vm.sh", "slurm.sh", "score_array.sh"])
def test_help(place, script):
    done = place.run(script, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ") and "--dry-run" in done.stdout


@pytest.mark.parametrize("script, arguments, tool", [("tpu_vm.sh", [*VM, *TIF], "gcloud"), ("slurm.sh", TIF, "sbatch")])
def test_a_tool_that_is_missing(place, script, arguments, tool):
    done = place.run(script, *arguments)
    assert done.returncode == 2
    assert re.fullmatch(rf"{tool} is not installed .*\n", done.stderr)


@pytest.mark.parametrize(
    "script, arguments, says",
    [
        ("tpu_vm.sh", VM, "what is tif to do"),
        ("tpu_vm.sh", [*VM[1:], *TIF], "--name, --zone and --type are needed"),
        ("tpu_vm.sh", [*VM, "--spots", *TIF], "unknown flag --spots"),
        ("tpu_vm.sh", ["--name", "--zone", "z", *TIF], "--name needs a value"),
        ("slurm.sh", [], "usage"),
        ("score_array.sh", ["--config=c.py"], "usage"),
        ("score_array.sh", ["--parts=none", "--config=c.py"], "--parts is none; it is a number from 1"),
        ("score_array.sh", ["--parts", "2", "--config=c.py"], "no .venv"),
    ],
)
def test_mistakes(place, script, arguments, says):
    done = place.run(script, *arguments)
    assert done.returncode == 2
    assert says in done.stdout + done.stderr


def test_every_file_is_in_the_readme():
    readme = (LAUNCH / "README.md").read_text()
    assert not [path.name for path in LAUNCH.iterdir() if f"launch/{path.name}" not in readme and path.suffix != ".md"]


def test_install_takes_the_python_of_uv(place):
    place.fake("python", '[[ "$1 $2" != "-m venv" ]] || { mkdir -p .venv/bin; cp "$0" .venv/bin/python; }', path="uv")
    place.fake("uv", f'[[ "$2" != find ]] || echo {place.folder}/uv/python')
    done = place.run("install.sh", "tpu")
    assert done.returncode == 0, done.stderr
    assert place.calls("uv") == [["python", "install", "3.12"], ["python", "find", "3.12"]]
    assert place.calls("python")[-1][-2:] == ["--editable", ".[tpu]"]


# tpu_vm.sh

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


# tpu_worker.sh

# Runs until it is told to stop or `$FAKE/go_on` appears.
PYTHON = r"""
trap 'echo stopped; exit 75' TERM
echo begun
while [[ ! -e "$FAKE/go_on" ]]; do sleep 0.1; done
exit "$(cat "$FAKE/go_on")"
"""


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


# slurm.sh


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


# score_array.sh

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


# jobset.yaml, sky.yaml


def jobset(accelerator: str) -> dict:
    """The file as it is, or as the sed command of its heading makes it."""
    text = (LAUNCH / "jobset.yaml").read_text()
    if accelerator == "gpu":
        command = re.search(r"(sed .*) launch/jobset\.yaml \|", text)[1]
        text = subprocess.check_output(shlex.split(command), input=text, text=True)
    return yaml.safe_load(text)


@pytest.fixture(params=["tpu", "gpu"])
def accelerator(request):
    return request.param


def test_processes_of_the_jobset_find_each_other(accelerator):
    manifest = jobset(accelerator)
    (replicated,) = manifest["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    environment = {variable["name"]: variable for variable in container["env"]}
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"] == int(environment["JAX_NUM_PROCESSES"]["value"])
    assert replicated["replicas"] == 1
    index = environment["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert index == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    host, port = environment["JAX_COORDINATOR_ADDRESS"]["value"].split(":")
    name = manifest["metadata"]["name"]
    assert host == f"{name}-{replicated['name']}-0-0.{name}"
    assert manifest["spec"]["network"]["enableDNSHostnames"] is True
    assert container["ports"] == [{"containerPort": int(port)}]


def test_jobset_is_started_again_unless_tif_failed(accelerator):
    policy = jobset(accelerator)["spec"]["failurePolicy"]
    job = jobset(accelerator)["spec"]["replicatedJobs"][0]["template"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {"containerName": "tif", "operator": "In", "values": [2]}
    assert [r["action"] for r in policy["rules"]] == ["FailJobSet"]
    assert policy["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert policy["maxRestarts"] > 0
    assert job["backoffLimit"] == 0  # no pod alone
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # a pod failure policy asks for it
    assert rule["onExitCodes"]["containerName"] in [container["name"] for container in pod["containers"]]


def test_volumes_and_devices_of_the_jobset(accelerator):
    job = jobset(accelerator)["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert [mount["name"] for mount in container["volumeMounts"]] == [volume["name"] for volume in pod["volumes"]]
    assert job["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    (volume,) = pod["volumes"]
    assert "metadata-cache:ttl-secs:0" in volume["csi"]["volumeAttributes"]["mountOptions"].split(",")
    (device, count), *others = container["resources"]["limits"].items()
    assert not others
    if accelerator == "tpu":
        topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
        assert device == "google.com/tpu"
        assert count * job["completions"] == math.prod(map(int, topology.split("x")))
    else:
        assert device == "nvidia.com/gpu"
        assert pod["nodeSelector"].keys() == {"cloud.google.com/gke-accelerator"}
    assert [container["command"], container["image"]] == [["python", "-m", "tif_jax"], "IMAGE"]


def sky(run: str, place, **environment: str) -> subprocess.CompletedProcess:
    place.fake("python", 'env | grep ^JAX_ >"$FAKE/joined" || true', path=".venv/bin")
    bash = shutil.which("bash")
    environment = {**place.environment, **environment}
    return subprocess.run([bash, "-c", run], cwd=place.folder, env=environment, check=True)


@pytest.mark.parametrize("num_nodes", [1, 3])
def test_processes_of_sky_find_each_other(place, num_nodes):
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    ips = "\n".join(f"10.0.0.{i}" for i in range(1, num_nodes + 1))
    given = {"SKYPILOT_NODE_IPS": ips, "SKYPILOT_NUM_NODES": str(num_nodes), "SKYPILOT_NODE_RANK": str(num_nodes - 1)}
    sky(task["run"], place, **given, TIF=shlex.join(TIF))
    assert place.calls("python") == [["-m", "tif_jax", *TIF]]
    joined = dict(line.split("=") for line in (place.folder / "joined").read_text().splitlines())
    whole = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:8476", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}
    assert joined == (whole if num_nodes == 3 else {})


def test_sky_recovers_from_75_alone():
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    assert task["resources"]["job_recovery"] == {"recover_on_exit_codes": [75]}
    assert task["workdir"] == "."
    assert task["envs"].keys() == {"TIF"}


@pytest.mark.parametrize("file", ["jobset.yaml", "sky.yaml"])
def test_the_commands_in_yaml_are_tifs(file):
    document = yaml.safe_load((LAUNCH / file).read_text())
    if file == "sky.yaml":
        command, mounts = shlex.split(document["envs"]["TIF"]), list(document["file_mounts"])
    else:
        pod = document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
        command = pod["containers"][0]["args"]
        mounts = [mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]]
    assert (Path(commands.__path__[0]) / f"{command[0]}.py").exists()
    flags = dict(argument.removeprefix("--").split("=") for argument in command[1:])
    overrides = [f"--{name}={value}" for name, value in flags.items() if name.startswith("config.")]
    config = config_file.load(str(ROOT / flags["config"]), overrides)
    for path in (flags["workdir"], config.data.root):
        assert any(path.startswith(f"{mount}/") for mount in mounts)
