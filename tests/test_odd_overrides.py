"""Odd values for every key of a config, in bounded memory: a line and status 2 or 1, or success; no trace, no 2 GB."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from odd_overrides import SCORED, TRAINED

from tif_jax import checked
from tif_jax.checked import shown

LOG = re.compile(r"\d\d:\d\d:\d\d ")


@pytest.fixture(scope="module", params=["some", pytest.param("", marks=pytest.mark.long)], ids=["some", "all"])
def outcomes(request, tmp_path_factory):
    """(all lines, folder): of each call its arguments, status and what came on stderr; at last the memory taken."""
    folder = tmp_path_factory.mktemp("odd")
    program = Path(__file__).with_name("odd_overrides.py")
    done = subprocess.run([sys.executable, program, folder, request.param], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()], folder


def told(outcome):
    """The one line in which the program says how it failed; before it there is nothing but the log."""
    *log, line = outcome["stderr"].splitlines()
    room = 1000 + len(outcome["call"][1]) * ("no such file" in line)
    assert line.startswith("tif ") and len(line) < room, outcome["call"]
    assert all(LOG.match(entry) for entry in log), outcome
    return line


def test_every_key(outcomes, request):
    loaded = [outcome for outcome in outcomes[0][:-1] if outcome["call"][0] == "loaded"]
    assert len(loaded) > (200 if "all" in request.node.name else 150)
    refused = [outcome for outcome in loaded if outcome["status"]]
    assert all(outcome["status"] == 2 and told(outcome) for outcome in refused)
    assert len(refused) > 0.8 * len(loaded)
    assert not any("Traceback" in outcome["stderr"] for outcome in loaded)


@pytest.mark.parametrize("override", SCORED + TRAINED, ids=lambda text: text[:40].encode("ascii", "replace").decode())
def test_what_there_is_not_enough_of(outcomes, override):
    (outcome,) = (o for o in outcomes[0][:-1] if o["call"][1] == override and o["call"][0] != "loaded")
    if outcome["status"]:
        assert outcome["status"] in (1, 2) and told(outcome)
        assert "is damaged" not in outcome["stderr"]
    else:  # more than there is, and taken for all that there is
        assert override.split("=")[0] in ("score.batch_size", "score.chunk", "score.num_images")


def test_memory_and_nothing_executed(outcomes):
    lines, folder = outcomes
    assert lines[-1]["peak"] < 2e9
    assert not (folder / "evil").exists()


@pytest.mark.parametrize("value", [10**400, -(10**400), float("nan"), "x" * 10**6, [[]] * 10**5])
def test_values_of_a_file(value):
    """Of a config in Python, whose values no parser has seen: numbers too long to print, or for a float."""
    for kind in (int, float, str, tuple[float, ...], int | tuple[int, int]):
        try:
            checked.value_of(kind, value, "key", checked.Range(least=0, most=9))
        except checked.InputError as error:
            assert str(error).startswith("key is ") and len(str(error)) < 500
    assert len(shown(value)) <= 200 and len(shown(10**5000)) < 200
