"""Weights that know other classes: the head is drawn anew, of the data's size, and the network learns before it is scored."""

import numpy as np
import pytest
from flax import traverse_util
from pictures import picture
from small_project import last_line, tif

import tif_jax
from tif_jax.experiment import config as config_file
from tif_jax.experiment.folders import backbone_folder
from tif_jax.experiment.stages import STAGES
from tif_jax.models.params import params_of
from tif_jax.training.checkpoints import newest, read_config

FRESH = (
    "--workdir=mine --config.backbone.init_from=run/backbone --config.backbone.head=fresh --config.backbone.num_epochs=1 "
    "--config.backbone.model={} --config.data.name=image_folder --config.data.root=own --config.data.train_split=auto "
    "--config.data.test_split=auto --config.data.test_fraction=0.25"
)


@pytest.fixture
def own(place):
    """Pictures in two folders: as many classes as the weights have, and other ones."""
    for i, name in enumerate(("left", "right")):
        (place / "own" / name).mkdir(parents=True)
        for j in range(8):
            picture(10 * i + j, 16, 16).save(place / "own" / name / f"{j}.png")
    return place


def flat(model):
    return traverse_util.flatten_dict(params_of(model), sep="/")


def test_the_head_alone_is_new_and_has_the_names(own):
    assert tif(f"train --stage=backbone {FRESH} --config.backbone.learning_rate=0") == 0
    before, after = (tif_jax.load(own / run / "backbone") for run in ("run", "mine"))
    changed = {path for path, leaf in flat(after).items() if not np.array_equal(leaf, flat(before)[path])}
    assert changed == {"head/kernel", "head/bias"}  # though of the same shape
    assert after.class_names == ("left", "right") and before.class_names != after.class_names
    said = read_config(newest(backbone_folder(own / "mine") / "checkpoints"))
    assert said["made"]["made_from"].keys() == {"weights"} and said["of"] == 2


@pytest.mark.long
def test_it_learns_and_the_whole_run_speaks_of_the_users_classes(own, capsys):
    assert tif(f"run {FRESH} --config.benchmark.reducers=full,tif") == 0
    told = capsys.readouterr().err
    assert "stage score" in told and "without effect" not in told
    model = tif_jax.load(own / "mine")
    assert model.num_classes == 2 and model.class_names == ("left", "right")
    assert tif(f"run {FRESH} --config.benchmark.reducers=full,tif") == 0  # nothing is made again
    (own / "own" / "left" / "9.png").symlink_to("8.png")
    assert tif(f"run {FRESH} --config.benchmark.reducers=full,tif") == 2
    assert "has 1 images more (the first: left/9.png) than when mine was begun" in last_line(capsys)


def test_another_number_of_classes_asks_for_a_head(own, capsys):
    wrong = "train --stage=backbone --workdir=mine --config.backbone.init_from=run/backbone"
    assert tif(f"{wrong} --config.backbone.model.num_classes=3") == 2
    assert "run/backbone has no head for 3 classes; backbone.head=fresh, with backbone.num_epochs, has" in last_line(
        capsys
    )


def test_without_weights_it_says_what_that_is_worth(own, capsys):
    line = f"train --stage=backbone {FRESH} --config.backbone.init_from= --config.backbone.learning_rate=0"
    fields = "{'patch_size':8,'width':16,'depth':1,'num_heads':2}"
    assert tif(line.replace("model={}", f"model={fields}")) == 0
    assert "backbone.init_from is empty: the network begins with random weights" in capsys.readouterr().err
    assert tif_jax.load(own / "mine" / "backbone").num_classes == 2


@pytest.mark.parametrize(
    ("images", "min_steps", "expected"), [(16, 0, (4, 2)), (16, 10, (10, 5)), (400, 10, (100, 50))]
)
def test_few_pictures_are_seen_more_often(own, images, min_steps, expected):
    """2 epochs of batches of 8, the first for warming up: (steps, steps of an epoch)."""
    config = config_file.load(
        "config.py", [f"--config.backbone.{x}" for x in ("num_epochs=2", f"min_steps={min_steps}")]
    )
    stage = STAGES["backbone"](config, own / "new")
    object.__setattr__(stage, "num_examples", images)
    assert (stage.num_steps, stage.steps_per_epoch) == expected
