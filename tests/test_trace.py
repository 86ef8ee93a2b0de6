"""Where `trace` finds every patch, beside what reducers say themselves and what their shorter walks say."""

import jax.numpy as jnp
import numpy as np
import pytest
from cases import call, lively, mostly_long, numpy_images

import tif_jax
from tif_jax.errors import InputError
from tif_jax.models.trace import trace

FIELDS = dict(
    image_size=(16, 24), patch_size=4, width=16, depth=3, num_heads=2, num_classes=3
)  # 24 patches, more than D
IMAGES = numpy_images(2, (16, 24))
DEPTH, NUM_PATCHES = 3, 24
CASES = [
    ("tome", dict(num_merged=5)),
    ("evit", dict(keep_ratio=0.5)),
    ("tif", dict(keep_ratio=0.5, adapter=4)),
    ("bat", dict(keep_ratio=0.5)),
    ("evit", dict(keep_ratio=0.5, fuse=False)),
    ("random", {}),
    ("tofu", dict(num_merged=4)),
    ("pitome", dict(num_kept=(20, 15, 12))),
    ("diffrate", dict(num_dropped=2, num_merged=5)),
    ("dynamic_vit", {}),
    ("tif", dict(then=dict(name="tome", num_merged=3))),
]


@pytest.mark.parametrize(("name", "options"), mostly_long(CASES, short=(0, 2)))
def test_at_the_end_it_is_what_the_reducer_says(name, options):
    model = lively(FIELDS, reducer=name, **options)
    found = trace(model, IMAGES)
    logits, aux = call(model, IMAGES)
    np.testing.assert_array_equal(found.sources[-1], aux["source"])
    np.testing.assert_allclose(found.prediction, logits, atol=1e-4)
    num_special = model.num_special
    assert found.counts == tuple(number - num_special for number in tif_jax.cost(model).tokens)
    assert len(found.sources) == DEPTH


def test_on_the_way_it_is_the_end_of_a_walk_that_merges_no_more():
    per_block = (5, 4, 3)
    found = trace(lively(FIELDS, reducer="tome", num_merged=per_block), IMAGES)
    assert found.counts == (19, 15, 12)
    for i in range(DEPTH - 1):
        shorter = lively(FIELDS, reducer="tome", num_merged=per_block[: i + 1] + (0,) * (DEPTH - 1 - i))
        np.testing.assert_array_equal(found.sources[i], call(shorter, IMAGES)[1]["source"])


def test_patches_that_pass_a_block_by_come_back():
    model = lively(FIELDS, reducer="tosa", layers=(1,), keep_ratio=0.5, selector="copy")
    found = trace(model, IMAGES)
    assert found.counts == (NUM_PATCHES, NUM_PATCHES // 2, NUM_PATCHES)
    whole = np.broadcast_to(np.arange(NUM_PATCHES), (2, NUM_PATCHES))
    np.testing.assert_array_equal(found.sources[0], whole)
    np.testing.assert_array_equal(found.sources[2], whole)
    for source, kept in zip(np.asarray(found.sources[1]), np.asarray(call(model, IMAGES)[1]["kept"]), strict=True):
        np.testing.assert_array_equal(np.flatnonzero(source >= 0), kept)


def test_placeholders_share_one_token_and_part_again():
    model = lively(FIELDS, reducer="evo_vit", stages=(1, 2), keep_ratio=(0.25, 0.5))
    found = trace(model, IMAGES)
    assert found.counts == (NUM_PATCHES, 6 + 1, 12 + 1)
    kept = np.asarray(call(model, IMAGES)[1]["kept"])
    for source, slow in zip(np.asarray(found.sources[2]), kept, strict=True):
        np.testing.assert_array_equal(source[slow], np.arange(12))
        assert (np.delete(source, slow) == 12).all()


def test_without_a_reducer_and_in_bfloat16():
    found = trace(lively(FIELDS, dtype="bfloat16"), IMAGES.astype(jnp.bfloat16))
    for source in found.sources:
        np.testing.assert_array_equal(source, np.broadcast_to(np.arange(NUM_PATCHES), (2, NUM_PATCHES)))


def test_a_levit_moves_rows_itself():
    fields = dict(family="levit", image_size=32, widths=(16, 32), depths=(1, 1), num_heads=(1, 2), num_classes=3)
    with pytest.raises(InputError, match="trace needs a ViT"):
        trace(lively(fields), numpy_images(1))
