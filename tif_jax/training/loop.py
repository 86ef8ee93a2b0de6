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

from tif_jax.errors import InputError, Preempted, WorkError
from tif_jax.models import Model
from tif_jax.models.params import Params, params_of, statistics_of, with_params, with_statistics
from tif_jax.models.vit import ViT
from tif_jax.reducers import Aux, Full
from tif_jax.runtime.mesh import place
from tif_jax.runtime.progress import Progress
from tif_jax.training import optim
from tif_jax.training.losses import Loss
from tif_jax.training.mixing import Mixing, mix
from tif_jax.training.state import State

Step = Callable[[State, Mapping[str, Array]], tuple[State, dict[str, Array]]]

_MIXING = 2**31  # a number for the key of mixing that no part of a batch has


def init_state(params: Params, optimizer: optax.GradientTransformation, trainable: Any, ema: bool = False) -> State:
    """Step 0. trainable: tree of bools like params; only those parameters get optimiser state. ema: keep an average."""
    ours = optim.partition(params, trainable)[0]
    copy = partial(jax.tree.map, jnp.copy)  # the state will be donated
    return State(jnp.zeros((), jnp.int32), copy(params), optimizer.init(ours), copy(params) if ema else None)


def make_step(
    model: Model,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    trainable: Any,
    *,
    seed: int,
    stochastic: bool,
    teacher: Model | None = None,
    mixing: Mixing | None = None,
    accumulate: int = 1,
    ema: float = 0.0,
    where: Any = None,
) -> Step:
    """The compiled function (state, batch) -> (state, metrics): one update of the trainable parameters.

    Only they are differentiated; the others come out as they went in. stochastic: drop-path and random reducers draw
    from fold_in(key(seed), step), and a model with running statistics normalises by those of the batch, over all
    devices, and updates them. Metrics are batch means; the state is donated.

    teacher: a model without reduction, from whose outputs a loss may learn: batch['teacher/logits'] (B, L) and
    batch['teacher/tokens'] (B, N, D), to be compared with aux['tokens']. It sees the same images, draws nothing and gets
    no gradient.
    mixing: images and their labels are mixed in pairs first. accumulate: the batch is worked through in so many parts,
    one after the other, and the mean of their gradients applied. ema: decay of state.ema, per step.
    where: the state's shardings (`state.shardings`). Parameters that are divided are gathered where they are used.
    """
    if teacher is not None and not isinstance(teacher.reducer, Full):
        raise InputError(f"the teacher's reducer is {type(teacher.reducer).__name__}; a teacher has none ('full')")
    graphdef, teacher_graphdef = nnx.split(model)[0], teacher and nnx.split(teacher)[0]

    def gradient(params, teacher_params, batch, key):
        """Of the mean loss over the batch; with it, its metrics and the running statistics it leaves."""
        if teacher_params is not None:
            logits, aux = _with_tokens(with_params(teacher_graphdef, teacher_params), batch["image"], None)
            batch = {**batch, "teacher/logits": logits}
            if "tokens" in aux:
                batch = {**batch, "teacher/tokens": aux["tokens"]}
        ours, frozen = optim.partition(params, trainable)

        def mean_loss(ours):
            rngs = nnx.Rngs(key) if stochastic else None
            model = with_params(graphdef, optim.merge(ours, frozen))
            prediction, aux = (
                model(batch["image"], rngs) if teacher is None else _with_tokens(model, batch["image"], rngs)
            )
            terms = loss(prediction, aux, batch)
            return terms["loss"].mean(), ({name: term.mean() for name, term in terms.items()}, statistics_of(model))

        return jax.grad(mean_loss, has_aux=True)(ours)

    def step(fixed: Any, state: State, batch: Mapping[str, Array]) -> tuple[State, dict[str, Array]]:
        key, teacher_params = fixed
        key = jax.random.fold_in(key, state.step)
        if mixing is not None:
            batch = mix(jax.random.fold_in(key, _MIXING), batch, mixing)
        whole = state.params
        if where is not None:
            whole = jax.lax.with_sharding_constraint(whole, where.step)
        if accumulate == 1:
            grads, (metrics, statistics) = gradient(whole, teacher_params, batch, key)
        else:

            def add(so_far, part):
                statistics, grads = so_far
                number, batch = part
                more, (metrics, statistics) = gradient(
                    with_statistics(whole, statistics), teacher_params, batch, jax.random.fold_in(key, number)
                )
                return (statistics, jax.tree.map(jnp.add, grads, more)), metrics

            ours = optim.partition(whole, trainable)[0]
            begin = statistics_of(with_params(graphdef, whole)), jax.tree.map(jnp.zeros_like, ours)
            parts = jnp.arange(accumulate), jax.tree.map(partial(_parts, accumulate), batch)
            (statistics, grads), metrics = jax.lax.scan(add, begin, parts)
            grads, metrics = jax.tree.map(lambda sums: sums / accumulate, grads), jax.tree.map(jnp.mean, metrics)
        ours, frozen = optim.partition(state.params, trainable)
        if where is not None:
            grads = jax.lax.with_sharding_constraint(grads, optim.partition(where.params, trainable)[0])
        updates, opt_state = optimizer.update(grads, state.opt_state, ours)
        updated = with_statistics(optim.merge(optax.apply_updates(ours, updates), frozen), statistics)
        params = optim.merge(optim.partition(updated, trainable)[0], frozen)  # statistics may be frozen, too
        average = None if state.ema is None else optax.incremental_update(params, state.ema, 1 - ema)
        metrics["grad_norm"] = optax.tree.norm(grads)
        return State(state.step + 1, params, opt_state, average), metrics

    # The key is an argument: runs that differ in their seed alone share one compiled program. So are the teacher's weights:
    # as constants they would be compiled in.
    fixed = (jax.random.key(seed), None if teacher is None else params_of(teacher))
    if where is None:
        return partial(jax.jit(step, donate_argnums=1), fixed)
    everywhere = where.step
    key = jax.jit(lambda: jax.random.key(seed), out_shardings=everywhere)()  # a copy at every step would be a transfer
    fixed = (key, None if teacher is None else place(fixed[1], jax.tree.map(lambda _: everywhere, fixed[1])))
    return partial(jax.jit(step, donate_argnums=1, out_shardings=(where, everywhere)), fixed)


def _parts(number: int, rows: Array) -> Array:
    """Rows (B, ...) as (number, B / number, ...), each part with rows of every device that divides it."""
    return jnp.moveaxis(rows.reshape(-1, number, *rows.shape[1:]), 1, 0)


def _with_tokens(model: Model, images: Array, rngs: nnx.Rngs | None) -> tuple[Array, Aux]:
    """`model(images, rngs)`; of a ViT with aux['tokens'], the patch tokens after the last block and the last norm."""
    x, aux = model.encode(model.embed(images, rngs), rngs)
    prediction, aux = model.predict(x, aux, rngs=rngs)
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
    stop: Callable[[], bool] = lambda: False,
    label: str = "train",
) -> State:
    """Steps until state.step == until. Logs mean metrics every log_every steps and saves every save_every and at the end.

    The order is fixed: log, save, next batch, step. So a saved state has passed the check for NaN, and the iterator's
    state at a save is that of the next batch. Between logs and saves nothing waits for the device, and nothing is copied
    to it that was not put there on purpose (jax.transfer_guard). Raises WorkError at a loss or gradient that is not
    finite, and Preempted, after logging and saving, once stop() is true; it is asked at every step and at the end.
    """
    start = int(jax.device_get(state.step))
    pending: list[tuple[Mapping[str, Any], Any]] = []
    began, waited = time.perf_counter(), 0.0
    with Progress(label, until, "step", start) as progress:
        for at in range(start, until + 1):
            stopping = stop()
            if pending and (stopping or at % log_every == 0 or at % save_every == 0 or at == until):
                num_images = sum(len(indices) for _, indices in pending)
                means = _check(at - len(pending), pending)
                elapsed = time.perf_counter() - began
                means |= {
                    "images_per_second": num_images / elapsed,
                    "step_seconds": elapsed / len(pending),
                    "data_wait": waited / elapsed,
                }
                log(at, means)
                progress.update(len(pending), loss=means["loss"], images_per_second=means["images_per_second"])
                pending, began, waited = [], time.perf_counter(), 0.0
            if at > start and (stopping or at % save_every == 0 or at == until):
                save(state)
            if stopping:
                raise Preempted(f"stopped at step {at}, nothing is lost; run the same command again to go on")
            if at == until:
                break
            with jax.transfer_guard("disallow"):
                before = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - before
                state, metrics = step(state, batch)
            pending.append((metrics, batch["index"]))
    return state


def _check(first: int, pending: list[tuple[Mapping[str, Any], Any]]) -> dict[str, float]:
    """Means of the metrics of steps first, first + 1, ..., fetched from the device at once."""
    rows = jax.device_get([metrics for metrics, _ in pending])
    for i, row in enumerate(rows):
        if not all(map(math.isfinite, (row["loss"], row["grad_norm"]))):
            images = np.concatenate([rows.data for rows in pending[i][1].addressable_shards]).tolist()
            raise WorkError(
                f"loss {row['loss']}, gradient norm {row['grad_norm']} at step {first + i} (images {str(images)[:200]}); "
                "the last checkpoint is intact: lower the learning rate or look at these images, then run again"
            )
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
