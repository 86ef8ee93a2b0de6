"""What a teacher teaches a reduced model: the losses against numpy, and the training step with them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import mostly_long, numpy_images, numpy_model
from flax import nnx
from steps import step_and_state

from tif_jax.errors import InputError
from tif_jax.models import blueprint, create_model
from tif_jax.models.params import params_of
from tif_jax.training import losses, optim
from tif_jax.training.step import make_step

TINY = dict(image_size=32, patch_size=8, width=16, depth=2, num_heads=2, mlp_dim=32, num_classes=5)


def batch(seed=0):
    label = np.arange(8, dtype=np.int32) % 5
    return {"image": np.asarray(numpy_images(8, seed=seed)), "label": label}


@functools.cache
def plain():
    return numpy_model(TINY)


def step_of(model, loss):
    """A training step that plain() teaches, and its state, abstract where the model is."""
    return step_and_state(model, loss, optim.adamw(100, learning_rate=3e-2), teacher=plain())


def metrics_of(loss, reducer, **options):
    """The traced step's metrics: nothing is compiled."""
    model = nnx.eval_shape(blueprint(TINY, reducer=reducer, **options), jax.random.key(0))
    step, init = step_of(model, loss)
    return jax.eval_shape(step.func, *step.args, jax.eval_shape(init, params_of(model)), batch())[1]


def test_training_with_a_teacher_moves_the_mask_to_the_ratio():
    def loss(prediction, aux, batch):
        return losses.distillation(prediction, aux, batch) | {"share": aux["mask"].mean(axis=1)}

    options = dict(keep_ratio=0.25, sites=(0,), ratio_weight=20.0)
    model = create_model(TINY | dict(depth=1), reducer="dynamic_vit", **options)
    step, init = step_of(model, loss)
    state, before = init(params_of(model)), jax.tree.map(np.array, params_of(plain()))
    told = []
    for _ in range(20):
        state, metrics = step(state, batch())
        told.append(jax.tree.map(float, metrics))
    shares = np.array([metrics["share"] for metrics in told])
    assert abs(shares[:3].mean() - 0.5) < 0.12 and abs(shares[-5:].mean() - 0.25) < 0.08
    assert told[-1]["loss"] < told[0]["loss"]
    assert {"teacher_kl", "teacher_mse", "top1", "grad_norm"} < set(told[0]) and told[0]["teacher_mse"] > 0
    jax.tree.map(np.testing.assert_array_equal, before, params_of(plain()))


def test_the_teachers_weights_are_arguments_of_the_step():
    model = nnx.eval_shape(blueprint(TINY, reducer="dynamic_vit"), jax.random.key(0))
    step, init = step_of(model, losses.distillation)
    program = step.func.lower(*step.args, jax.eval_shape(init, params_of(model)), batch()).as_text()
    assert 'dense<"0x' not in program  # a large constant
    assert len(jax.tree.leaves(step.args)) == 1 + len(jax.tree.leaves(params_of(plain())))


@pytest.mark.parametrize(
    ("reducer", "options"),
    mostly_long(
        [
            ("tif", dict(keep_ratio=0.5)),
            ("evo_vit", dict(keep_ratio=0.5)),
            ("full", {}),
            ("random", dict(keep_ratio=0.5)),
            ("evit", dict(keep_ratio=0.5, fuse=False)),
        ],
        short=(0, 1),
    ),
)
def test_distillation_of_other_reducers(reducer, options):
    assert metrics_of(losses.distillation, reducer, **options)["teacher_mse"].shape == ()


def test_tokens_made_of_several_patches_have_no_teacher():
    with pytest.raises(InputError, match=r"12 patch tokens come out.* distil with tokens_weight=0"):
        metrics_of(losses.distillation, "tome", num_merged=(4, 0))
    assert "teacher_cross_entropy" in metrics_of(losses.hard_distillation, "tome", num_merged=(4, 0))


def test_a_reduced_model_is_no_teacher():
    model = nnx.eval_shape(blueprint(TINY, reducer="random"), jax.random.key(0))
    with pytest.raises(InputError, match="the teacher's reducer is Random"):
        make_step(
            model, losses.distillation, optax.identity(), None, where=None, seed=0, stochastic=False, teacher=model
        )


def test_distillation_against_numpy():
    rng = np.random.default_rng(0)
    prediction, taught = rng.normal(size=(2, 3, 5)).astype(np.float32)
    tokens, teachers = jnp.asarray(rng.normal(size=(2, 3, 4, 6)).astype(np.float32))
    given = {"label": np.array([0, 1, 2]), "teacher/logits": taught, "teacher/tokens": teachers}
    mask = np.array([[1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]], np.float32)
    aux = {"tokens": tokens, "mask": mask, "loss/ratio": jnp.ones(3)}
    terms = losses.distillation(prediction, aux, given, logits_weight=0.3, tokens_weight=0.7)

    p, q = (np.exp(a) / np.exp(a).sum(1, keepdims=True) for a in (taught, prediction))
    divergence = (p * np.log(p / q)).sum(1)  # of the student from the teacher
    square = np.asarray(((tokens - teachers) ** 2).mean(2))
    difference = np.array([square[0, [0, 2]].mean(), square[1].mean(), 0.0])
    np.testing.assert_allclose(terms["teacher_kl"], divergence, rtol=1e-4)
    np.testing.assert_allclose(terms["teacher_mse"], difference, rtol=1e-5)
    cross_entropy = -np.log(q[np.arange(3), given["label"]])
    expected = cross_entropy + 1 + 0.3 * divergence + 0.7 * difference
    np.testing.assert_allclose(terms["loss"], expected, rtol=1e-4)

    kept = np.array([[0, 2], [1, 3], [0, 1]], np.int32)
    left = np.take_along_axis(tokens, kept[..., None], axis=1)
    terms = losses.distillation(prediction, {"tokens": left, "kept": jnp.asarray(kept)}, given)
    expected = np.take_along_axis(square, kept, axis=1).mean(1)
    np.testing.assert_allclose(terms["teacher_mse"], expected, rtol=1e-5)
    np.testing.assert_allclose(
        losses.distillation(prediction, {"tokens": tokens}, given)["teacher_mse"], square.mean(1), rtol=1e-5
    )
    assert "teacher_mse" not in losses.distillation(prediction, {}, given, tokens_weight=0.0)
    with pytest.raises(InputError, match="width 6, the student's 5"):
        losses.distillation(prediction, {"tokens": tokens[..., :5]}, given)

    terms = losses.hard_distillation(prediction, {}, given, weight=0.25)
    hard = -np.log(q[np.arange(3), taught.argmax(1)])
    np.testing.assert_allclose(terms["loss"], 0.75 * cross_entropy + 0.25 * hard, rtol=1e-4)
    heads = {"logits/distillation": prediction, "logits/main": taught}
    terms = losses.hard_distillation((prediction + taught) / 2, heads, given)
    labelled = -np.log(p[np.arange(3), given["label"]])
    np.testing.assert_allclose(terms["loss"], (labelled + hard) / 2, rtol=1e-4)


def test_no_gradient_teaches_the_mask_to_compare_less():
    tokens = jnp.ones((1, 4, 2))
    given = {"label": np.array([0]), "teacher/logits": jnp.zeros((1, 3)), "teacher/tokens": jnp.zeros((1, 4, 2))}
    loss = lambda mask: losses.distillation(jnp.zeros((1, 3)), {"tokens": tokens, "mask": mask}, given)["loss"].sum()  # noqa: E731
    np.testing.assert_array_equal(jax.grad(loss)(jnp.ones((1, 4))), 0)
