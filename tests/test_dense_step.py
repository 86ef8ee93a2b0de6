"""A training step on label maps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import lively, numpy_images
from steps import step_and_state

from tif_jax.models.params import params_of
from tif_jax.training import tasks

SIZE = (16, 24)
FIELDS = dict(image_size=SIZE, patch_size=8, width=8, depth=4, num_heads=2, task="depth", decoder="linear")


def updated(images, maps, **options):
    """The parameters after a step of plain descent, and its metrics."""
    model = lively(FIELDS)
    step, init = step_and_state(model, tasks.of_model(model).loss, optax.sgd(0.1), stochastic=False, **options)
    state, metrics = step(init(params_of(model)), {"image": images, "label_map": jnp.asarray(maps)})
    return state.params, {name: float(value) for name, value in metrics.items()}


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_images_of_which_no_pixel_counts_do_not_dilute_the_loss(parts):
    """Nor the metrics; nor does a part of a batch that has no other images."""
    images, maps = numpy_images(4, SIZE), np.random.default_rng(0).uniform(1, 5, (4, *SIZE)).astype(np.float32)
    maps[2] = 0  # not measured; with two parts the second one has images 1 and 3
    maps[1::2] = 0
    (all_, metrics), (first, expected) = updated(images, maps, accumulate=parts), updated(images[:1], maps[:1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), all_, first)
    assert metrics["valid"] == pytest.approx(expected.pop("valid") / 4)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    begun = params_of(lively(FIELDS))
    assert np.abs(all_["decoder"]["out"]["kernel"] - begun["decoder"]["out"]["kernel"]).max() > 1e-3


def test_without_any_label_nothing_is_learned():
    for parts in (1, 2):
        params, metrics = updated(numpy_images(2, SIZE), np.zeros((2, *SIZE), np.float32), accumulate=parts)
        jax.tree.map(np.testing.assert_array_equal, params, params_of(lively(FIELDS)))
        assert metrics["loss"] == metrics["valid"] == 0
