"""The training step: one update of the trainable parameters, as one compiled program.

Legend: B images, L classes, N patch tokens, D channels.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array

from tif_jax.errors import InputError
from tif_jax.models import Model
from tif_jax.models.gradients import for_gradients
from tif_jax.models.params import Params, params_of, statistics_of, with_params, with_statistics
from tif_jax.models.vit import ViT
from tif_jax.reducers import Aux, Full
from tif_jax.runtime.mesh import place
from tif_jax.training import optim
from tif_jax.training.gathering import as_others, gathered, not_kept
from tif_jax.training.losses import Loss
from tif_jax.training.mixing import Mixing, mix
from tif_jax.training.state import State

Batch = Mapping[str, Array]
Metrics = dict[str, Array]
Step = Callable[[State, Batch], tuple[State, Metrics]]

# (parameters, the teacher's parameters or None, batch, key) -> (gradient of the mean loss with respect to the trainable
# parameters, (batch means of the loss's terms, running statistics after the batch, the share of its images that count))
_Gradient = Callable[[Params, Params | None, Batch, Array], tuple[Params, tuple[Metrics, Params, Array]]]

_MIXING = 2**31  # is folded into the key for mixing: no part of a batch has this number


def make_step(
    model: Model,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    trainable: Any,
    *,
    where: Any,
    seed: int,
    stochastic: bool,
    teacher: Model | None = None,
    mixing: Mixing | None = None,
    accumulate: int = 1,
    ema: float = 0.0,
) -> Step:
    """The compiled function (state, batch) -> (state, metrics). Metrics are batch means; the state is donated.

    trainable: tree of bools like the parameters. Only these parameters are differentiated; the others stay as they are.
    where: the state's shardings (`state.shardings`). Divided parameters are whole only while they are used (`gathering`).
    stochastic: drop-path and random reducers draw from fold_in(key(seed), step); a model with running statistics
    normalises by those of the batch, over all devices, and updates them.
    teacher: a model without reduction. The loss may read its outputs for the same images: batch['teacher/logits'] (B, L)
    and, of a ViT, batch['teacher/tokens'] (B, N, D), which go with aux['tokens']. It draws nothing and gets no gradient.
    mixing: images and labels are mixed in pairs first. accumulate: the batch is divided into so many parts, worked
    through one after the other; the mean of their gradients, by how many images count in each, is applied. ema: decay of
    state.ema, see `optim.averaged`.
    Raises InputError for a teacher with a reducer.
    """
    if teacher is not None and not isinstance(teacher.reducer, Full):
        raise InputError(f"the teacher's reducer is {type(teacher.reducer).__name__}; a teacher has none ('full')")
    graphdef = nnx.split(for_gradients(model, where.step.device_set))[0]
    gradient = _gradient(graphdef, loss, trainable, stochastic, teacher, where.params)
    if accumulate > 1:
        gradient = _accumulated(gradient, graphdef, trainable, accumulate)

    def ours(params: Params) -> Params:
        return optim.partition(params, trainable)[0]

    def step(constants: tuple[Array, Params | None], state: State, batch: Batch) -> tuple[State, Metrics]:
        key, teacher_params = constants
        key = jax.random.fold_in(key, state.step)
        if mixing is not None:
            batch = mix(jax.random.fold_in(key, _MIXING), batch, mixing)
        grads, (metrics, statistics, _) = gradient(state.params, teacher_params, batch, key)
        grads = jax.lax.with_sharding_constraint(grads, ours(where.params))
        updates, opt_state = optimizer.update(grads, state.opt_state, ours(state.params))
        updated = with_statistics(optax.apply_updates(ours(state.params), updates), statistics)
        params = optim.merge(ours(updated), state.params)  # without the statistics that are frozen
        average = None if state.ema is None else optim.averaged(params, state.ema, ema, state.step)
        return State(state.step + 1, params, opt_state, average), metrics | {"grad_norm": optax.tree.norm(grads)}

    # Arguments, though they never change: runs that differ in their seed alone share one compiled program, and the
    # teacher's weights are not compiled into it. Lying where the step needs them, they are not copied at every call.
    key = jax.jit(lambda: jax.random.key(seed), out_shardings=where.step)()
    teacher_params = None
    if teacher is not None:
        teacher_params = place(params_of(teacher), as_others(params_of(teacher), where.params))
    return partial(jax.jit(step, donate_argnums=1, out_shardings=(where, where.step)), (key, teacher_params))


def _gradient(
    graphdef: Any, loss: Loss, trainable: Any, stochastic: bool, teacher: Model | None, where: Any
) -> _Gradient:
    is_divided = not all(sharding.is_fully_replicated for sharding in jax.tree.leaves(where))
    teacher_graphdef = None if teacher is None else nnx.split(teacher)[0]

    def gradient(params, teacher_params, batch, key):
        if teacher_graphdef is not None:
            taught = gathered(teacher_params, as_others(teacher_params, where))
            batch = {**batch, **_taught(with_params(teacher_graphdef, taught), batch["image"])}
        ours, frozen = optim.partition(params, trainable)

        def mean_loss(ours):
            params = optim.merge(ours, frozen)
            model = with_params(graphdef, gathered(params, where) if is_divided else params)
            forward = model if teacher_graphdef is None else partial(_with_tokens, model)
            prediction, aux = forward(batch["image"], nnx.Rngs(key) if stochastic else None)
            means, share = _means(loss(prediction, aux, batch))
            return means["loss"], (means, statistics_of(model), share)

        return jax.grad(not_kept(mean_loss) if is_divided else mean_loss, has_aux=True)(ours)

    return gradient


def _means(terms: Mapping[str, Array]) -> tuple[Metrics, Array]:
    """Over the images of a batch that count, and how large a share of it they are: images of which no pixel does are left out
    (`valid` is 0)."""
    if "valid" not in terms:
        return {name: term.mean() for name, term in terms.items()}, jnp.ones((), terms["loss"].dtype)
    counts = (terms["valid"] > 0).astype(terms["loss"].dtype)
    number = jnp.maximum(counts.sum(), 1)
    means = {name: (term * counts).sum() / number for name, term in terms.items()}
    return means | {"valid": terms["valid"].mean()}, counts.mean()


def _accumulated(gradient: _Gradient, graphdef: Any, trainable: Any, num_parts: int) -> _Gradient:
    """The mean of `gradient` and of its metrics over the parts of a batch, by how many images count in each; each part begins
    with the statistics that the part before it left."""

    def accumulated(params, teacher_params, batch, key):
        def add(so_far, part):
            statistics, sums = so_far
            number, batch = part
            params_now, key_now = with_statistics(params, statistics), jax.random.fold_in(key, number)
            grads, (metrics, statistics, share) = gradient(params_now, teacher_params, batch, key_now)
            return (statistics, jax.tree.map(lambda sum, grad: sum + share * grad, sums, grads)), (metrics, share)

        zeros = jax.tree.map(jnp.zeros_like, optim.partition(params, trainable)[0])
        parts = jnp.arange(num_parts), jax.tree.map(partial(_parts, num_parts), batch)
        begin = statistics_of(with_params(graphdef, params)), zeros
        (statistics, sums), (metrics, shares) = jax.lax.scan(add, begin, parts)
        total = jnp.where(shares.any(), shares.sum(), 1)
        means = {name: (shares * of_parts).sum() / total for name, of_parts in metrics.items()}
        if "valid" in metrics:  # of all images
            means["valid"] = metrics["valid"].mean()
        return jax.tree.map(lambda sum: sum / total, sums), (means, statistics, shares.mean())

    return accumulated


def _parts(number: int, rows: Array) -> Array:
    """Rows (B, ...) as (number, B / number, ...), each part with rows of every device that divides it."""
    return jnp.moveaxis(rows.reshape(-1, number, *rows.shape[1:]), 1, 0)


def _taught(teacher: Model, images: Array) -> dict[str, Array]:
    """What a loss may learn from the teacher, by its key in the batch."""
    logits, aux = _with_tokens(teacher, images, None)
    return {"teacher/logits": logits} | ({"teacher/tokens": aux["tokens"]} if "tokens" in aux else {})


def _with_tokens(model: Model, images: Array, rngs: nnx.Rngs | None) -> tuple[Array, Aux]:
    """`model(images, rngs)`; of a ViT with aux['tokens'], the patch tokens after the last block and the last norm."""
    x, aux = model.encode(model.embed(images, rngs), rngs)
    prediction, aux = model.predict(x, aux, rngs=rngs)
    return prediction, {**aux, "tokens": model.norm(x[:, model.num_special :])} if isinstance(model, ViT) else aux
