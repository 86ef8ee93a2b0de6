"""Which impacts that lie in a folder already are taken, and which are not."""

import shutil

import pytest
from flax import nnx
from scorer import NUM_PARTS, ROWS_PER_PART
from test_score_job import MODEL, assert_all_scored
from test_score_job import _config as config
from test_score_job import finished as finished  # a fixture
from test_score_job import place as place  # a fixture

from tif_jax.data import open_source
from tif_jax.errors import InputError
from tif_jax.experiment import scoring
from tif_jax.impact import shards
from tif_jax.impact.manifest import read_manifest
from tif_jax.models import create_model
from tif_jax.models.params import params_of
from tif_jax.runtime import records
from tif_jax.weights.loading import load


def test_rows_of_a_part_that_another_job_began_are_not_taken(place, finished):
    """Whoever deletes a folder's files does not see them: their names begin with a dot."""
    directory = place / "run" / "impact"
    columns = {name: column[:ROWS_PER_PART] for name, column in vars(shards.read_impact(finished / "run")).items()}
    directory.mkdir()
    shards.write_begun(directory, 1, NUM_PARTS, columns | {"impact": columns["impact"] + 1})
    scoring.score_training(config(), place / "run")
    assert_all_scored(place, finished)


def test_who_names_no_part_takes_those_of_the_folder(place, finished):
    """After an array job `tif run` asks for all."""
    scoring.score_training(config("--config.score.part=2/5"), place / "run")
    assert shards.missing_parts(place / "run" / "impact", 5) == [1, 3, 4, 5]
    scoring.score_training(config(), place / "run")
    assert not shards.missing_parts(place / "run" / "impact", 5)
    assert_all_scored(place, finished)
    (place / "later").mkdir()
    (place / "later" / "backbone").symlink_to(finished / "run" / "backbone")
    scoring.score_training(config(), place / "later", earlier=place / "run")
    assert (place / "later" / "impact" / "taken_from.json").exists()
    assert not shards.missing_parts(place / "later" / "impact", 5)


def test_the_same_parameters_with_other_heads_are_another_network(place, finished):
    """Nothing in the parameters tells."""
    other = create_model({**MODEL, "num_heads": 4})
    nnx.update(other, params_of(load(finished / "run" / "backbone")))
    source = open_source(config().data, "train")
    expected = scoring.expected_manifest(config(), other, source)
    with pytest.raises(InputError, match=r"model\.num_heads is 2 there, 4 here"):
        shards.read_impact(finished / "run", expected=expected)
    path = place / "run" / "impact" / "manifest.json"
    shutil.copytree(finished / "run" / "impact", path.parent)
    before = read_manifest(path.parent)
    del before["model"]  # as folders of before had it: what was paid for is still taken
    path.write_bytes(records.text(before))
    scoring.score_training(config(), place / "run")
    assert shards.read_impact(place / "run", expected=expected).impact.shape == (80, 16)
