"""Python's public functions, as a user has them: what is wrong is refused in one line, before anything is computed."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tif_jax
from tif_jax import InputError
from tif_jax.data.preprocess import Preprocessing

# Without the types that the tests check in every call: users have no such checks.
token_impact, create_model, load = map(inspect.unwrap, (tif_jax.token_impact, tif_jax.create_model, tif_jax.load))

FIELDS = dict(image_size=16, patch_size=8, width=16, depth=1, num_heads=2, num_classes=3)
IMAGES = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
LABELS = np.array([0, 2])


@pytest.fixture(scope="module")
def model():
    return tif_jax.create_model(FIELDS)


def refused(message, function, *arguments, **options):
    with pytest.raises(InputError, match=message) as error:
        function(*arguments, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ((IMAGES * 50).astype(np.uint8), "images are uint8; .* normalised floats; tif_jax.preprocess"),
        (np.full_like(IMAGES, 3, np.int32), "images are int32"),
        (IMAGES + 127, "images have values up to 1[23].*, which is not normalised"),
        (jnp.asarray(IMAGES + 127), "images have values up to 1[23].*, which is not normalised"),
        (IMAGES * np.nan, "images have values up to nan"),
        (IMAGES[0], r"shape \(16, 16, 3\); this model takes \(B, 16, 16, 3\)"),
        (IMAGES.transpose(0, 3, 1, 2), r"shape \(2, 3, 16, 16\)"),
        (["cat.jpg"], "images are a list"),
    ],
)
def test_what_is_no_batch_of_normalised_images(model, images, message):
    refused(message, inspect.unwrap(type(model).embed), model, images)
    refused(message, token_impact, model, images, LABELS)
    refused(message, token_impact, model, images, target="teacher")


def test_what_is_a_batch_of_normalised_images(model):
    expected = np.asarray(model(IMAGES)[0])
    np.testing.assert_array_equal(jax.jit(lambda x: model(x)[0])(IMAGES * 1), expected)
    assert model(IMAGES.astype(np.float16))[0].shape == (2, 3)
    from_0_to_255 = tif_jax.create_model(FIELDS)
    from_0_to_255.preprocessing = Preprocessing(mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255))
    assert np.isfinite(from_0_to_255(np.full_like(IMAGES, 250))[0]).all()
    with pytest.raises(InputError, match="images are uint8"):  # inside jit by their type alone
        jax.jit(lambda x: inspect.unwrap(type(model).embed)(model, x))(IMAGES.astype(np.uint8))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.eye(3, dtype=np.int32)[LABELS], r"labels are int32 of shape \(2, 3\); for 2 images .* whole numbers, 0..2"),
        (LABELS[:1], r"labels are int32 of shape \(1,\)"),
        (LABELS.astype(np.float32), "labels are float32"),
        (["cat", "dog"], "labels are .*'cat'"),
        ([0, 3], r"labels lie in \[0, 3\]; the model has classes 0..2"),
        ([0, -1], r"labels lie in \[-1, 0\]"),
        (None, "target 'label' needs labels"),
    ],
)
def test_what_are_no_labels(model, labels, message):
    refused(message, token_impact, model, IMAGES, labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(chunk=-3), "chunk is -3; it is a whole number or none, at least 1"),
        (dict(chunk=2.5), "chunk is 2.5"),
        (dict(seed=1.5), "seed is 1.5"),
        (dict(seed="a"), "seed is 'a'"),
        (dict(seed=-1), "seed is -1"),
        (dict(num_samples=2.5), "num_samples is 2.5"),
        (dict(num_samples="4"), "num_samples is '4'"),
        (dict(keep_ratio=math.nan), "keep_ratio is nan; .* above 0, at most 1"),
        (dict(keep_ratio="half"), "keep_ratio is 'half'"),
    ],
)
def test_options_of_impact(model, options, message):
    refused(message, token_impact, model, IMAGES, LABELS, estimator="sampled", **options)


def test_numpys_numbers_are_numbers(model):
    ours = token_impact(model, IMAGES, [0, 2], estimator="sampled", num_samples=2, seed=3, chunk=2)
    theirs = dict(num_samples=np.int64(2), keep_ratio=np.float32(0.5), seed=np.uint8(3), chunk=np.int32(2))
    np.testing.assert_array_equal(ours, token_impact(model, IMAGES, LABELS, estimator="sampled", **theirs))
    assert token_impact(model, IMAGES, np.array([-1, 2]), target="teacher").shape == (2, 4)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("deit_tiny_patch16_224", dict(pretrained=True), r"takes no `pretrained`; tif_jax.load\(FILE\)"),
        (7, {}, "the model is 7; it is timm's name"),
        (FIELDS, dict(seed=0.5), "seed is 0.5"),
        (FIELDS, dict(seed="0"), "seed is '0'"),
        (FIELDS, dict(seed=2**31), "seed is 2147483648; .* below 2147483648"),
        (FIELDS, dict(reducer=3), "reducer is 3; it is a name"),
        (FIELDS, dict(reducer="tif", keep_ratio=math.nan), "keep_ratio is nan"),
        (FIELDS, dict(reducer="tif", keep_ratio="half"), "keep_ratio is 'half'; it is a number"),
        (FIELDS, dict(reducer="tif", keep_ratio=True), "keep_ratio is True"),
        (FIELDS, dict(reducer="tome", proportional="no"), "proportional is 'no'; it is true or false"),
        (FIELDS, dict(reducer="random", draw_seed=1.5), "draw_seed is 1.5; it is a whole number"),
        (FIELDS, dict(dtype=jnp.int8), "dtype is .*int8.*; allowed: 'float32'"),
        (FIELDS, dict(dtype=None), "dtype is None; allowed"),
        (FIELDS, dict(num_classes="ten"), "num_classes is 'ten'; it is a whole number, at least 0"),
        (FIELDS, dict(num_classes=-1), "num_classes is -1"),
        (FIELDS, dict(image_size="224"), "image_size is '224'"),
        (FIELDS | dict(depth=-1), {}, "depth is -1"),
    ],
)
def test_what_is_no_model(name, options, message):
    refused(message, create_model, name, **options)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, "bfloat16", np.dtype(jnp.bfloat16)], ids=str)
def test_a_dtype_by_name_or_as_it_is(dtype):
    assert create_model(FIELDS, dtype=dtype).dtype == jnp.bfloat16
