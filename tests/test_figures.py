"""Colours, maps over photographs and the figures of a report."""

import io
import re

import numpy as np
import pytest
from PIL import Image

from tif_jax.data.preprocess import Preprocessing, normalise
from tif_jax.figures import plots
from tif_jax.figures.colours import OUTLINE, impact_scale, logit_scale
from tif_jax.figures.maps import as_jpeg, enlarged, map_over, photograph, tokens_over
from tif_jax.figures.sheet import as_png

WHITE = np.ones(3)
RNG = np.random.default_rng(0)
PHOTO = RNG.integers(0, 256, (320, 480, 3), np.uint8)  # large enough: nothing is repeated
GRID = (4, 6)  # patches of 80 pixels


def patch(picture, row, column, inset=0):
    return picture[80 * row + inset : 80 * (row + 1) - inset, 80 * column + inset : 80 * (column + 1) - inset]


def test_zero_is_white_and_both_sides_are_as_strong():
    scale = impact_scale(np.array([-0.5, 0.1, 0.2, 1.0]))
    assert scale.least == -scale.most
    zero, helps, hurts = scale.colours(np.array([[0.0, 0.4, -0.4]]))[0]
    np.testing.assert_allclose(zero, WHITE, atol=0.05)
    assert helps[0] > helps[2] + 0.2 and hurts[2] > hurts[0] + 0.2


def test_an_outlier_does_not_take_the_colours_of_all_others():
    ordinary = RNG.uniform(-1, 1, 195)
    scale = impact_scale(np.append(ordinary, 1000.0))
    assert scale.most < 1.01 and scale.extend in ("max", "both")
    assert logit_scale(np.append(ordinary, -1000.0)).least > -3


def test_where_nothing_is_negative_white_is_the_foot_of_the_legend():
    scale = impact_scale(np.array([0.0, 0.5, 1.0]))
    assert scale.least == 0 and "0 (white) or more" in scale.label
    np.testing.assert_allclose(scale.colours(np.zeros((1, 1)))[0, 0], WHITE, atol=0.05)
    assert scale.colours(np.ones((1, 1)))[0, 0, 0] > 0.3 > scale.colours(np.ones((1, 1)))[0, 0, 2]


@pytest.mark.parametrize("values", [np.zeros(4), np.full(4, 0.3)], ids=str)
def test_values_without_a_range(values):
    for scale in (impact_scale(values), logit_scale(values)):
        assert scale.most > scale.least and np.isfinite(scale.colours(np.zeros((2, 2)))).all()


def test_the_view_becomes_its_pixels_again():
    how = Preprocessing(mean=(0.1, 0.5, 0.4), std=(0.2, 0.3, 0.25))
    np.testing.assert_array_equal(photograph(normalise(PHOTO, how.mean, how.std), how), PHOTO)


def test_a_map_tints_each_patch_and_leaves_the_photograph_to_be_seen():
    impact = np.zeros(GRID)
    impact[1, 2], impact[3, 5] = 1.0, -1.0
    drawn = map_over(PHOTO, impact, impact_scale(impact)).astype(float)
    np.testing.assert_allclose(
        np.ptp(patch(drawn, 0, 0), axis=2), 0, atol=12
    )  # grey: the middle of the map is off white
    assert np.corrcoef(drawn[:80, :80].mean(axis=2).ravel(), PHOTO[:80, :80].mean(axis=2).ravel())[0, 1] > 0.99
    red, blue = (patch(drawn, *place).mean(axis=(0, 1)) for place in ((1, 2), (3, 5)))
    assert red[0] > red[2] + 20 and blue[2] > blue[0] + 20


def test_tokens_are_left_pale_or_merged():
    source = np.arange(24).reshape(GRID)
    source[0, 0] = -1
    members = [(2, 2), (2, 3), (2, 4), (3, 0)]  # three of them in a row
    for place in members:
        source[place] = source[2, 2]
    drawn = tokens_over(PHOTO, source)
    np.testing.assert_array_equal(patch(drawn, 1, 1), patch(PHOTO, 1, 1))
    assert patch(drawn, 0, 0).min() > 200
    mean = np.mean([patch(PHOTO, *place).reshape(-1, 3).mean(axis=0) for place in members], axis=0)
    line = tuple(int(OUTLINE[i : i + 2], 16) for i in (1, 3, 5))
    for place in members:
        inside = patch(drawn, *place, inset=3).reshape(-1, 3)
        np.testing.assert_allclose(inside, np.broadcast_to(mean, inside.shape), atol=1)
        assert line in {tuple(pixel) for pixel in patch(drawn, *place).reshape(-1, 3)}
    between = drawn[160 + 5 : 240 - 5, 240 - 2 : 240 + 2]  # inside of a token there is no line
    assert not (between == line).all(axis=2).any()
    np.testing.assert_array_equal(patch(drawn, 1, 3), patch(PHOTO, 1, 3))  # nor on its neighbours


def test_small_photographs_become_large_enough_to_be_seen():
    small = PHOTO[:24, :36]
    large = enlarged(small)
    assert large.shape == (24 * 9, 36 * 9, 3)
    np.testing.assert_array_equal(large[::9, ::9], small)
    assert tokens_over(small, np.zeros((2, 3), int)).shape == large.shape
    assert Image.open(io.BytesIO(as_jpeg(large))).size == (36 * 9, 24 * 9)


CURVES = {
    "backbone": [{"step": i, "loss": 3.0 / i} for i in range(1, 30)],
    "filter": [{"step": 1, "loss": None}, {"step": 2, "loss": 0.5}],
    "adapter": [{"step": i, "loss": -i / 9, "teacher_kl": 0.1 * i + 0.5} for i in range(1, 9)],
    "tif-0.5-0": [{"step": i, "loss": 2.0} for i in range(1, 9)],
    "empty": [],
}


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, instead of files."""
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, path, dpi: (as_png(figure, 30), drawn.append(figure)))
    return drawn


def test_curves_of_one_kind_share_a_panel_with_the_axis_that_suits(figures, tmp_path):
    plots.training_curves(CURVES, tmp_path / "x.png")
    of_classes, of_filter, of_adapter = figures[0].axes
    assert [len(axes.lines) for axes in figures[0].axes] == [4, 2, 2]  # each with its running mean
    assert of_classes.get_yscale() == "log" and of_filter.get_yscale() == of_adapter.get_yscale() == "linear"
    np.testing.assert_allclose(
        of_adapter.lines[0].get_ydata(), 0.1 * np.arange(1, 9) + 0.5
    )  # not its negative logarithm
    assert not any(axes.get_legend() for axes in figures[0].axes) and len(figures[0].legends) == 1
    plots.training_curves({}, tmp_path / "x.png")


def test_no_two_reducers_look_alike(figures, tmp_path):
    rows = [{"label": f"evit-{i}", "gmac": float(i), "top1": (0.5, 0.1 if i % 2 else None)} for i in range(30)]
    plots.accuracy_cost(rows, tmp_path / "x.png")
    looks = {
        (line.get_color(), line.get_marker()) for line in figures[0].axes[0].lines if line.get_marker() in "os^DvPX"
    }
    assert len(looks) == 30


def test_pictures_of_a_report_have_legends_and_classes(figures, tmp_path):
    row = dict(image=PHOTO[:16, :24] / 255, kept=RNG.random((2, 3)) > 0.5, logits=RNG.normal(size=(2, 3)))
    pictures = [row | {"impact": RNG.normal(size=(2, 3)), "class": name} for name in ("cat $1$", "")]
    plots.picture_page(pictures, tmp_path / "x.png")
    texts = [axes.get_xlabel().replace("\n", " ") for axes in figures[0].axes]
    assert sum("nats" in text for text in texts) == 1 and sum("logit" in text for text in texts) == 1
    assert figures[0].axes[0].get_ylabel() == "cat $1$"
    plots.picture_page(pictures[:1], tmp_path / "x.png")


def test_letters_that_no_font_has_are_no_error():
    from tif_jax.figures.sheet import Sheet

    figure = Sheet(figsize=(1, 1))
    figure.text(0, 0, "\N{CJK UNIFIED IDEOGRAPH-732B}")
    assert re.match(rb"\x89PNG", figure._repr_png_())
