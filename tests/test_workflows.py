"""The workflows of the public forge, and the API reference that they build."""

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FILES = {path.stem: path for path in (ROOT / ".github" / "workflows").glob("*.yml")}
_spec = importlib.util.spec_from_file_location("api", ROOT / "docs" / "api.py")
assert _spec is not None and _spec.loader is not None
api = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(api)


def workflow(name: str) -> dict:
    return yaml.safe_load(FILES[name].read_text())


def steps(name: str) -> list[dict]:
    return [step for job in workflow(name)["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("name", ["ci", "publish"])
def test_they_run_files_that_are_there_and_extras_that_are_known(name):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    commands = [step["run"] for step in steps(name) if "run" in step]
    assert commands
    for command in commands:
        for file in re.findall(r"(?:bash|python|-c) (\.?\w[\w./]*)", command):
            assert (ROOT / file).is_file(), file
        assert not [extra for extra in re.findall(r"\.\[(\w+)\]", command) if extra not in extras]
    assert all("timeout-minutes" in job for job in workflow(name)["jobs"].values())


def test_ci_runs_the_suite_on_the_oldest_and_the_newest_python():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = [entry.rpartition(" ")[2] for entry in project["classifiers"] if ":: Python :: 3." in entry]
    jobs = workflow("ci")["jobs"]
    assert jobs["test"]["strategy"]["matrix"]["python"] == [known[0], known[-1]]
    assert jobs["package"]["strategy"]["matrix"]["python"] == known
    assert project["requires-python"] == f">={known[0]}"
    assert {"run": "bash .ci/run"} in jobs["test"]["steps"]


def test_only_tags_are_published_and_only_that_job_may_ask_for_a_token():
    found = workflow("publish")
    assert found[True] == {"push": {"tags": ["v*"]}}  # YAML 1.1 reads `on` as true
    assert found["permissions"] == {"contents": "read"} and workflow("ci")["permissions"] == {"contents": "read"}
    jobs = found["jobs"]
    assert [name for name, job in jobs.items() if "permissions" in job] == ["publish"]
    assert jobs["publish"]["permissions"] == {"id-token": "write"} and jobs["publish"]["needs"] == "build"
    assert "password" not in FILES["publish"].read_text()


# The API reference


def test_modules_of_the_reference_are_there():
    assert not [name for name in api.MODULES if importlib.util.find_spec(name) is None]


def test_docstrings_become_markdown():
    docstring = """What it is.

model, images: one, and
  what goes on.
mask (exact): a table:
  'zero'  nothing
          at all
Raises InputError."""
    assert re.sub(r"\n+", "\n", api.markdown(docstring)).splitlines() == [
        "What it is.",
        "**model, images**: one, and",
        "what goes on.",
        "**mask (exact)**: a table:",
        "      'zero'  nothing",
        "              at all",
        "Raises InputError.",
    ]


def test_broken_links_are_found(tmp_path):
    (tmp_path / "a.html").write_text('<a href="b.html#x"><a href="#y"><a href="c.html"><a href="https://z"><h1 id="q">')
    (tmp_path / "b.html").write_text('<h1 id="x"><a href="a.html#q"><script>"<a href="${url}">"</script>')
    assert sorted(api.broken_links(tmp_path)) == ["a.html: #y leads nowhere", "a.html: c.html leads nowhere"]
