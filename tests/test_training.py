"""Losses, optimiser, step, loop, checkpoints: what is differentiated, what rests, and that a run can be cut anywhere."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import lively, numpy_model
from steps import step_and_state

from tif_jax.errors import InputError, WorkError
from tif_jax.impact.labels import keep_labels, position_prior
from tif_jax.models.params import params_of
from tif_jax.runtime import progress
from tif_jax.runtime.mesh import make_mesh, shard
from tif_jax.training import losses, optim
from tif_jax.training.checkpoints import Checkpoints
from tif_jax.training.loop import run
from tif_jax.training.state import State

TINY = dict(image_size=16, patch_size=8, width=16, depth=2, num_heads=2, num_classes=3)


def batch(seed=0, num=8, **more):
    rng = np.random.default_rng(seed)
    arrays = {"image": rng.normal(size=(num, 16, 16, 3)), "impact": rng.normal(size=(num, 4))}
    arrays = {name: a.astype(np.float32) for name, a in arrays.items()}
    return arrays | {"label": np.arange(num, dtype=np.int32) % 3, "index": np.arange(num) + 100 * seed} | more


@functools.cache
def setup(reducer="full", loss=losses.classification, trainable=(), default=True, **fields):
    """(step, fresh state, mesh) of a tiny run."""
    options = {} if reducer == "full" else {"keep_ratio": 0.5}
    model = numpy_model(TINY | fields, reducer=reducer, **options)
    optimizer = optim.adamw(20, learning_rate=1e-2, weight_decay=0.1)
    mask = optim.match(trainable, params_of(model), default)
    mesh = make_mesh(8)
    step, init = step_and_state(model, loss, optimizer, mask, mesh)
    return step, lambda: init(params_of(model)), mesh


def filter_setup(depth=2):
    return setup("tif", losses.impact, ((r"^reducer/", True),), False, depth=depth)


def test_the_filter_step_does_not_run_the_blocks():
    flops = []
    for depth in (1, 6):
        step, fresh, mesh = filter_setup(depth)
        compiled = step.func.lower(*step.args, fresh(), shard(batch(), mesh)).compile()
        flops.append(compiled.cost_analysis()["flops"])
    assert flops[0] == flops[1]


def test_the_filter_step_leaves_every_backbone_leaf_as_it_was():
    step, fresh, mesh = filter_setup()
    state = fresh()
    before = jax.device_get(state.params)
    for i in range(10):
        state, _ = step(state, shard(batch(i), mesh))
    after = jax.device_get(state.params)
    moved = [
        not np.array_equal(a, b)
        for a, b in zip(*map(jax.tree.leaves, (before.pop("reducer"), after.pop("reducer"))), strict=True)
    ]
    assert sum(moved) > len(moved) / 2
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_filter_training_lowers_its_loss_and_separates_the_labels():
    step, fresh, mesh = filter_setup()
    state, told = fresh(), []
    for _ in range(20):
        state, metrics = step(state, shard(batch(), mesh))
        told.append(metrics)
    assert told[-1]["loss"] < 0.7 * told[0]["loss"] and told[-1]["accuracy"] > told[0]["accuracy"]
    assert 0.3 < told[0]["positives"] < 0.7


def test_drop_path_draws_anew_at_every_step_and_the_same_when_repeated():
    step, fresh, mesh = setup(drop_path=0.5)
    data = shard(batch(), mesh)
    told = [step(State(jnp.int32(s), *fresh()[1:]), data)[1]["loss"].item() for s in (0, 0, 1)]
    assert told[0] == told[1] != told[2]


def cut_run(directory, stops):
    """A run of 4 steps cut at `stops`, each leg from the checkpoint of the one before; returns its parameters."""
    step, fresh, mesh = setup(drop_path=0.5)
    for until in (*stops, 4):
        with Checkpoints(directory) as checkpoints:
            state = fresh()
            position = 0
            if restored := checkpoints.restore(state):
                state, config = restored
                position = config["position"]["next"]
            assert int(state.step) == position
            batches = (shard(batch(i), mesh) for i in range(position, 10))
            log = lambda at, metrics: None  # noqa: E731
            save = lambda state: checkpoints.save(state, {"model": TINY}, {"next": int(state.step)})  # noqa: E731
            state = run(step, state, batches, until=until, log_every=1, save_every=1, log=log, save=save)
    return jax.device_get(state)


def test_resume_is_bit_for_bit(tmp_path):
    whole, cut = cut_run(tmp_path / "whole", ()), cut_run(tmp_path / "cut", (2, 3))
    assert whole.step == cut.step == 4
    jax.tree.map(np.testing.assert_array_equal, whole, cut)


def test_order_of_the_loop(caplog, monkeypatch):
    events = []

    def step(state, batch):
        events.append(f"step {int(state.step)}")
        return State(np.int32(state.step + 1), {}, ()), {"loss": np.float32(1), "grad_norm": np.float32(1)}

    def batches():
        for i in range(9):
            events.append(f"batch {i}")
            yield {"index": np.array([i])}

    log = lambda at, metrics: events.append(f"log {at}")  # noqa: E731
    save = lambda state: events.append(f"save {int(state.step)}")  # noqa: E731
    with caplog.at_level(logging.INFO), monkeypatch.context() as patched:
        patched.setattr(progress, "_SECONDS_BETWEEN_LINES", -1)
        run(step, State(np.int32(0), {}, ()), batches(), until=3, log_every=2, save_every=2, log=log, save=save, of=8)
    assert "train: 3 of 8 step" in caplog.text  # the phase after it is to come
    assert events == (
        "batch 0,step 0,batch 1,step 1,log 2,save 2,batch 2,step 2,log 3,save 3".split(",")
    )  # no batch is taken that no step uses


def test_label_maps_that_say_nothing_are_told_while_it_trains(caplog):
    valid = iter([0.0, 0.0, 0.0, 0.5, 0.0])

    def step(state, batch):
        metrics = {"loss": 0.0, "grad_norm": 0.0, "valid": np.float32(next(valid))}
        return State(np.int32(state.step + 1), {}, ()), metrics

    batches = ({"index": np.array([i])} for i in range(5))
    nothing = lambda *_: None  # noqa: E731
    run(step, State(np.int32(0), {}, ()), batches, until=4, log_every=2, save_every=9, log=nothing, save=nothing)
    [record] = [r for r in caplog.records if r.levelname == "WARNING"]  # of steps 2 and 3 some count
    assert "no pixel of the label maps of steps 0 to 1 counts" in record.getMessage()


def test_nan_stops_before_it_is_saved_and_names_step_and_images(tmp_path):
    step, fresh, mesh = setup()
    poisoned = batch(2)
    poisoned["image"] = poisoned["image"] * np.nan
    batches = iter([shard(b, mesh) for b in (batch(0), batch(1), poisoned, batch(3))])
    with Checkpoints(tmp_path) as checkpoints:
        save = lambda state: checkpoints.save(state, {"model": TINY}, {})  # noqa: E731
        with pytest.raises(WorkError, match=r"step 2 \(images \[200, 201") as error:
            run(step, fresh(), batches, until=4, log_every=4, save_every=2, log=lambda *_: None, save=save)
        checkpoints.wait()
        assert checkpoints.steps() == [2] and "\n" not in str(error.value)
        state, _ = checkpoints.restore(fresh())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state.params)))


def damage(folder):
    """Flips bits all over the files that hold the arrays."""
    for file in (f for f in folder.rglob("d/*") if f.is_file()):
        data = bytearray(file.read_bytes())
        for i in range(0, len(data), 61):
            data[i] ^= 1
        file.write_bytes(data)


def test_a_damaged_checkpoint_is_named_moved_aside_and_the_one_before_used(tmp_path, caplog):
    cut_run(tmp_path / "c", ())
    kept = sorted(int(p.name) for p in (tmp_path / "c").iterdir() if p.name.isdigit())
    assert kept == [3, 4]
    damage(tmp_path / "c" / "4" / "params")
    fresh = setup(drop_path=0.5)[1]
    with caplog.at_level(logging.WARNING), Checkpoints(tmp_path / "c") as checkpoints:
        state, config = checkpoints.restore(fresh())
        assert int(state.step) == 3 == config["position"]["next"] and "4 is damaged" in caplog.text
        assert (tmp_path / "damaged-4").is_dir() and checkpoints.steps() == [3]
        checkpoints.save(State(jnp.int32(4), *state[1:]), {"model": TINY}, {})  # its place is free again
        checkpoints.wait()
        assert checkpoints.steps() == [3, 4]
    for name in ("3", "4"):
        (tmp_path / "c" / name / "params").rename(tmp_path / f"gone-{name}")
    with Checkpoints(tmp_path / "c") as checkpoints, pytest.raises(InputError, match=r"no checkpoint in .* is whole"):
        checkpoints.restore(fresh())


def test_keep_labels():
    impact = np.array([[0.3, -0.1, 0.2, 0.0], [-1.0, -2.0, -3.0, -4.0]], np.float32)
    np.testing.assert_array_equal(keep_labels(impact), [[1, 0, 1, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(keep_labels(impact, -1.5), [[1, 1, 1, 1], [1, 0, 0, 0]])
    np.testing.assert_array_equal(keep_labels(impact, "top", 0.5), [[1, 0, 1, 0], [1, 1, 0, 0]])
    prior = position_prior(keep_labels(impact, "top", 0.5))
    np.testing.assert_allclose(jax.nn.sigmoid(prior), [3 / 4, 2 / 4, 2 / 4, 1 / 4], atol=1e-6)


def test_impact_loss_against_numpy():
    rng = np.random.default_rng(0)
    logits, impact = rng.normal(size=(2, 3, 5)).astype(np.float32)
    terms = losses.impact(None, {"filter_logits": jnp.asarray(logits)}, {"impact": impact}, positive_weight=3.0)
    probability = 1 / (1 + np.exp(-logits))
    expected = -np.where(impact > 0, 3 * np.log(probability), np.log(1 - probability)).mean(axis=1)
    np.testing.assert_allclose(terms["loss"], expected, rtol=1e-5)


def test_divergence_against_numpy():
    taught, said = np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)
    terms = losses.divergence(said, {}, {"teacher/logits": taught})
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (taught, said))
    np.testing.assert_allclose(terms["teacher_kl"], (p * np.log(p / q)).sum(1), rtol=1e-4)
    np.testing.assert_allclose(terms["loss"], np.log(0.1 + (p * np.log(p / q)).sum(1)), rtol=1e-4)
    np.testing.assert_array_equal(terms["agreement"], said.argmax(1) == taught.argmax(1))


def test_classification_against_numpy():
    rng = np.random.default_rng(0)
    one, two = rng.normal(size=(2, 4, 3)).astype(np.float32)
    label = np.array([0, 1, 2, 0])
    cross_entropy = lambda x: np.log(np.exp(x).sum(1)) - x[np.arange(4), label]  # noqa: E731
    terms = losses.classification(one, {}, {"label": label})
    np.testing.assert_allclose(terms["loss"], cross_entropy(one), rtol=1e-5)
    np.testing.assert_array_equal(terms["top1"], one.argmax(1) == label)
    aux = {"logits/a": one, "logits/b": two, "loss/extra": jnp.ones(4), "kept": None}
    terms = losses.classification((one + two) / 2, aux, {"label": label})
    np.testing.assert_allclose(terms["loss"], (cross_entropy(one) + cross_entropy(two)) / 2 + 1, rtol=1e-5)


def test_frozen_statistics_rest():
    model = lively(
        dict(family="levit", image_size=32, widths=(16,), depths=(1,), num_heads=(2,), key_dim=4, num_classes=3)
    )
    params = jax.device_get(params_of(model))
    trainable = optim.match((("^stem/", False),), params, True)
    step, init = step_and_state(model, losses.classification, optim.adamw(9, learning_rate=1e-2), trainable)
    images = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)
    state, _ = step(init(params), {"image": images, "label": np.arange(4) % 3})
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        before = functools.reduce(lambda tree, key: tree[key.key], path, params)
        if path[0].key == "stem":
            np.testing.assert_array_equal(leaf, before)
    assert np.abs(state.params["block_0"]["mlp"]["up"]["norm"]["mean"]).max() > 0
