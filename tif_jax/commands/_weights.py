"""The weights of programs that put them under reducers without a config: all models share one copy."""

from typing import Any, NamedTuple

from tif_jax import reducers
from tif_jax.models import Model, built_with, require_head
from tif_jax.models.params import params_of, share
from tif_jax.runtime.digests import digest
from tif_jax.training.checkpoints import newest
from tif_jax.weights import hub
from tif_jax.weights.loading import load_with_fields
from tif_jax.weights.where import checkpoint_directory, located

_SAID_ONCE = ("num_heads", "pool", "gelu", "norm_eps", "activation")  # what `load` says that it takes for granted


class Weights(NamedTuple):
    """The weights, the model with all tokens, and what that was built with."""

    source: str
    read_from: str  # the same; of checkpoints one step's, since a training may write newer ones meanwhile
    full: Model
    fields: dict[str, Any]
    own: dict[str, Any]  # the reducer that they were saved with: name and options
    dtype: str
    digest: str  # of all parameters, those of the own reducer, too

    def model(self, reducer: dict[str, Any]) -> Model:
        """The model under a reducer, name and options. Raises InputError if the weights lack what it has to learn."""
        own = dict(reducer)
        known = {name: self.fields[name] for name in _SAID_ONCE if name in self.fields}
        model, _ = load_with_fields(
            self.read_from, reducer=own.pop("name"), dtype=self.dtype, fresh_told_at=None,
            named=[*reducers.modules_in(reducer)], preprocessing=self.full.preprocessing, **known, **own,
        )  # fmt: skip
        share(model, self.full)  # however many rows there are
        return model


def read_weights(source: str, dtype: str, what: str) -> Weights:
    """what: what they are for, as an error says it.

    Raises InputError for weights that can not be read, and for those of another task than classes of pictures.
    """
    source = hub.pinned(source) if hub.is_name(source) else source
    read_from = str(newest(checkpoint_directory(there))) if (there := located(source)).is_dir() else source
    model, fields = load_with_fields(read_from, dtype=dtype, fresh_told_at=None)
    require_head(model, what)
    own, identity = built_with(model)["reducer"], digest(params_of(model))
    if own["name"] != "full":
        how = model.preprocessing
        model, fields = load_with_fields(read_from, reducer="full", dtype=dtype, fresh_told_at=None, preprocessing=how)
    return Weights(source, read_from, model, fields, own, dtype, identity)
