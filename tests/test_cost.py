"""Counted costs against published figures and the analytic formula."""

import pytest
from cases import mostly_long, whole_cost_of

from benchmarks.published import ROWS
from tif_jax.errors import InputError
from tif_jax.models import create_model
from tif_jax.models.cost import cost


def analytic(width, depth, tokens, mlp=4):
    """GMAC of a ViT/16 at 224 with 1000 classes whose blocks see `tokens` tokens; the embedding sees 196 patches."""
    block = (4 + 2 * mlp) * tokens * width**2 + 2 * tokens**2 * width
    return (196 * 768 * width + depth * block + 1000 * width) / 1e9


@pytest.mark.parametrize(
    ("name", "width", "published"),
    mostly_long(
        [
            ("deit_tiny_patch16_224", 192, 1.254),
            ("deit_small_patch16_224", 384, 4.599),
            ("deit_base_patch16_224", 768, 17.56),
        ],
        short=(1,),
    ),
)
def test_deit(name, width, published):
    counted = whole_cost_of(name)
    assert counted.gmac == pytest.approx(analytic(width, 12, 197), rel=1e-6)
    assert counted.gmac == pytest.approx(published, abs=0.005)
    assert counted.tokens == (197,) * 12


@pytest.mark.parametrize(
    ("name", "width", "keep_ratio", "with_filter", "without"),
    mostly_long(
        [
            ("deit_tiny_patch16_224", 192, 0.7, 0.860, 0.849),
            ("deit_tiny_patch16_224", 192, 0.5, 0.611, 0.600),
            ("deit_small_patch16_224", 384, 0.7, 3.207, 3.164),
            ("deit_small_patch16_224", 384, 0.5, 2.294, 2.251),
        ],
        short=(0, 3),
    ),
)
def test_tif_with_and_without_its_filter(name, width, keep_ratio, with_filter, without):
    kept = round(196 * keep_ratio)
    tif = whole_cost_of(name, reducer="tif", keep_ratio=keep_ratio)
    random = whole_cost_of(name, reducer="random", keep_ratio=keep_ratio)
    assert tif.gmac == pytest.approx(with_filter, abs=0.001)
    assert random.gmac == pytest.approx(without, abs=0.001)
    assert random.gmac == pytest.approx(analytic(width, 12, kept + 1), rel=1e-6)
    assert tif.tokens == (kept + 1,) * 12
    assert tif.parameters - random.parameters == sum(
        (2 * width, width * width + width, width * width, width * width // 2 + width // 2, width // 2 + 1)
    )


# In the normal run one row for each reducer, of a ViT and of a LeViT.
FIRST = {(row.reducer, "levit" in row.model): i for i, row in reversed(list(enumerate(ROWS)))}


@pytest.mark.parametrize(
    "row", mostly_long(ROWS, short=set(FIRST.values())), ids=lambda row: f"{row.model}-{row.reducer}"
)
def test_published(row):
    assert cost(row.network()).gmac == pytest.approx(row.gmac, abs=row.within)


def test_size_is_checked():
    model = create_model(dict(image_size=16, patch_size=8, width=16, depth=1, num_heads=2))
    assert cost(model, image_size=16) == cost(model)
    with pytest.raises(InputError, match=r"takes \(B, 16, 16, 3\)"):
        cost(model, image_size=32)
