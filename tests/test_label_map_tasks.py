"""Label maps in an experiment: the model's task and its data fit each other, or the run is refused before it begins."""

import jax.numpy as jnp
import pytest
from flax import nnx
from label_maps import SIZE, classes, pairs, write_pairs
from pictures import PLAIN, one_line, write_folders

from tif_jax.data.preprocess import Preprocessing
from tif_jax.data.source import fingerprint
from tif_jax.errors import InputError
from tif_jax.experiment import config as config_file
from tif_jax.experiment.scoring import expected_manifest
from tif_jax.experiment.sources import check_splits, open_for_model
from tif_jax.models import Model


class Dense(Model):
    """A model of a task that is asked nothing else."""

    def __init__(self, task, num_classes=0):
        self.dtype, self.preprocessing, self.task = jnp.float32, Preprocessing(crop_fraction=1.0, **PLAIN), task
        if num_classes:
            self.head = nnx.Linear(1, num_classes, rngs=nnx.Rngs(0))


@pytest.fixture
def folder(tmp_path):
    return write_pairs(tmp_path, below=5)


def experiment(data, task="", *overrides):
    fields = dict(image_size=SIZE, patch_size=8, width=16, depth=1, num_heads=2, num_classes=5, pool="mean")
    made = dict(data=data | PLAIN, backbone=dict(model=fields))
    read = config_file.from_settings(made, [f"--config.{override}" for override in overrides])
    if task:
        read.backbone.model["task"] = task
    return read


def refused(match, call):
    with pytest.raises(InputError, match=match) as error:
        call()
    assert one_line(error)


def test_label_maps_of_the_models_task_are_opened(folder, tmp_path):
    depth = experiment(pairs(folder), "depth")
    check_splits(depth, tmp_path)
    for labelled in (True, False):
        source = open_for_model(depth, "train", Dense("depth"), labelled)
        assert len(source) == 5 and source[0]["label_map"].max() <= 0.2 and fingerprint(source)
    mask = experiment(classes(folder), "segmentation")
    check_splits(mask, tmp_path)
    assert open_for_model(mask, "test", Dense("segmentation", 5))[0]["label_map"].max() == 4
    fresh = ("backbone.head=fresh", "backbone.num_epochs=1")
    refused(r"backbone\.head 'fresh' .*: set data\.num_classes", lambda: check_splits(
        experiment(classes(folder), "segmentation", *fresh), tmp_path))  # fmt: skip
    check_splits(experiment(classes(folder, num_classes=5), "segmentation", *fresh), tmp_path)
    few = open_for_model(mask, "test", Dense("segmentation", 4))
    refused(
        r"the label map of val/image/0\.jpg has class 4; the model has classes 0\.\.3: say in data\.class_index",
        lambda: few[0],
    )
    refused("image_pairs has label maps with 5 classes, and the model has 4", lambda: open_for_model(
        experiment(classes(folder, num_classes=5)), "test", Dense("segmentation", 4)))  # fmt: skip


def test_a_task_and_labels_of_another_are_refused(folder, tmp_path):
    write_folders(tmp_path / "classes")
    images = dict(name="image_folder", root=str(tmp_path / "classes"), test_split="val", image_size=SIZE)
    for data, task, match in [
        (pairs(folder), "classification", "data.name asks for label maps of depth, and the model classifies images"),
        (
            images,
            "depth",
            "the model's task is depth, and image_folder .* has a class for each image: use data.name=image_pairs",
        ),
        (images, "segmentation", "the model's task is segmentation, and image_folder"),
        (pairs(folder), "segmentation", "the model's task is segmentation, and data.label_kind is 'depth'"),
        (classes(folder), "depth", "the model's task is depth, and data.label_kind is 'segmentation'"),
    ]:
        of = experiment(data, "" if task == "classification" else task)
        refused(match, lambda of=of: check_splits(of, tmp_path))
        refused(match, lambda of=of, task=task: open_for_model(of, "train", Dense(task, 5)))


def test_a_test_split_that_is_not_there_is_found_before_the_run(folder, tmp_path):
    refused(r"no split 'test'", lambda: check_splits(experiment(pairs(folder, test_split="test"), "depth"), tmp_path))
    kept = experiment(pairs(folder, test_split="train", test_fraction=0.4), "depth")
    check_splits(kept, tmp_path)
    assert (tmp_path / "split.json").exists()


@pytest.mark.parametrize(
    "override, match",
    [
        ("augmentation.rand_augment=m9-inc1", r"augmentation\.rand_augment is 'm9-inc1'"),
        ("augmentation.erase=0.1", r"augmentation\.erase is 0\.1"),
        ("mixing.mixup=0.8", r"mixing is for images with one label each"),
        ("mixing.cutmix=1.0", r"mixing is for images with one label each"),
    ],
)
def test_augmentations_that_label_maps_do_not_follow_are_refused(folder, override, match):
    data = pairs(folder, augment="crop_flip")
    for section in "backbone", "finetune":
        recipe = f"{section}.num_epochs=2"
        refused(rf"^{section}\.{match}", lambda where=section, recipe=recipe: experiment(
            data, "", recipe, f"{where}.{override}"))  # fmt: skip
    assert experiment(data, "", "finetune.augmentation.rotate=5").finetune.augmentation.rotate == 5
    digits = dict(name="digits", num_train=5, num_test=5, image_size=32, augment="crop_flip")
    refused(
        r"finetune\.augmentation\.rotate is for data with label maps",
        lambda: experiment(digits, "", "finetune.augmentation.rotate=5"),
    )


def test_impacts_are_of_these_label_maps(folder, monkeypatch):
    monkeypatch.setattr("tif_jax.experiment.scoring.backbone_digest", lambda params: "b" * 64)
    monkeypatch.setattr("tif_jax.experiment.scoring.built_with", lambda model: {"model": {}})
    monkeypatch.setattr(Dense, "grid", (3, 4), raising=False)

    def made(data, model):
        return expected_manifest(experiment(data), model, open_for_model(experiment(data), "train", model))["data"]

    one, other = made(pairs(folder), Dense("depth")), made(pairs(folder, label_scale=0.1), Dense("depth"))
    assert one["label_scale"] == 0.05 and other["label_scale"] == 0.1 and one["examples"] != other["examples"]
    assert made(classes(folder), Dense("segmentation", 5))["label_kind"] == "segmentation"
