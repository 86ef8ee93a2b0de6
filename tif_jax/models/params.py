"""Parameters of a model as nested dicts of arrays, and back."""

from typing import Any

from flax import nnx, traverse_util

from tif_jax.layers import WEIGHTS
from tif_jax.models.model import Model
from tif_jax.runtime.digests import digest

Params = dict[str, Any]


def params_of(model: Model) -> Params:
    """The model's parameters, and running statistics if it has any, as a nested dict of arrays with string keys."""
    return nnx.to_pure_dict(nnx.state(model, WEIGHTS))


def share(model: Model, whole: Model) -> None:
    """Puts the other's parameters in the place of the model's, but for those of its reducer: one copy in memory."""
    nnx.update(model, {name: leaf for name, leaf in params_of(whole).items() if name != "reducer"})


def backbone_digest(params: Params) -> str:
    """Identity of a backbone: the digest of its parameters and running statistics, whatever its reducer has."""
    return digest({name: leaf for name, leaf in params.items() if name != "reducer"})


def with_params(graphdef: Any, params: Params) -> Model:
    """The model of `nnx.split(model)[0]` with these parameters; inside jit this costs nothing at run time."""
    return nnx.merge(graphdef, nnx.State(params))


def statistics_of(model: Model) -> Params:
    """The part of `params_of` that training does not learn but measures; empty for a ViT."""
    return nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))


def with_statistics(params: Params, statistics: Params) -> Params:
    """The parameters with these statistics in the place of theirs."""
    merged = {**traverse_util.flatten_dict(params), **traverse_util.flatten_dict(statistics)}
    return traverse_util.unflatten_dict(merged)
