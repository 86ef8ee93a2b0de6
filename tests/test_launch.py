"""The launch scripts: their help, what they say to mistakes, and the installation."""

import re

import pytest
from launched import LAUNCH, TIF, VM, Place


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


@pytest.mark.parametrize("script", ["tpu_vm.sh", "slurm.sh", "score_array.sh"])
def test_help(place, script):
    done = place.run(script, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ") and "--dry-run" in done.stdout


def test_help_of_the_local_script_installs_nothing(place):
    done = place.run("local.sh", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Installs into .venv") and not (place.folder / ".venv").exists()


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
