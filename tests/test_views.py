"""Views: the crop that evaluation sees, and random crops."""

import math

import jax
import numpy as np
import pytest
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
    for wrong in "cat.jpg", []:
        with pytest.raises(InputError, match="list of at least one image"):
            preprocess(wrong)
    with pytest.raises(InputError, match=r"crop_fraction is 1.5"):
        preprocess([image], crop_fraction=1.5)


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
