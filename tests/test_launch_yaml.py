"""What jobset.yaml, score_job.yaml and sky.yaml say, and the image."""

import math
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from launched import LAUNCH, ROOT, TIF, Place

from tif_jax import commands
from tif_jax.experiment import config as config_file


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def manifest_in(file: str, is_changed: bool) -> dict:
    """The file as it is, or as the sed command of its heading makes it."""
    text = (LAUNCH / file).read_text()
    if is_changed:
        command = re.search(rf"(sed .*) launch/{re.escape(file)}", text)[1]
        text = subprocess.check_output(shlex.split(command), input=text, text=True)
    return yaml.safe_load(text)


def jobset(accelerator: str) -> dict:
    return manifest_in("jobset.yaml", accelerator == "gpu")


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


def test_pods_of_the_score_job_divide_the_images(accelerator, place):
    job = manifest_in("score_job.yaml", accelerator == "tpu")["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    parts, alone = container["env"]
    # Else each would look for the others, as JAX_NUM_PROCESSES is not set and an indexed job has many pods.
    assert alone == {"name": "JAX_NUM_PROCESSES", "value": "1"}
    assert job["completionMode"] == "Indexed" and job["completions"] == int(parts["value"])
    place.fake("python")
    for index in (0, job["completions"] - 1):
        environment = {**place.environment, "PARTS": parts["value"], "JOB_COMPLETION_INDEX": str(index)}
        sh = shutil.which("sh")
        subprocess.run([sh, *container["command"][1:], *container["args"]], env=environment, check=True)
    given = [["-m", "tif_jax", "score", *container["args"], f"--config.score.part={k}/64"] for k in (1, 64)]
    assert place.calls("python") == given
    of_device = container["resources"]["limits"]
    assert of_device == ({"nvidia.com/gpu": 1} if accelerator == "gpu" else {"google.com/tpu": 1})
    assert all(key.startswith("cloud.google.com/gke-") for key in pod["nodeSelector"])
    fails, ignored = job["podFailurePolicy"]["rules"]
    assert fails["action"] == "FailJob" and fails["onExitCodes"]["values"] == [2]
    assert ignored["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert (
        pod["volumes"] == jobset("tpu")["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["volumes"]
    )


def test_the_image_can_be_built_for_every_accelerator():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    text = (LAUNCH / "Dockerfile").read_text()
    assert {"tpu", "cuda12", "cuda13"} <= extras.keys() and "ARG EXTRA" in text and '".[${EXTRA:?' in text
    assert "--constraint constraints.txt" in text and (ROOT / "constraints.txt").exists()


@pytest.mark.parametrize("file", ["jobset.yaml", "score_job.yaml", "sky.yaml"])
def test_the_commands_in_yaml_are_tifs(file):
    document = yaml.safe_load((LAUNCH / file).read_text())
    if file == "sky.yaml":
        command, mounts = shlex.split(document["envs"]["TIF"]), list(document["file_mounts"])
    elif file == "score_job.yaml":
        (container,) = document["spec"]["template"]["spec"]["containers"]
        command = ["score", *container["args"]]
        mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
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
