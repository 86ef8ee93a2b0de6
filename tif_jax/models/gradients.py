"""What is kept of a forward pass for its gradient, where that depends on the device."""

from collections.abc import Iterable
from typing import TypeVar

import jax
from flax import nnx

from tif_jax.models.vit_blocks import Block

_Model = TypeVar("_Model", bound=nnx.Module)


def for_gradients(model: _Model, devices: Iterable[jax.Device]) -> _Model:
    """The model to differentiate on these devices: on CPUs a copy whose blocks keep matrix products alone for the gradient.

    Softmax, GELU and norms are computed again, which on a CPU takes less time than to write them down and to read them: a
    training step is a tenth faster (docs/log/training.md).
    """
    if any(device.platform != "cpu" for device in devices):
        return model
    model = nnx.merge(*nnx.split(model))
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Block):
            module.keeps_products = True
    return model
