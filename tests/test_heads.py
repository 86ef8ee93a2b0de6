"""Dense heads, beside what numpy makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import lively, numpy_images
from flax import nnx

from tif_jax import cost, create_model
from tif_jax.models.heads import DptDecoder, LinearDecoder, resized

SIZE = (24, 40)
FIELDS = dict(image_size=SIZE, patch_size=8, width=16, depth=4, num_heads=2, decoder_width=6)


def bilinear(x, size):
    """Each pixel a mean of the four that its centre lies between; beyond the edge is the edge."""
    found = np.zeros((*size, x.shape[2]))
    for row, column in np.ndindex(*size):
        y, z = ((i + 0.5) * n / m - 0.5 for i, n, m in zip((row, column), x.shape, size, strict=False))
        top, left = int(np.floor(y)), int(np.floor(z))
        for r, a in ((top, 1 - (y - top)), (top + 1, y - top)):
            for c, b in ((left, 1 - (z - left)), (left + 1, z - left)):
                found[row, column] += a * b * x[np.clip(r, 0, x.shape[0] - 1), np.clip(c, 0, x.shape[1] - 1)]
    return found


def convolved(x, conv, stride=1):
    """3x3, zeros around; of an even number of pixels a stride of 2 begins at the first (padding below and right alone)."""
    kernel, rows, columns = np.asarray(conv.kernel[...]), *(-(-n // stride) for n in x.shape[:2])
    before = [max(0, (m - 1) * stride + 3 - n) // 2 for n, m in zip(x.shape, (rows, columns), strict=False)]
    padded = np.pad(x, [(before[0], 3), (before[1], 3), (0, 0)])
    found = np.zeros((rows, columns, kernel.shape[3]))
    for r, c in np.ndindex(rows, columns):
        window = padded[r * stride : r * stride + 3, c * stride : c * stride + 3]
        found[r, c] = np.tensordot(window, kernel, 3)
    return found if conv.bias is None else found + np.asarray(conv.bias[...])


def residual(x, unit):
    return x + convolved(np.maximum(convolved(np.maximum(x, 0), unit.first), 0), unit.second)


def linear(x, layer):
    return x @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])


@pytest.mark.parametrize("grid", [(2, 4), (3, 5)])
def test_dpt_fuses_four_rasters_from_the_coarsest_to_the_finest(grid):
    rng, channels = np.random.default_rng(0), 3
    decoder = DptDecoder(8, channels, 2, dtype=jnp.float32, rngs=nnx.Rngs(0))
    features = [rng.normal(size=(1, *grid, 8)).astype(np.float32) for _ in range(4)]
    levels = []
    for i, (x, finer) in enumerate(zip(features, (4, 2, 1, 1), strict=True)):
        y = linear(x[0], getattr(decoder, f"reassemble_{i}")).reshape(*grid, finer, finer, channels)
        fine = np.zeros((grid[0] * finer, grid[1] * finer, channels))
        for r, c in np.ndindex(*grid):
            fine[r * finer : (r + 1) * finer, c * finer : (c + 1) * finer] = y[r, c]
        fine = convolved(fine, decoder.coarser, stride=2) if i == 3 else fine
        levels.append(convolved(fine, getattr(decoder, f"smooth_{i}")))
    y = residual(levels[3], decoder.refine_3)
    for i in (2, 1, 0):
        y = bilinear(y, levels[i].shape[:2]) + residual(levels[i], getattr(decoder, f"skip_{i}"))
        y = residual(y, getattr(decoder, f"refine_{i}"))
    y = linear(np.maximum(convolved(y, decoder.last), 0), decoder.out)
    found = jax.jit(lambda *x: decoder(x, SIZE))(*features)
    assert found.shape == (1, *SIZE, 2)
    np.testing.assert_allclose(found[0], bilinear(y, SIZE), atol=1e-4)


def test_the_linear_head_is_a_matrix_and_bilinear_upsampling():
    rng = np.random.default_rng(0)
    decoder = LinearDecoder(4, 2, 3, dtype=jnp.float32, rngs=nnx.Rngs(0))
    features = [rng.normal(size=(1, 2, 3, 4)).astype(np.float32) for _ in range(2)]
    y = linear(np.concatenate(features, axis=-1)[0], decoder.out)
    np.testing.assert_allclose(decoder(list(map(jnp.asarray, features)), (6, 9))[0], bilinear(y, (6, 9)), atol=1e-5)


def test_resizing_to_the_same_size_changes_nothing():
    x = np.random.default_rng(0).normal(size=(1, 3, 4, 2)).astype(np.float32)
    np.testing.assert_allclose(resized(jnp.asarray(x), (3, 4)), x, atol=1e-6)


def test_depth_is_in_metres_and_below_the_most():
    model = lively(FIELDS, task="depth", max_depth=4.0)
    depth, _ = jax.jit(lambda x: model(x))(numpy_images(3, SIZE))
    assert depth.shape == (3, *SIZE) and depth.dtype == jnp.float32
    assert 0 < depth.min() and depth.max() < 4
    assert model.num_classes == 0 and model.task == "depth"


def test_a_fresh_decoder_says_the_depth_of_a_room_everywhere():
    model = create_model(FIELDS, task="depth")
    depth, _ = jax.jit(lambda x: model(x))(numpy_images(1, SIZE))
    assert 2 < depth.min() and depth.max() < 4


def test_segmentation_has_logits_of_every_pixel():
    model = lively(FIELDS, task="segmentation", num_classes=5, decoder="linear", decoder_blocks=(3,))
    logits, _ = jax.jit(lambda x: model(x))(numpy_images(2, SIZE))
    assert logits.shape == (2, *SIZE, 5) and model.num_classes == 5


def test_the_whole_model_costs_its_blocks_and_its_decoder():
    plain = lively(FIELDS, num_classes=0, lean_last_block=False)
    depth = lively(FIELDS, num_classes=0, task="depth")
    rows, columns, c, d = 3, 5, 6, 16
    patches = rows * columns
    reassemble = patches * d * c * (16 + 4 + 1 + 1)
    pixels = {0: 16 * patches, 1: 4 * patches, 2: patches, 3: 2 * 3}
    convolutions = (
        9
        * c
        * c
        * (
            pixels[3]  # coarser
            + sum(pixels.values())  # smooth
            + 2 * sum(pixels.values())  # refine
            + 2 * (pixels[0] + pixels[1] + pixels[2])  # skip
            + pixels[0]  # last
        )
    )
    counted = 1e9 * (cost(depth).gmac - cost(plain).gmac)
    out = pixels[0] * c
    # What is left is resizing: two small matrices for each of the four times.
    assert reassemble + convolutions + out < counted < 1.15 * (reassemble + convolutions + out)
