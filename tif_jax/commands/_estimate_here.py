"""What this machine reaches, for `tif estimate --device here`: each kind of work is run for some seconds."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from tif_jax.experiment.estimate import FORWARD, GRADIENT, TRAINED, Kind, scoring
from tif_jax.experiment.schema import Experiment
from tif_jax.impact.scoring import Scorer, label_key, label_shape
from tif_jax.models import Model, ViT, create_model
from tif_jax.models.compiled import compile_forward, random_images
from tif_jax.models.cost import cost
from tif_jax.models.params import params_of
from tif_jax.runtime import timing
from tif_jax.runtime.mesh import make_mesh, shard
from tif_jax.training import optim, tasks
from tif_jax.training.state import init_state, shardings
from tif_jax.training.step import make_step

logger = logging.getLogger(__name__)

_SECONDS = 3.0
_BATCH_SIZE = 32
_MOST = 64  # images of a training step that is measured
_SCORED, _MASKS = 8, 4


def reached(fields: Mapping[str, Any], experiment: Experiment) -> dict[Kind, float]:
    """FLOP/s in float32 by kind of work, counted as `experiment.estimate` counts them, of the network with all tokens.

    Training steps have as many images at a time as the config's (`finetune.batch_size`, `accumulate`), but at most 32, and
    at most 64 in all. Where nothing can be scored, gradients are taken to be as fast as training.
    """
    model = create_model({**fields, "dtype": "float32"})
    flops = 2e9 * cost(model).gmac
    rate = timing.rate(_forward(model), _SECONDS)
    logger.info("here: %.1f predictions/s with all tokens, batches of %d", rate, _BATCH_SIZE)
    found = {FORWARD: rate * flops}
    batch_size, accumulate = experiment.finetune.batch_size, experiment.finetune.accumulate
    part = min(_BATCH_SIZE, batch_size // accumulate)
    parts = max(1, min(accumulate, _MOST // part))
    rate = timing.rate(_step(model, part, parts), _SECONDS, least=1)
    logger.info("here: %.1f images/s in training, %d at a time", rate, part)
    found[TRAINED] = rate * TRAINED * flops
    found[GRADIENT] = found[TRAINED]
    if isinstance(model, ViT):
        rate = timing.rate(_oracle(model), _SECONDS)
        logger.info("here: %.1f images/s scored with %d masks of `sampled`", rate, _MASKS)
        found[GRADIENT] = rate * 2 * scoring("", model, 1, "sampled", _MASKS).macs
    return found


def _forward(model: Model) -> Callable[[], int]:
    program, given = compile_forward(
        model, random_images(model, _BATCH_SIZE), make_mesh(_BATCH_SIZE, this_process_only=True)
    )
    return _once(lambda: program(*given), _BATCH_SIZE)


def _step(model: Model, part: int, accumulate: int) -> Callable[[], int]:
    """A training step on one batch of so many parts, which stays on the devices."""
    batch_size = part * accumulate
    params, mesh = jax.device_get(params_of(model)), make_mesh(part, this_process_only=True)
    trainable = optim.match((), params, True)
    optimizer = optim.adamw(10**6, learning_rate=1e-5, weight_decay=0.05, clip_norm=1.0)
    where = shardings(jax.eval_shape(lambda: init_state(params, optimizer, trainable)), mesh)
    loss = tasks.of_model(model).loss
    step = make_step(model, loss, optimizer, trainable, seed=0, stochastic=True, where=where, accumulate=accumulate)
    state = [jax.jit(lambda p: init_state(p, optimizer, trainable), out_shardings=where)(params)]
    batch = shard({"image": random_images(model, batch_size), label_key(model): _labels(model, batch_size)}, mesh)

    def once() -> Any:
        state[0], metrics = step(state[0], batch)
        return metrics

    return _once(once, batch_size)


def _oracle(model: ViT) -> Callable[[], int]:
    options: dict[str, Any] = dict(estimator="sampled", mask="drop", target="label", num_samples=_MASKS, keep_ratio=0.5)
    scorer = Scorer(model, _SCORED, **options)
    images, labels = random_images(model, _SCORED), _labels(model, _SCORED)
    return _once(lambda: scorer(images, labels)(), _SCORED)


def _labels(model: Model, number: int) -> np.ndarray:
    shape = label_shape(model, number)
    return np.ones(shape.shape, shape.dtype)


def _once(run: Callable[[], Any], images: int) -> Callable[[], int]:
    """Compiled, run once, and what to call for so many images more."""

    def once() -> int:
        jax.block_until_ready(run())
        return images

    once()
    return once
