"""What is installed: a wheel and a source archive, the configs in them, the version, and what `tif help` says."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import tif_jax
from tif_jax import checked, reducers
from tif_jax.__main__ import _command_names, main
from tif_jax.errors import InputError
from tif_jax.experiment import config as config_file
from tif_jax.experiment import packaged
from tif_jax.experiment.schema import Experiment

ROOT = Path(__file__).parents[1]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
BUILD = "from setuptools import build_meta as b; print(b.build_wheel('out')); print(b.build_sdist('out'))"
LOADS = """
import sys
from pathlib import Path
import tif_jax
from tif_jax.experiment import config, packaged
assert "jax" in sys.modules and tif_jax.__version__ == sys.argv[1], tif_jax.__version__
assert packaged.FOLDER == Path(tif_jax.__file__).parent / "configs" and Path.cwd() in packaged.FOLDER.parents
print([config.load(name).reducer.name for name in ("digits", "imagenette:plain", "tosa:tiny")])
"""


def run(command: list, place: Path, **environment: str) -> str:
    """What a program prints that knows nothing of the source tree."""
    known = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=place, env=known | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A copy of the tree, with the wheel and the source archive in out/."""
    pytest.importorskip("setuptools", minversion="77")
    place = tmp_path_factory.mktemp("built") / "tree"
    shutil.copytree(
        ROOT,
        place,
        ignore=shutil.ignore_patterns(
            ".[!cg]*", ".git", ".gitignore", "runs", "build", "dist", "__pycache__", "*.egg-info"
        ),
    )
    run([sys.executable, "-c", BUILD], place, PYTHONPATH=os.environ.get("PYTHONPATH", ""))
    return place / "out"


def files(folder: str) -> set[str]:
    """What lies in a folder of the tree, less what Python and editors leave there."""
    found = [path for path in (ROOT / folder).rglob("[!.]*") if path.is_file() and "__pycache__" not in path.parts]
    return {str(path.relative_to(ROOT)) for path in found}


def test_a_wheel_has_the_package_and_the_configs_inside_it_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert found == files("tif_jax") | {f"tif_jax/{name}" for name in files("configs")}


def test_a_source_archive_has_what_its_tests_need(built):
    (archive,) = built.glob("*.tar.gz")
    found = {name.partition("/")[2] for name in tarfile.open(archive).getnames()}
    wanted = set.union(*map(files, ("tif_jax", "configs", "tests", "benchmarks", "docs")))
    assert wanted | {"LICENSE", "constraints.txt", ".ci/run", "launch/test.sh", "docs/config.md"} <= found
    assert not [name for name in found if "__pycache__" in name or name.startswith((".venv", "runs", "out"))]


def test_what_the_wheel_brings_finds_its_configs(built, tmp_path):
    """Unpacked anywhere, which is what installing it does; `tosa` shares a file with other configs."""
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    printed = run([sys.executable, "-c", LOADS, VERSION], tmp_path, PYTHONPATH=str(tmp_path))
    assert printed == "['tif', 'tif', 'tosa']\n"


@pytest.mark.long
@pytest.mark.parametrize("form", ["wheel", "sdist", "editable"])
def test_a_fresh_environment(built, tmp_path, form):
    """Downloads what the package depends on."""
    what = {"wheel": [*built.glob("*.whl")], "sdist": [*built.glob("*.gz")], "editable": ["--editable", built.parent]}
    run([sys.executable, "-m", "venv", "environment"], tmp_path)
    installed = tmp_path / "environment" / "bin"
    run([installed / "python", "-m", "pip", "install", "--quiet", *what[form]], tmp_path)
    assert run([installed / "tif", "--version"], tmp_path).startswith(f"tif_jax {VERSION} (")
    assert "digits" in run([installed / "tif", "help", "config"], tmp_path)
    changes = "data.num_train=64 data.num_validation=0 data.num_test=64 backbone.num_epochs=1".split()
    train = ["train", "--stage=backbone", "--config=digits", "--workdir=run", *(f"--config.{each}" for each in changes)]
    run([installed / "tif", *train], tmp_path)
    assert list((tmp_path / "run" / "backbone" / "checkpoints").iterdir())


def test_the_constraints_are_versions_that_the_package_takes():
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
    pinned = {canonicalize_name(name): version for name, version in pinned.items()}
    for text in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), text


# Names of configs


def test_a_config_is_found_by_its_name_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_file.load("digits") == config_file.load(str(ROOT / "configs" / "digits.py"))
    assert config_file.load("imagenette:plain").score.target == "label"
    assert {"digits", "imagenette"} < set(packaged.names()) and "_imagenet2012" not in packaged.names()
    shutil.copy(packaged.FOLDER / "tosa.py", "mine.py")
    assert config_file.load("mine.py:tiny") == config_file.load("tosa:tiny")  # a copy finds the file that ours share


@pytest.mark.parametrize(
    "given, nearest",
    [
        ("digit", "digits"),
        ("imagenete:plain", "imagenette"),
        ("configs/digits.py", "digits"),
        ("min", "mine.py"),
        ("sub/othr.py", "sub/other.py"),
        ("sub", "bat"),
    ],
)
def test_a_name_that_is_neither(tmp_path, monkeypatch, given, nearest):
    (tmp_path / "sub").mkdir()
    for name in ("mine.py", "sub/other.py"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as raised:
        config_file.load(given)
    name = given.partition(":")[0]
    assert str(raised.value).startswith(f"no config file {name}, and no config that comes with the program")
    assert str(raised.value).endswith(f"the nearest is {nearest!r}")


# The version and the help


def test_versions(capsys):
    assert re.fullmatch(r"\d+\.\d+\.\d+", VERSION)
    assert f"\nversion: {VERSION}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {VERSION}" in (ROOT / "CHANGELOG.md").read_text()
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith(f"tif_jax {tif_jax.__version__} (jax ")


def test_every_public_name_is_listed_and_explained():
    assert set(tif_jax.__all__) <= set(dir(tif_jax))
    assert not [name for name in tif_jax.__all__ if not getattr(tif_jax, name).__doc__]


def test_examples_of_the_help_are_commands(capsys):
    assert main(["--help"]) == 0
    examples = re.findall(r"^  tif (\w+) (?:--config (\S+))?", capsys.readouterr().out, re.MULTILINE)
    assert len(examples) >= 3
    for command, name in examples:
        assert command in _command_names()
        assert not name or config_file.load(name)


def test_the_help_comes_at_once():
    """Nothing that takes seconds to import is."""
    code = "import sys, tif_jax; from tif_jax.__main__ import main; main(['--help']); sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize("asked", [["help", "config"], ["--help", "config"], ["-h", "config"]])
def test_help_on_the_config_has_every_key_and_every_config(capsys, asked):
    assert main(asked) == 0
    text = capsys.readouterr().out
    for key in checked.keys(Experiment):
        assert f"\n{key.path} = " in text
    for name in packaged.names():
        assert f"\n  {name} " in text
    assert not [line for line in text.splitlines() if len(line) > 110 and str(packaged.FOLDER) not in line]


def test_help_on_a_section(capsys):
    assert main(["help", "config", "score"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "score" and "score.num_samples = 16" in lines
    assert not [line for line in lines[2:] if not line.startswith(("score.", "    "))]


def test_help_on_the_reducers(capsys):
    assert main(["help", "reducers"]) == 0
    text = capsys.readouterr().out
    assert re.findall(r"^(\w+): ", text, re.MULTILINE) == list(reducers.known())


@pytest.mark.parametrize(
    "asked, nearest", [("confg", "config"), ("config dta", "config data"), ("scroe", "score"), ("reducer", "reducers")]
)
def test_help_on_what_there_is_not(capsys, asked, nearest):
    assert main(["help", *asked.split()]) == 2
    assert f"did you mean `tif help {nearest}`?" in capsys.readouterr().err
