"""Views: the crop that evaluation sees, and random crops."""

import inspect
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from peak import peak, reset
from pictures import PLAIN, picture
from PIL import Image

from tif_jax.data.preprocess import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    augmented_view,
    evaluation_view,
    preprocess,
    random_crop,
)
from tif_jax.errors import InputError

PIXELS = np.zeros((8, 8, 3), np.uint8)


def cubic_resize(pixels, size):
    """Antialiased bicubic interpolation (Keys, a = -1/2) of rows and columns, written from the definition."""

    def kernel(x):
        x = abs(x)
        if x < 1:
            return 1.5 * x**3 - 2.5 * x**2 + 1
        return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0

    def weights(old, new):
        step = old / new
        stretch = max(step, 1.0)
        matrix = np.array([[kernel((i + 0.5 - (o + 0.5) * step) / stretch) for i in range(old)] for o in range(new)])
        return matrix / matrix.sum(axis=1, keepdims=True)

    return np.einsum("yi,xj,ijc->yxc", weights(pixels.shape[0], size[0]), weights(pixels.shape[1], size[1]), pixels)


@pytest.mark.parametrize(
    "shape, image_size, fraction, resized",
    [
        ((60, 45), (28, 28), 0.875, (42, 32)),  # 60 * 32 / 45 = 42.67: the long side is cut, as torchvision does
        ((45, 61), (28, 28), 0.875, (32, 43)),
        ((20, 30), (28, 28), 0.875, (32, 48)),
        ((40, 40), (24, 36), 0.75, (48, 48)),
        ((30, 90), (24, 36), 1.0, (24, 72)),
    ],
)
def test_evaluation_view_is_timms(shape, image_size, fraction, resized):
    image = picture(rows=shape[0], columns=shape[1])
    view = evaluation_view(image, image_size, fraction, IMAGENET_MEAN, IMAGENET_STD)
    full = cubic_resize(np.asarray(image, np.float64), resized).clip(0, 255)
    top, left = (round((resized[i] - image_size[i]) / 2) for i in (0, 1))
    crop = full[top : top + image_size[0], left : left + image_size[1]]
    expected = (crop / 255 - IMAGENET_MEAN) / IMAGENET_STD
    assert view.dtype == np.float32
    # Pillow rounds to 8 bits after each of the two passes.
    np.testing.assert_allclose(view, expected, atol=1.6 / 255 / 0.224)


@pytest.mark.parametrize("rows, columns", [(1, 100_000), (100_000, 1), (4, 4000), (4000, 4)])
def test_of_a_picture_of_extreme_aspect_only_what_is_seen_is_resized(rows, columns):
    """It is seen as its middle is, which is a picture of its own that is resized whole. The longest would be 500 MB."""
    pixels = np.random.default_rng(0).integers(100, 150, (rows, columns, 3), dtype=np.uint8)
    top, left = max(0, rows // 2 - 8), max(0, columns // 2 - 8)
    middle = pixels[top : top + 16, left : left + 16]
    reset()
    before = peak()
    view = evaluation_view(Image.fromarray(pixels), (32, 24), 0.875, **PLAIN)
    assert peak() - before < 1e8
    expected = evaluation_view(Image.fromarray(np.ascontiguousarray(middle)), (32, 24), 0.875, **PLAIN)
    # Columns and rows are in another order, and rounded in between.
    np.testing.assert_allclose(view, expected, atol=2.01 / 255)
    assert np.abs(view - expected).mean() < 0.5 / 255 < 8 / 255 < expected.std()


def test_ordinary_pictures_are_resized_whole_as_ever(monkeypatch):
    """The same to the bit, up to sides of 40 to 1."""
    rng = np.random.default_rng(0)
    for shape in ((30, 40), (40, 30), (20, 800), (800, 20)):
        image = Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8))
        view = evaluation_view(image, (32, 32))
        monkeypatch.setattr("tif_jax.data.preprocess._MAX_RESIZED", math.inf)
        np.testing.assert_array_equal(view, evaluation_view(image, (32, 32)))
        monkeypatch.undo()


def test_evaluation_view_of_the_models_own_size_is_the_image():
    image = picture(rows=20, columns=28)
    np.testing.assert_array_equal(
        evaluation_view(image, (20, 28), 1.0, *PLAIN.values()), np.asarray(image, np.float32) / 255
    )


def test_preprocess_takes_every_kind_of_image_and_is_ready_for_a_model(tmp_path):
    image = picture(rows=40, columns=50)
    image.save(tmp_path / "a.png")
    batch = preprocess([str(tmp_path / "a.png"), np.asarray(image), image], image_size=32)
    assert isinstance(batch, jax.Array) and batch.shape == (3, 32, 32, 3)
    for view in batch:
        np.testing.assert_array_equal(view, evaluation_view(image, (32, 32)))
    assert preprocess([image], image_size=(16, 32), crop_fraction=1.0).shape == (1, 16, 32, 3)
    for several in (image for _ in range(2)), np.stack([np.asarray(image)] * 2), {"a": image, "b": image}.values():
        np.testing.assert_array_equal(preprocess(several, image_size=32), batch[:2])


@pytest.mark.parametrize(
    ("images", "given", "message"),
    [
        ("cat.jpg", {}, "'cat.jpg'; .* a list of it"),
        (Path("cat.jpg"), {}, "a list of it"),
        (7, {}, "7; .* takes several"),
        ([], {}, "at least one"),
        ([None], {}, "an image is None; it is a path"),
        (["no.jpg"], {}, "cannot read image no.jpg: .*No such file.*; replace it, or leave it out$"),
        ([PIXELS], dict(model=224), "model is 224; .* image_size=224"),
        ([PIXELS], dict(crop_fraction=1.5), "crop_fraction is 1.5; it is a number, above 0, at most 1"),
        ([PIXELS], dict(mean=(123.7, 116.3, 103.5)), "mean is .*; .* divide by 255"),
        ([PIXELS], dict(std=np.array([58.4, 57.1, 57.4])), "std is .*; .* divide by 255"),
        ([PIXELS], dict(std=(0.5, 0.5, math.nan)), "std is .*nan"),
        ([PIXELS], dict(mean=0.5), "mean is 0.5; it is a tuple of 3 numbers"),
        ([PIXELS], dict(image_size=0), "image_size is 0; it is a whole number"),
        ([PIXELS], dict(image_size=22.4), "image_size is 22.4"),
        ([PIXELS], dict(interpolation="cubic"), "interpolation is 'cubic'; allowed: 'nearest'"),
    ],
)
def test_what_preprocess_refuses(images, given, message):
    with pytest.raises(InputError, match=message) as error:
        inspect.unwrap(preprocess)(images, **given)  # as users have it, without the types that the tests check
    assert "\n" not in str(error.value) and "on_error" not in str(error.value)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_interpolation_is_pillows(interpolation):
    image = picture(rows=40, columns=50)
    resized = image.resize((20, 16), getattr(Image.Resampling, interpolation.upper()))
    expected = (np.asarray(resized, np.float32) / 255 - 0.25) / 0.5
    how = dict(mean=(0.25,) * 3, std=(0.5,) * 3, interpolation=interpolation, crop_fraction=1.0)
    np.testing.assert_allclose(preprocess([image], image_size=(16, 20), **how)[0], expected, atol=1e-6)
    whole = how | dict(scale=(1.0, 1.0), ratio=(1.25, 1.25), flip=False)
    del whole["crop_fraction"]
    view = augmented_view(image, (16, 20), np.random.default_rng(0), **whole)
    np.testing.assert_allclose(view, expected, atol=1e-6)


def test_random_crop_has_the_distribution_of_random_resized_crop():
    rng = np.random.default_rng(0)
    size, scale, ratio = (400, 500), (0.08, 1.0), (3 / 4, 4 / 3)
    boxes = np.array([random_crop(size, rng, scale, ratio) for _ in range(4000)])
    left, top, right, bottom = boxes.T
    width, height = right - left, bottom - top
    assert left.min() >= 0 and top.min() >= 0 and right.max() <= 500 and bottom.max() <= 400
    area, aspect = width * height / (400 * 500), width / height
    assert 0.079 < area.min() < 0.1 and 0.9 < area.max() <= 1
    assert 0.74 < aspect.min() < 0.77 and 1.3 < aspect.max() < 1.34
    # Small crops always fit, so that there the proposal is seen unchanged: area uniform, aspect log-uniform.
    small = area < 0.4
    assert abs(area[small].mean() - 0.24) < 0.01
    assert (
        abs(np.log(aspect[small]).mean()) < 0.02
        and abs(np.log(aspect[small]).std() - math.log(16 / 9) / 12**0.5) < 0.01
    )
    assert abs((left[small] / (500 - width[small])).mean() - 0.5) < 0.03
    assert abs((top[small] / (400 - height[small])).mean() - 0.5) < 0.03


def test_random_crop_falls_back_to_the_centre():
    ratio = (3 / 4, 4 / 3)
    assert random_crop((300, 10), np.random.default_rng(0), (0.5, 1.0), ratio) == (0, 143, 10, 156)
    assert random_crop((10, 300), np.random.default_rng(0), (0.5, 1.0), ratio) == (143, 0, 156, 10)
    assert random_crop((10, 10), np.random.default_rng(0), (4.0, 4.0), ratio) == (0, 0, 10, 10)


def test_augmented_view_is_a_crop_mirrored_half_of_the_time():
    image = picture(rows=40, columns=60)
    whole = evaluation_view(image.resize((30, 20), Image.Resampling.BICUBIC), (20, 30), 1.0, **PLAIN)
    views = [
        augmented_view(image, (20, 30), np.random.default_rng(i), **PLAIN, scale=(1.0, 1.0), ratio=(1.5, 1.5))
        for i in range(60)
    ]
    mirrored = [np.array_equal(view, whole[:, ::-1]) for view in views]
    assert all(m or np.array_equal(view, whole) for m, view in zip(mirrored, views, strict=True))
    assert 15 < sum(mirrored) < 45
    one, same, other = (augmented_view(image, (20, 20), np.random.default_rng(seed)) for seed in (5, 5, 6))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0.1
