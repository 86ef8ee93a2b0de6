"""Training steps for tests: a compiled step and the state it begins with, both on the devices of a mesh."""

import functools

import jax

from tif_jax.models.params import params_of
from tif_jax.runtime.mesh import make_mesh
from tif_jax.training.state import init_state, shardings
from tif_jax.training.step import make_step


def step_and_state(model, loss, optimizer, trainable=None, mesh=None, *, seed=0, stochastic=True, ema=0.0, **options):
    """(step, init): init(parameters of the model) is a state of step 0.

    trainable: default: all parameters. mesh: default: one device. Of an abstract model the step can be traced, not run.
    """
    params = params_of(model)
    trainable = jax.tree.map(lambda _: True, params) if trainable is None else trainable
    init = functools.partial(init_state, optimizer=optimizer, trainable=trainable, ema=bool(ema))
    where = shardings(jax.eval_shape(init, params), mesh or make_mesh(1))
    step = make_step(
        model, loss, optimizer, trainable, where=where, seed=seed, stochastic=stochastic, ema=ema, **options
    )
    return step, jax.jit(init, out_shardings=where)
