"""The bundled digits: repeatable, disjoint splits, and clutter that ink alone does not give away."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from tif_jax.data import digits
from tif_jax.data.digits import Digits
from tif_jax.data.source import Source
from tif_jax.errors import InputError


def images(source: Digits) -> np.ndarray:
    return np.stack([source[i]["image"] for i in range(len(source))])


@pytest.fixture(scope="module")
def train() -> Digits:
    return Digits("train", 500)


def test_is_a_source(train):
    assert isinstance(train, Source)
    assert (train.num_classes, train.class_names, len(train)) == (10, tuple("0123456789"), 500)
    example = train[7]
    assert example["id"] == "train/000007" and example["image"].shape == (64, 64, 3)
    assert example["image"].dtype == np.uint8 and type(example["label"]) is int
    assert (example["image"] == example["image"][..., :1]).all()
    with pytest.raises(IndexError):
        train[500]


def test_a_canvas_depends_on_seed_split_and_index_alone(train):
    longer = Digits("train", 1001)
    for i in (0, 499):
        np.testing.assert_array_equal(longer[i]["image"], train[i]["image"])
        assert longer[i]["label"] == train[i]["label"]
    for other in (Digits("train", 1, seed=1)[0], Digits("test", 1)[0], longer[1000]):
        assert (other["image"] != train[0]["image"]).any()


def test_splits_share_no_handwritten_digit():
    (train, train_labels), (test, test_labels) = (digits._drawn_digits(split) for split in digits.SPLITS)
    size = digits.SIZES[0]
    assert (len(train[size]), len(test[size])) == (1400, 397)
    assert not {digit.tobytes() for digit in train[size]} & {digit.tobytes() for digit in test[size]}
    every = np.bincount(load_digits().target)
    np.testing.assert_array_equal(np.bincount(train_labels) + np.bincount(test_labels), every)
    np.testing.assert_allclose(np.bincount(test_labels), every * 397 / 1797, atol=1)


def test_the_labelled_digit_stands_whole_on_the_canvas(train):
    drawn, labels = digits._drawn_digits("train")
    for i in range(4):
        example = train[i]
        grey = example["image"][..., 0]
        assert any(
            digit.tobytes() in {window.tobytes() for window in windows}
            for size in digits.SIZES
            for windows in [np.lib.stride_tricks.sliding_window_view(grey, (size, size)).reshape(-1, size, size)]
            for digit in drawn[size][labels == example["label"]]
        )


def test_ink_is_the_same_in_digits_and_clutter():
    drawn, _ = digits._drawn_digits("test")
    in_digits = np.mean([digit.mean() for digit in drawn.values()])
    grey = images(Digits("test", 1000))[..., 0]
    assert grey.mean() == pytest.approx(in_digits, rel=0.05)
    blocks = grey.reshape(-1, 8, 8, 8, 8).mean(axis=(0, 2, 4))
    np.testing.assert_allclose(blocks, in_digits, rtol=0.15)


def test_every_position_and_size_occurs():
    white = {size: np.full((1, size, size), 255, np.uint8) for size in digits.SIZES}
    black = np.zeros((1, digits.FRAGMENT, digits.FRAGMENT), np.uint8)
    canvases, _ = digits._canvases(white, black, 40, 0.0, np.random.default_rng(0))
    assert (canvases.max(axis=0) == 255).all()
    areas, counts = np.unique((canvases == 255).sum(axis=(1, 2)), return_counts=True)
    np.testing.assert_array_equal(areas, np.square(digits.SIZES))
    assert counts.min() > 250


def test_training_canvases_are_thinned_and_test_canvases_full(train):
    ink = [np.sort(images(source).mean(axis=(1, 2, 3))) for source in (train, Digits("test", 500))]
    assert ink[0][100] < 0.7 * ink[1].mean() and ink[1][0] > 0.7 * ink[1].mean()


@pytest.mark.parametrize(
    "arguments, message",
    [(("validation", 5), "'validation'"), (("train", 0), "num_examples is 0"), (("train", 5, 16), "image_size is 16")],
)
def test_bad_input(arguments, message):
    with pytest.raises(InputError, match=message) as error:
        Digits(*arguments)
    assert "\n" not in str(error.value)
