"""Tables over parameter paths, and AdamW by them, against what each parameter's update has to be."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tif_jax.errors import InputError
from tif_jax.training import optim


def test_match_and_partition():
    params = {"block_0": {"mlp": {"kernel": 1, "bias": 2}}, "reducer": {"kernel": 3}}
    mask = optim.match(((r"^reducer/", "r"), (r"bias$", "b")), params, "other")
    assert mask == {"block_0": {"mlp": {"kernel": "other", "bias": "b"}}, "reducer": {"kernel": "r"}}
    with pytest.raises(InputError, match="no parameter path matches 'heed'"):
        optim.match((("heed", True),), params, False)
    chosen = optim.match(((r"^reducer/", True),), params, False)
    assert optim.merge(*optim.partition(params, chosen)) == params
    assert jax.tree.leaves(optim.partition(params, chosen)[0]) == [3]


def test_adamw_schedule_and_decay():
    params = {"layer": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}}
    optimizer = optim.adamw(10, learning_rate=0.1, warmup_steps=2, weight_decay=0.5)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    zero = jax.tree.map(jnp.zeros_like, params)
    moved = []
    for _ in range(10):
        updates, state = update(zero, state, params)
        moved.append(updates["layer"]["kernel"][0].item())
        assert (updates["layer"]["bias"] == 0).all()  # no decay
    rates = [0.0, 0.05, *(0.1 * (1 + np.cos(np.pi * i / 8)) / 2 for i in range(8))]
    np.testing.assert_allclose(moved, [-0.5 * rate for rate in rates], atol=1e-6)
    assert optax.tree.norm(updates) > 0
    with pytest.raises(InputError, match="warmup_steps is 10"):
        optim.adamw(10, learning_rate=0.1, warmup_steps=10)


VIT = {
    "patch_embedding": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
    "class_token": jnp.ones((1, 1, 2)),
    **{f"block_{i}": {"mlp": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}} for i in range(2)},
    "norm": {"scale": jnp.ones(2)},
    "reducer": {"filter": {"kernel": jnp.ones((2, 2))}},
    "head": {"kernel": jnp.ones((2, 2))},
}


def moves(steps=1, gradient=1.0, **options):
    """By how much the first entry of each parameter has moved, by path, over the peak learning rate."""
    optimizer = optim.adamw(10**6, learning_rate=0.1, final_learning_rate=0.1, **options)
    state, params = optimizer.init(VIT), VIT
    update = jax.jit(optimizer.update)
    for _ in range(steps):
        updates, state = update(jax.tree.map(lambda p: gradient * jnp.ones_like(p), params), state, params)
    leaves = jax.tree_util.tree_leaves_with_path(updates)
    return {optim.path_name(path): float(leaf.ravel()[0]) / 0.1 for path, leaf in leaves}


def test_layer_decay():
    moved = moves(layer_decay=0.5)  # Adam's first step is -1
    expected = {
        "patch_embedding/kernel": 1 / 8,
        "class_token": 1 / 8,
        "block_0/mlp/bias": 1 / 4,
        "block_1/mlp/kernel": 1 / 2,
    }
    for path, factor in (expected | {"norm/scale": 1, "reducer/filter/kernel": 1, "head/kernel": 1}).items():
        assert moved[path] == pytest.approx(-factor, rel=1e-4), path


def test_rates_by_path():
    table = ((r"^reducer/", (2.0, 0)), (r"^block_0/", (0.0, 0)), (r"", (0.01, 2)))
    for steps, backbone in ((1, 0), (2, 0), (3, 0.01)):  # at rest for two steps
        moved = moves(steps, rate_factors=table)
        assert moved["reducer/filter/kernel"] == pytest.approx(-2, rel=1e-4)
        assert moved["block_0/mlp/kernel"] == 0
        assert moved["head/kernel"] == pytest.approx(-backbone, rel=1e-4)


def test_decay_by_path():
    moved = moves(gradient=0.0, weight_decay=0.5, decay_factors=((r"^block_1/", 2.0), (r"norm/scale", 1.0)))
    assert {path: move for path, move in moved.items() if move} == pytest.approx(
        {
            "patch_embedding/kernel": -0.5, "block_0/mlp/kernel": -0.5, "head/kernel": -0.5, "reducer/filter/kernel": -0.5,
            "block_1/mlp/kernel": -1.0, "block_1/mlp/bias": -1.0, "norm/scale": -0.5,
        }
    )  # fmt: skip


def test_frozen_parameters_may_lack():
    trainable = optim.match(((r"^block_0/", False),), VIT, True)
    ours = optim.partition(VIT, trainable)[0]
    optimizer = optim.adamw(10, learning_rate=0.1, layer_decay=0.5, weight_decay=0.1)
    updates, _ = optimizer.update(ours, optimizer.init(ours), ours)
    assert jax.tree.structure(updates) == jax.tree.structure(ours)


def test_adaptive_clipping_bounds_gradients_by_their_weights():
    # Adam forgets how large a gradient is; its second moment's root at step 1 does not.
    optimizer = optim.adamw(10, learning_rate=0.1, adaptive_clip=0.01)
    large = jax.tree.map(lambda p: 100 * jnp.ones_like(p), VIT)
    _, state = optimizer.update(large, optimizer.init(VIT), VIT)
    adam = next(leaf for leaf in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(leaf, "mu"))
    clipped = adam.mu["head"]["kernel"] / (1 - 0.9)
    np.testing.assert_allclose(np.linalg.norm(clipped, axis=0), 0.01 * np.sqrt(2), rtol=1e-4)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(layer_decay=0.0), "layer_decay is 0.0"),
        (dict(layer_decay=1.5), "layer_decay is 1.5"),
        (dict(rate_factors=(("hed", (1.0, 0)),)), "no parameter path matches 'hed'"),
        (dict(decay_factors=(("hed", 1.0),)), "no parameter path matches 'hed'"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(InputError, match=message):
        moves(**options)


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.9999])
def test_the_average_of_a_short_run_leaves_its_initial_weights(decay):
    """Against a loop by hand. Without the warm-up 98 % of the average at 0.9999 would be the weights of step 0."""
    rng = np.random.default_rng(0)
    weights = [*rng.normal(size=180).cumsum() / 10]
    expected, shares = 5.0, np.array([1.0])  # shares: of the initial weight and of the weights of each step
    for step, weight in enumerate(weights):
        kept = min(decay, (1 + step) / (10 + step))
        expected, shares = kept * expected + (1 - kept) * weight, np.append(kept * shares, 1 - kept)
    follow = jax.jit(lambda new, old, step: optim.averaged({"w": new}, {"w": old}, decay, step)["w"])
    average = jnp.float32(5.0)
    for step, weight in enumerate(weights):
        average = follow(jnp.float32(weight), average, jnp.int32(step))
    np.testing.assert_allclose(average, expected, rtol=1e-5)
    assert shares[0] < 1e-6
    assert shares @ np.arange(181) > 160  # the mean step that it is made of
