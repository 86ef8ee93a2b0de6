"""The training step and the loop around it."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array

from tif_jax import optim
from tif_jax.errors import InputError, WorkError
from tif_jax.losses import Loss
from tif_jax.models import Model
from tif_jax.models.vit import ViT
from tif_jax.progress import Progress
from tif_jax.reducers import Aux, Full
from tif_jax.state import Params, State, params_of, statistics_of, with_params, with_statistics

Step = Callable[[State, Mapping[str, Array]], tuple[State, dict[str, Array]]]


def init_state(params: Params, optimizer: optax.GradientTransformation, trainable: Any) -> State:
    """Step 0. trainable: tree of bools like params; only those parameters get optimiser state."""
    return State(jnp.zeros((), jnp.int32), params, optimizer.init(optim.partition(params, trainable)[0]))


def make_step(
    model: Model,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    trainable: Any,
    *,
    seed: int,
    stochastic: bool,
    teacher: Model | None = None,
) -> Step:
    """The compiled function (state, batch) -> (state, metrics): one update of the trainable parameters.

    Only they are differentiated; the others come out as they went in. stochastic: drop-path and random reducers draw
    from fold_in(key(seed), step), and a model with running statistics normalises by those of the batch, over all
    devices, and updates them. Metrics are batch means; the state is donated.

    teacher: a model without reduction, from whose outputs a loss may learn: batch['teacher/logits'] (B, L) and
    batch['teacher/tokens'] (B, N, D), to be compared with aux['tokens']. It sees the same images, draws nothing and gets
    no gradient. On several devices give it parameters that are on all of them (`state.replicate`), or every step copies.
    """
    if teacher is not None and not isinstance(teacher.reducer, Full):
        raise InputError(f"the teacher's reducer is {type(teacher.reducer).__name__}; a teacher has none ('full')")
    graphdef, teacher_graphdef = nnx.split(model)[0], teacher and nnx.split(teacher)[0]

    def step(fixed: Any, state: State, batch: Mapping[str, Array]) -> tuple[State, dict[str, Array]]:
        key, teacher_params = fixed
        if teacher_params is not None:
            logits, aux = _with_tokens(with_params(teacher_graphdef, teacher_params), batch["image"], None)
            batch = {**batch, "teacher/logits": logits}
            if "tokens" in aux:
                batch = {**batch, "teacher/tokens": aux["tokens"]}
        ours, frozen = optim.partition(state.params, trainable)

        def mean_loss(ours):
            rngs = nnx.Rngs(jax.random.fold_in(key, state.step)) if stochastic else None
            model = with_params(graphdef, optim.merge(ours, frozen))
            prediction, aux = (
                model(batch["image"], rngs) if teacher is None else _with_tokens(model, batch["image"], rngs)
            )
            terms = loss(prediction, aux, batch)
            return terms["loss"].mean(), ({name: term.mean() for name, term in terms.items()}, statistics_of(model))

        grads, (metrics, statistics) = jax.grad(mean_loss, has_aux=True)(ours)
        updates, opt_state = optimizer.update(grads, state.opt_state, ours)
        params = with_statistics(optim.merge(optax.apply_updates(ours, updates), frozen), statistics)
        metrics["grad_norm"] = optax.tree.norm(grads)
        return State(state.step + 1, params, opt_state), metrics

    # The key is an argument: runs that differ in their seed alone share one compiled program. So are the teacher's weights:
    # as constants they would be compiled in.
    fixed = (jax.random.key(seed), None if teacher is None else params_of(teacher))
    return partial(jax.jit(step, donate_argnums=1), fixed)


def _with_tokens(model: Model, images: Array, rngs: nnx.Rngs | None) -> tuple[Array, Aux]:
    """`model(images, rngs)`; of a ViT with aux['tokens'], the patch tokens after the last block and the last norm."""
    x, aux = model.encode(model.embed(images), rngs)
    prediction, aux = model.predict(x, aux)
    return prediction, {**aux, "tokens": model.norm(x[:, model.num_special :])} if isinstance(model, ViT) else aux


def run(
    step: Step,
    state: State,
    batches: Iterator[Mapping[str, Array]],
    *,
    until: int,
    log_every: int,
    save_every: int,
    log: Callable[[int, dict[str, float]], None],
    save: Callable[[State], None],
    label: str = "train",
) -> State:
    """Steps until state.step == until. Logs mean metrics every log_every steps and saves every save_every and at the end.

    The order is fixed: log, save, next batch, step. So a saved state has passed the check for NaN, and the iterator's
    state at a save is that of the next batch. Raises WorkError at a loss or gradient that is not finite.
    """
    start = int(state.step)
    pending: list[tuple[dict[str, Array], Any]] = []
    began, waited = time.perf_counter(), 0.0
    with Progress(label, until, "step", start) as progress:
        for at in range(start, until + 1):
            if pending and (at % log_every == 0 or at % save_every == 0 or at == until):
                num_images = sum(len(indices) for _, indices in pending)
                means = _check(at - len(pending), pending)
                elapsed = time.perf_counter() - began
                means |= {"images_per_second": num_images / elapsed, "data_wait": waited / elapsed}
                log(at, means)
                progress.update(len(pending), loss=means["loss"], images_per_second=means["images_per_second"])
                pending, began, waited = [], time.perf_counter(), 0.0
            if at > start and (at % save_every == 0 or at == until):
                save(state)
            if at == until:
                break
            before = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - before
            state, metrics = step(state, batch)
            pending.append((metrics, batch["index"]))
    return state


def _check(first: int, pending: list[tuple[dict[str, Array], Any]]) -> dict[str, float]:
    """Means of the metrics of steps first, first + 1, ..., fetched from the device at once."""
    rows = jax.device_get([metrics for metrics, _ in pending])
    for i, row in enumerate(rows):
        if not all(map(math.isfinite, (row["loss"], row["grad_norm"]))):
            images = np.asarray(pending[i][1]).tolist()
            raise WorkError(
                f"loss {row['loss']}, gradient norm {row['grad_norm']} at step {first + i} (images {str(images)[:200]}); "
                "the last checkpoint is intact: lower the learning rate or look at these images, then run again"
            )
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
