"""DPC-KNN: the walk against numpy; its clusters are those of the density peaks that BAT and AiluRus have, too."""

import jax
import numpy as np
import pytest
import reference_dense as reference
from cases import cost_of, embed, lively, mostly_long, numpy_images

from tif_jax import InputError, create_model

TINY = dict(image_size=32, patch_size=8, width=32, depth=3, num_heads=2, num_classes=5)
BARE = dict(class_token=False, num_registers=2, pool="mean")


def reference_encode(model, x, counts, num_neighbors):
    """One image: tokens out, the row of every patch, and the patches that are centres."""
    first = model.num_special
    special, patches = np.split(np.asarray(x, np.float64), [first])
    row, own = np.arange(len(patches)), np.arange(len(patches))
    for block, number in zip(model.blocks, counts, strict=True):
        if number < len(patches):
            places = [(0, 0)] * len(patches)  # everywhere is near
            cluster, centres = reference.density_peaks(patches, places, number, num_neighbors, 1)
            patches = np.array([patches[cluster == m].mean(axis=0) for m in range(number)])
            row, own = cluster[row], own[centres]
        special, patches = reference.through([block], special, patches)
    return np.concatenate([special, patches]), row, own


@pytest.mark.parametrize(
    ("options", "fields", "counts"),
    mostly_long(
        [
            (dict(num_kept=(16, 7, 4), num_neighbors=3), BARE, (16, 7, 4)),
            (dict(keep_ratio=0.6, sites=(0, 2)), {}, (9, 9, 5)),
        ]
    ),
)
def test_equals_the_reference(options, fields, counts):
    model = lively(TINY | fields, reducer="dpc_knn", **options)
    x = embed(model, numpy_images(3))
    encoded, aux = jax.jit(lambda x: model.encode(x))(x)
    for b in range(3):
        expected, row, own = reference_encode(model, x[b], counts, options.get("num_neighbors", 5))
        np.testing.assert_array_equal(aux["source"][b], row)
        np.testing.assert_array_equal(aux["kept"][b], own)
        np.testing.assert_allclose(encoded[b], expected, atol=2e-3 * np.abs(expected).max())


def test_tokens_of_deit():
    counted = cost_of("deit_tiny_patch16_224", reducer="dpc_knn", keep_ratio=0.5)
    assert counted.tokens == (197,) * 3 + (99,) * 3 + (50,) * 3 + (25,) * 3


@pytest.mark.parametrize(
    ("options", "message"), [(dict(num_neighbors=0), "num_neighbors is 0"), (dict(keep_ratio=0.0), "keep_ratio is 0.0")]
)
def test_misuse(options, message):
    with pytest.raises(InputError, match=message):
        create_model(TINY, reducer="dpc_knn", **options)
