"""Checkpoints on disk: damaged ones, those that can not be read for now, and models loaded from them."""

import errno
import logging
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import call, numpy_images, numpy_model
from flax import nnx

from tif_jax.errors import InputError, WorkError
from tif_jax.models.params import params_of
from tif_jax.training import checkpoints as checkpoints_file
from tif_jax.training.checkpoints import Checkpoints, load_params
from tif_jax.training.state import State
from tif_jax.weights.loading import load

TINY = dict(image_size=16, patch_size=8, width=16, depth=2, num_heads=2, num_classes=3)


def test_what_a_killed_write_left_is_gone_before_orbax_looks(tmp_path):
    for part in ("4.orbax-checkpoint-tmp/params/d/x", "2.orbax-checkpoint-tmp-1700/x", "metrics/x"):
        (tmp_path / part).parent.mkdir(parents=True)
        (tmp_path / part).touch()
    with Checkpoints(tmp_path) as checkpoints:
        assert [path.name for path in tmp_path.iterdir()] == ["metrics"] and checkpoints.steps() == []


@pytest.mark.parametrize(
    ("failure", "raised"),
    [
        (MemoryError("x"), MemoryError),
        (RuntimeError("can't start new thread"), RuntimeError),
        (OSError(errno.ESTALE, os.strerror(errno.ESTALE)), WorkError),
        (ValueError(f"Error opening driver [os_error_code='{errno.EIO}']"), WorkError),
    ],
)
def test_a_checkpoint_that_the_machine_could_not_read_is_not_damaged(tmp_path, monkeypatch, failure, raised):
    def fail(*_):
        raise failure

    state = State(jnp.int32(1), {"w": jnp.zeros(4)}, ())
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(state, {}, {})
        checkpoints.wait()
        monkeypatch.setattr(checkpoints_file, "_shapes", fail)
        with pytest.raises(raised):
            checkpoints.restore(state)
        with pytest.raises(raised):
            load_params(tmp_path / "c")
        assert checkpoints.steps() == [1] and not list(tmp_path.glob("damaged-*"))


def test_a_state_of_another_form_is_refused_and_stays(tmp_path):
    """As after an update of optax: nothing is moved, and no later run begins at step 0."""
    with Checkpoints(tmp_path / "c") as checkpoints:
        for step in (1, 2):
            checkpoints.save(State(jnp.int32(step), {"w": jnp.zeros(4)}, {"mu": jnp.zeros(4)}), {}, {})
        checkpoints.wait()
        for _ in range(2):
            with pytest.raises(InputError, match=r"is whole .tried steps .2, 1.; of 2: .*delete that folder to start"):
                checkpoints.restore(State(jnp.int32(0), {"w": jnp.zeros(4)}, {"nu": jnp.zeros(4)}))
        assert checkpoints.steps() == [1, 2]


def test_one_flipped_bit_in_a_large_array_is_found(tmp_path):
    large = State(jnp.int32(1), {"w": np.random.default_rng(0).normal(size=(400, 400)).astype(np.float32)}, ())
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(large, {}, {})
    file = max((f for f in (tmp_path / "checkpoints").rglob("d/*") if f.is_file()), key=lambda f: f.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(InputError, match=r"checkpoints/1 is damaged .*arrays of params do not have the digest"):
        load_params(tmp_path / "checkpoints")


def test_load_runs_a_checkpoint_under_any_reducer(tmp_path, caplog):
    model = numpy_model(TINY, reducer="tif", keep_ratio=0.5, seed=3)
    description = {"model": TINY, "reducer": {"name": "tif", "keep_ratio": 0.5}}
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        checkpoints.save(State(jnp.int32(7), params_of(model), ()), description, {})
    images = numpy_images(8, (16, 16))
    again = load(tmp_path / "run")
    np.testing.assert_array_equal(call(again, images)[0], call(model, images)[0])
    assert call(load(tmp_path / "run", keep_ratio=0.25), images)[1]["kept"].shape == (8, 1)
    full = load(tmp_path / "run" / "checkpoints" / "7", reducer="full")
    full_reducer = numpy_model(TINY)
    nnx.update(full_reducer, {k: v for k, v in params_of(model).items() if k != "reducer"})
    np.testing.assert_allclose(call(full, images)[0], call(full_reducer, images)[0], atol=1e-6)
    with caplog.at_level(logging.INFO):
        load(tmp_path / "run", reducer="prior", keep_ratio=0.5)
    assert "freshly initialised: reducer" in caplog.text
    larger = load(tmp_path / "run", reducer="full", image_size=32)
    assert larger.position_embedding.shape == (1, 17, 16)
    with pytest.raises(InputError, match="does not fit this model"):
        load(tmp_path / "run", width=32)
    with pytest.raises(InputError, match="no checkpoint in"):
        load(tmp_path)


def test_a_reducer_that_is_named_has_its_own_amount(tmp_path):
    """As its label says; what the weights were saved with is for whoever names none."""
    tome = {"name": "tome", "num_merged": 1, "proportional": False}
    tif = {"name": "tif", "keep_ratio": 0.25, "adapter": 4, "round_to": 2, "then": tome}
    learner = {"name": "token_learner", "keep_ratio": 0.25, "site": 1}
    for description in (tome, tif, learner):
        given = {name: value for name, value in description.items() if name != "name"}
        model = numpy_model(TINY, reducer=description["name"], **given)
        with Checkpoints(tmp_path / description["name"] / "checkpoints") as checkpoints:
            checkpoints.save(State(jnp.int32(7), params_of(model), ()), {"model": TINY, "reducer": description}, {})
    own, named = (load(tmp_path / "tome", reducer=name).reducer for name in (None, "tome"))
    assert (own.num_merged, own.proportional) == (1, False) and (named.num_merged, named.proportional) == (13, True)
    own, named = (load(tmp_path / "tif", reducer=name) for name in (None, "tif"))
    assert own.reducer.keep_ratio == 0.25 and named.reducer.keep_ratio == 0.5
    assert own.reducer.round_to == 2 and named.reducer.round_to == 1 and type(named.reducer.then).__name__ == "Full"
    jax.tree.map(np.testing.assert_array_equal, params_of(named), params_of(own))  # the adapter, too
    wider = load(tmp_path / "tif", reducer="tif", keep_ratio=0.75, then=tome).reducer
    assert wider.keep_ratio == 0.75 and wider.adapter is not None and wider.then.num_merged == 1
    # What it has learned has a form for one amount alone, which stays.
    own, named = (load(tmp_path / "token_learner", reducer=name) for name in (None, "token_learner"))
    jax.tree.map(np.testing.assert_array_equal, params_of(named), params_of(own))


def test_a_checkpoint_with_an_average_is_loaded_as_that(tmp_path, caplog):
    model, average = (params_of(numpy_model(TINY, seed=seed)) for seed in (0, 1))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(State(jnp.int32(1), model, (), average), {"model": TINY, "reducer": {"name": "full"}}, {})
    caplog.clear()
    jax.tree.map(np.testing.assert_array_equal, params_of(load(tmp_path)), average)
    assert "absl" not in {
        record.name for record in caplog.records
    }  # Orbax looks for no file that is not meant to be there
