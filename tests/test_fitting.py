"""`tif_jax.fit`: pictures and labels in, a model that knows them out."""

import runpy
from pathlib import Path

import jax
import numpy as np
import pytest
from cases import call, mostly_long
from flax import nnx
from pictures import one_line
from PIL import Image

import tif_jax
from tif_jax.models.fresh_heads import with_fresh_heads
from tif_jax.models.params import params_of
from tif_jax.training import fitting

FIELDS = dict(image_size=16, patch_size=8, width=16, depth=2, num_heads=2, num_classes=7)
RECIPE = dict(num_epochs=20.0, min_steps=0, batch_size=8, learning_rate=1e-2, augment=False)


def pictures(seed, count=12):
    """Bright ones and dark ones, with noise; the labels are texts."""
    rng = np.random.default_rng(seed)
    labels = ["dark", "bright"] * (count // 2)
    level = {"dark": 40, "bright": 180}
    return [rng.integers(0, 60, (20, 20, 3)).astype(np.uint8) + np.uint8(level[label]) for label in labels], labels


@pytest.fixture(scope="module")
def model():
    return tif_jax.create_model(FIELDS, reducer="evit", keep_ratio=0.5, sites=(1,))


@pytest.fixture(scope="module")
def fitted(model):
    return tif_jax.fit(model, *pictures(0), **RECIPE)


def test_it_knows_other_pictures_of_the_classes(fitted):
    others, labels = pictures(1)
    assert [found.names[0] for found in fitted.predict_images(others, top=1)] == labels
    assert fitted.class_names == ("bright", "dark") and fitted.num_classes == 2


def test_the_model_that_was_given_stays_as_it_was(model, fitted):
    again = tif_jax.create_model(FIELDS, reducer="evit", keep_ratio=0.5, sites=(1,))
    assert model.num_classes == 7 and type(fitted.reducer) is type(model.reducer)
    jax.tree.map(np.testing.assert_array_equal, params_of(model), params_of(again))


def test_a_folder_is_the_same_as_its_pictures_and_labels(model, tmp_path):
    images, labels = pictures(0, 8)
    order = np.argsort(labels, kind="stable")  # as the folder is read
    for i in order:
        (tmp_path / "train" / labels[i]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i]).save(tmp_path / "train" / labels[i] / f"{i}.PNG")
    short = RECIPE | dict(num_epochs=2.0)
    by_folder = tif_jax.fit(model, tmp_path, **short)
    by_labels = tif_jax.fit(model, [images[i] for i in order], [labels[i] for i in order], **short)
    jax.tree.map(np.testing.assert_array_equal, params_of(by_folder), params_of(by_labels))
    numbered = tif_jax.fit(model, images, [int(label == "dark") for label in labels], **short)
    assert numbered.class_names is None and numbered.num_classes == 2


@pytest.mark.parametrize(
    "fields",
    mostly_long(
        [dict(num_classes=0), dict(num_classes=0, pool="class_and_mean"), dict(distillation_token=True)], short=(2,)
    ),
)
def test_every_kind_of_model_gets_heads(fields):
    model = tif_jax.create_model(FIELDS | fields)
    made = with_fresh_heads(model, 3, seed=1)
    assert made.num_classes == 3 and call(made, np.zeros((2, 16, 16, 3), np.float32))[0].shape == (2, 3)
    alike = tif_jax.create_model(FIELDS | fields | dict(num_classes=3))
    assert jax.tree.map(np.shape, params_of(made)) == jax.tree.map(np.shape, params_of(alike))


def test_a_filter_rests():
    model = tif_jax.create_model(FIELDS, reducer="tif", keep_ratio=0.5)
    fitted = tif_jax.fit(model, *pictures(0), **RECIPE | dict(num_epochs=1.0))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params_of(fitted)))
    before, after = (nnx.to_flat_state(nnx.state(each, nnx.Param)) for each in (model, fitted))
    for (path, old), (_, new) in zip(before, after, strict=True):
        if path[0] != "head":  # biases of keys never learn
            moved = not np.array_equal(old[...], new[...])
            assert moved == (path[0] != "reducer"), path


def test_the_recipe_is_that_of_the_config():
    config = runpy.run_path(str(Path(__file__).parents[1] / "configs" / "folder.py"))["get_config"]()
    assert fitting.RECIPE == {key: value for key, value in config.backbone.items() if key not in ("init_from", "head")}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(labels=None), "labels are missing; give one for each picture, or a folder"),
        (dict(labels=["a"]), r"labels have shape \(1,\), and there are 4 pictures"),
        (dict(labels=["a"] * 4), "one class alone"),
        (dict(labels=[0, 1, 2, -1]), r"labels are \[0, 1, 2, -1\]; they are texts, or whole numbers from 0"),
        (dict(labels=[[0], [0, 1], 1, 1]), "give one for each picture, a text or a whole number"),
        (dict(labels=[0.5] * 4), "they are texts, or whole numbers"),
        (dict(images="nowhere", labels=None), "data.root nowhere is not a folder"),
        (dict(images=".", labels=[0]), "labels are given for the folder"),
        (dict(epochs=3), "config has no key 'recipe.epochs'; the nearest is"),
        (dict(num_epochs=0), "recipe.num_epochs is 0"),
        (dict(drop_path=0.1), r"recipe.drop_path is a field of the model: tif_jax.load\(..., drop_path=0.1\)"),
        (dict(save_every=3), "recipe.save_every is given, but nothing is saved before the end"),
        (dict(augment=False, augmentation=dict(erase=0.2)), "recipe.augmentation is for views that are drawn anew"),
        (dict(model="deit"), "model is 'deit'; it is what tif_jax.load"),
    ],
)
def test_mistakes(model, given, message):
    images, labels = pictures(0, 4)
    arguments = dict(model=model, images=images, labels=labels) | given
    with pytest.raises(tif_jax.InputError, match=message) as error:
        tif_jax.fit(**arguments)
    assert one_line(error)
