"""Images that can not be read, and splits that are not there, at every stage of a small project."""

import json
import shutil

import numpy as np
import pytest
from small_project import last_line, tif

from tif_jax.commands.evaluate import _batches
from tif_jax.data import open_source
from tif_jax.errors import InputError
from tif_jax.experiment import config as config_file
from tif_jax.impact.shards import read_impact
from tif_jax.runtime import records

SKIP = "--config.data.on_error=skip"


@pytest.fixture
def place(place):
    """With nothing scored."""
    shutil.rmtree(place / "run" / "impact")
    return place


def cut(place, numbers):
    for i in numbers:
        (place / "data" / f"{i}.png").write_bytes(b"\x89PNG")


def test_what_can_not_be_read_is_neither_scored_nor_counted(place, capsys):
    cut(place, [0, 1, 6])
    assert tif(f"score {SKIP}") == 0
    table = read_impact(place / "run")
    assert table.index.tolist() == [2, 3, 4, 5, 7] and table.id.tolist() == [f"{i}.png" for i in (2, 3, 4, 5, 7)]
    assert np.abs(table.impact).max() > 0
    assert tif(f"train --stage=filter {SKIP}") == 0
    capsys.readouterr()
    assert tif(f"evaluate --stage=backbone {SKIP}") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["num_images"] == 5 and records.read(place / "run/backbone/metrics.json") == told
    cut(place, [3, 5])
    assert tif(f"evaluate --stage=backbone {SKIP}") == 0
    assert json.loads(capsys.readouterr().out)["num_images"] == 3


def test_nothing_can_be_read(place, capsys):
    cut(place, range(8))
    for line, named in (
        (f"train --stage=backbone --workdir=new {SKIP}", "none of the 8 images can be read"),
        (f"evaluate --stage=backbone {SKIP}", "none of the 8 images to evaluate on can be read"),
    ):
        capsys.readouterr()
        assert tif(line) == 2
        assert named in last_line(capsys)
    assert tif(f"score {SKIP}") == 0
    capsys.readouterr()
    assert tif(f"train --stage=filter {SKIP}") == 2
    assert "run has no impacts: none of the images could be read" in last_line(capsys)


def test_an_image_that_was_lost_since_it_was_scored_ends_what_is_judged_on_it(place):
    """Left out, it would have moved the rows of all that follow."""
    assert tif("score") == 0
    of = config_file.load("config.py", [SKIP])
    table = read_impact(place / "run")
    assert sum(len(batch["id"]) for batch in _batches(of, open_source(of.data, "train"), table, "whole")) == 8
    cut(place, [4])
    with pytest.raises(InputError, match=r"cannot read image data/4\.png"):
        list(_batches(of, open_source(of.data, "train"), table, "cut"))


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_run_whose_images_are_missing_or_unlabelled_does_not_begin(place, capsys, split):
    (place / "data" / f"{split}.csv").write_text("file,label\n0.png,\n")
    assert tif("run --workdir=new") == 2
    assert f"{split}.csv line 2: label is ''" in last_line(capsys)
    assert tif(f"run --workdir=new --config.data.{split}_split=none.csv") == 2
    assert "no such file: data/none.csv" in last_line(capsys)
    assert not list(place.glob("new/*/checkpoints"))
