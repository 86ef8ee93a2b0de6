"""A training step on label maps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from cases import lively, numpy_images
from steps import step_and_state

from tif_jax.models.params import params_of
from tif_jax.training import tasks

SIZE = (16, 24)
FIELDS = dict(image_size=SIZE, patch_size=8, width=8, depth=4, num_heads=2, task="depth", decoder="linear")


def updated(images, maps):
    """The parameters after a step of plain descent."""
    model = lively(FIELDS)
    step, init = step_and_state(model, tasks.of_model(model).loss, optax.sgd(0.1), stochastic=False)
    return step(init(params_of(model)), {"image": images, "label_map": jnp.asarray(maps)})[0].params


def test_images_of_which_no_pixel_counts_do_not_dilute_the_loss():
    images, maps = numpy_images(2, SIZE), np.random.default_rng(0).uniform(1, 5, (2, *SIZE)).astype(np.float32)
    maps[1] = 0  # not measured
    both, first = updated(images, maps), updated(images[:1], maps[:1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), both, first)
    begun = params_of(lively(FIELDS))
    assert np.abs(both["decoder"]["out"]["kernel"] - begun["decoder"]["out"]["kernel"]).max() > 1e-3
