"""The notebook docs/first_steps.ipynb: its cells run, in a shorter version, and what is stored of them is small."""

import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

FILE = Path(__file__).parents[1] / "docs" / "first_steps.ipynb"
SHORTER = {"steps = 600": "steps = 20", "num_train, num_test = 10_000, 500": "num_train, num_test = 640, 64"}


@pytest.fixture(scope="module")
def names():
    """What is defined after the last cell."""
    plt.switch_backend("Agg")
    cells = [cell for cell in json.loads(FILE.read_text())["cells"] if cell["cell_type"] == "code"]
    program = "\n".join("".join(cell["source"]) for cell in cells)
    for long, short in SHORTER.items():
        assert program.count(long) == 1
        program = program.replace(long, short)
    namespace: dict = {}
    exec(program, namespace)
    yield namespace
    plt.close("all")


def test_its_cells_run(names):
    assert len(names["losses"]) == 20 and np.mean(names["losses"][-5:]) < names["losses"][0]
    assert names["impact"].shape == (6, 36)
    assert set(names["table"]) == {"full", "random", "norm", "tome"}
    cost = {name: cost for name, (cost, _) in names["table"].items()}
    assert cost["random"] == cost["norm"] < cost["tome"] < cost["full"]


def test_it_shows_what_it_drew(names):
    pictures, curve = map(plt.figure, plt.get_fignums())
    assert (
        len([axis for axis in pictures.axes if axis.images]) == 12 and pictures.axes[-1].get_ylabel() == "impact (nats)"
    )
    assert {text.get_text() for text in curve.axes[0].texts} == set(names["table"])


def test_it_is_small_and_leads_somewhere():
    text = FILE.read_text()
    assert len(text) < 1_000_000
    for link in re.findall(r"\]\((\w+\.md)[#)]", text):
        assert (FILE.parent / link).exists()
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert len(cells) == 10 and not [out for cell in cells for out in cell["outputs"] if out["output_type"] == "error"]
