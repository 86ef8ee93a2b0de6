"""Views of an image and its label map: whatever is cut, mirrored or turned, a pixel keeps its label."""

import math

import numpy as np
import pytest
from pictures import PLAIN, one_line, picture
from PIL import Image
from scipy import ndimage, stats

from tif_jax.data.augment import Augmentation
from tif_jax.data.joint_views import SHARES, augmented_pair, check_joint, evaluation_pair
from tif_jax.data.preprocess import Preprocessing, evaluation_view
from tif_jax.errors import InputError

PLAINLY = Preprocessing(crop_fraction=1.0, **PLAIN)
LEVELS = 4  # of grey, from a pixel to the next: images have at most 64 rows or columns
TURNED = Augmentation(rotate=10.0)


class OnlyRandom(np.random.Generator):
    """A generator of which nothing but `random()` may be used; it notes what it gave."""

    def __init__(self, seed):
        super().__init__(np.random.PCG64(seed))
        self.drawn = []

    def __getattribute__(self, name):
        assert name in ("random", "drawn") or name.startswith("_"), name
        return super().__getattribute__(name)

    def random(self, *shape):
        self.drawn.append(super().random(*shape))
        return self.drawn[-1]


def coded(rows, columns):
    """An image whose red is LEVELS x and whose green is LEVELS y, and a map that says x + 1000 y + 1: no two pixels alike."""
    y, x = np.mgrid[:rows, :columns]
    return Image.fromarray(np.stack([LEVELS * x, LEVELS * y, 0 * x], axis=-1).astype(np.uint8)), (
        x + 1000.0 * y + 1
    ).astype(np.float32)


def apart(pixels, label_map, around):
    """How many pixels the places that image and map show lie apart, per axis, where both are well inside the picture.

    around: pixels of the view, at its border and beside what has no label, of which the image mixes some of the border in.
    """
    shown = pixels[..., :2] * 255 / LEVELS
    said = np.stack([(label_map - 1) % 1000, (label_map - 1) // 1000], axis=-1)
    inside = ndimage.binary_erosion(label_map > 0, np.ones((3, 3)), iterations=around)
    return np.abs(shown - said)[inside]


def walked(label_map, size, draws, degrees, nothing):
    """What an augmented view says of each pixel, one at a time; directions are complex numbers."""
    draws, (rows, columns) = iter(draws), label_map.shape
    angle = math.radians(degrees) * (2 * next(draws) - 1) if degrees else 0.0
    share = SHARES[0] + (SHARES[1] - SHARES[0]) * next(draws)
    unit = share * min(columns / size[1], rows / size[0])  # pixels of the image that a pixel of the view shows
    left, top = (columns - unit * size[1]) * next(draws), (rows - unit * size[0]) * next(draws)
    mirrored = next(draws) < 0.5
    view, centre = np.full(size, nothing, label_map.dtype), complex(columns / 2, rows / 2)
    for i in range(size[0]):
        for j in range(size[1]):
            at = complex(left + unit * ((size[1] - j if mirrored else j + 1) - 0.5), top + unit * (i + 0.5))
            at = centre + (at - centre) * complex(math.cos(angle), math.sin(angle))
            if 0 <= at.real < columns and 0 <= at.imag < rows:
                view[i, j] = label_map[int(at.imag), int(at.real)]
    return view


@pytest.mark.parametrize("degrees", [0.0, 10.0, 60.0])
@pytest.mark.parametrize("shape, size", [((48, 64), (24, 32)), ((60, 45), (24, 32)), ((30, 62), (56, 56))])
def test_a_pixel_keeps_its_label(shape, size, degrees):
    image, label_map = coded(*shape)
    for seed in range(6):
        pixels, seen = augmented_pair(
            image, label_map, size, np.random.default_rng(seed), PLAINLY, Augmentation(rotate=degrees)
        )
        assert pixels.shape == (*size, 3) and seen.shape == size and seen.dtype == np.float32
        assert degrees or (seen > 0).all()
        found = apart(pixels, seen, around=math.ceil(3 * max(1, size[0] / shape[0])))
        # The nearest pixel is half a pixel off at most; grey levels are rounded twice, once down.
        assert len(found) > seen.size / 5 and found.max() <= 1.01 and found.mean() < 0.4


@pytest.mark.parametrize("degrees", [0.0, 25.0])
@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_labels_are_those_of_the_nearest_pixels(kind, degrees):
    image, label_map = picture(rows=30, columns=40), coded(30, 40)[1].astype(kind)
    mirrored = 0
    for seed in range(8):
        rng = OnlyRandom(seed)
        _, seen = augmented_pair(image, label_map, (20, 24), rng, PLAINLY, Augmentation(rotate=degrees))
        expected = walked(label_map, (20, 24), rng.drawn, degrees, 0 if kind is np.float32 else -1)
        np.testing.assert_array_equal(seen, expected)
        assert seen.dtype == kind and len(rng.drawn) == (5 if degrees else 4)
        mirrored += rng.drawn[-1] < 0.5
    assert 0 < mirrored < 8


def test_what_comes_into_view_has_no_label_and_the_mean_colour():
    white, label_map = Image.new("RGB", (40, 30), "white"), np.full((30, 40), 7, np.int32)
    how = Preprocessing(crop_fraction=1.0, mean=(0.2, 0.4, 0.6), std=(1.0, 1.0, 1.0))
    pixels, seen = augmented_pair(white, label_map, (30, 40), np.random.default_rng(0), how, Augmentation(rotate=180.0))
    assert set(np.unique(seen)) == {-1, 7}
    far = ndimage.binary_erosion(seen == -1, np.ones((3, 3)), iterations=3)
    assert far.any() and np.abs(pixels[far]).max() < 0.5 / 255 + 1e-6  # the mean, less the mean


def test_crops_are_nearly_whole_and_anywhere():
    y, x = np.mgrid[:600, :500].astype(np.int32)
    image, label_map, shares, places, flips = Image.new("RGB", (500, 600)), x + 1000 * y, [], [], 0
    for seed in range(300):
        _, seen = augmented_pair(image, label_map, (60, 40), np.random.default_rng(seed), PLAINLY)
        x, y = seen[0] % 1000, seen[:, 0] // 1000
        flips += x[0] > x[-1]
        shares.append((y[-1] - y[0]) / 59 / 10)  # 10 pixels to one, where 400 x 600 are seen: the largest such crop
        assert abs(abs(x[-1] - x[0]) / 39 / 10 - shares[-1]) < 0.01
        places.append((x.min() - 4) / (500 - 400 * shares[-1]))
    assert stats.kstest(shares, stats.uniform(SHARES[0], SHARES[1] - SHARES[0]).cdf).pvalue > 1e-3
    assert stats.kstest(places, stats.uniform().cdf).pvalue > 1e-3
    assert stats.binomtest(int(flips), 300, 0.5).pvalue > 1e-3


@pytest.mark.parametrize("shape, size, fraction", [
    ((60, 45), (24, 32), 0.875), ((45, 61), (28, 28), 0.9), ((48, 64), (24, 32), 1.0), ((48, 64), (48, 64), 1.0),
    ((20, 30), (50, 41), 0.75),
])  # fmt: skip
def test_evaluation_view_of_both(shape, size, fraction):
    image, label_map = coded(*shape)
    how = Preprocessing(crop_fraction=fraction, **PLAIN)
    pixels, seen = evaluation_pair(image, label_map, size, how)
    np.testing.assert_array_equal(pixels, evaluation_view(image, size, **vars(how)))
    assert (seen > 0).all() and apart(pixels, seen, around=5).max() < 0.7
    if fraction == 1 and shape == size:
        np.testing.assert_array_equal(seen, label_map)


def test_numbers_are_never_mixed():
    label_map = np.random.default_rng(0).choice([1.5, 4.0, 9.0], (30, 40)).astype(np.float32)
    for seed in range(5):
        _, seen = augmented_pair(
            picture(rows=30, columns=40), label_map, (64, 64), np.random.default_rng(seed), PLAINLY, TURNED
        )
        assert set(np.unique(seen)) <= {0.0, 1.5, 4.0, 9.0}


def test_views_are_drawn_from_the_generator_alone():
    image, label_map = coded(30, 40)
    one, again, other = (augmented_pair(image, label_map, (24, 24), OnlyRandom(s), PLAINLY, TURNED) for s in (3, 3, 4))
    for i in (0, 1):
        np.testing.assert_array_equal(one[i], again[i])
        assert (one[i] != other[i]).any()


def test_colour_is_changed_in_the_image_alone():
    image, label_map = picture(rows=30, columns=40), coded(30, 40)[1]
    plain, jittered = (
        augmented_pair(
            image, label_map, (24, 24), np.random.default_rng(0), PLAINLY, Augmentation(color_jitter=strength)
        )
        for strength in (0.0, 0.4)
    )
    np.testing.assert_array_equal(plain[1], jittered[1])
    assert np.abs(plain[0] - jittered[0]).max() > 0.05


@pytest.mark.parametrize("wrong", [Augmentation("m9-inc1"), Augmentation(erase=0.25)])
def test_augmentations_that_would_part_them_are_refused(wrong):
    check_joint(Augmentation(rotate=5.0, color_jitter=0.3))
    with pytest.raises(InputError, match=r"(rand_augment|erase) is .* label maps would not follow") as error:
        check_joint(wrong)
    assert one_line(error)
