"""tif_jax: Vision Transformers made cheaper by finding out which image tokens matter."""

import importlib
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tif_jax.adaptive.adaptive import Adaptive as Adaptive
    from tif_jax.data.preprocess import preprocess as preprocess
    from tif_jax.errors import InputError as InputError
    from tif_jax.errors import WorkError as WorkError
    from tif_jax.figures.view import view as view
    from tif_jax.impact.shards import read_impact as read_impact
    from tif_jax.impact.token_impact import token_impact as token_impact
    from tif_jax.models import create_model as create_model
    from tif_jax.models.cost import cost as cost
    from tif_jax.models.grids import grid_features as grid_features
    from tif_jax.models.predictions import predict_images as predict_images
    from tif_jax.models.predictions import predict_maps as predict_maps
    from tif_jax.runtime.version import __version__ as __version__
    from tif_jax.sharing.share import push_to_hub as push_to_hub
    from tif_jax.sharing.share import save_impact as save_impact
    from tif_jax.sharing.share import save_pretrained as save_pretrained
    from tif_jax.training.fitting import fit as fit
    from tif_jax.weights.ladder import load_ladder as load_ladder
    from tif_jax.weights.loading import from_pretrained as from_pretrained
    from tif_jax.weights.loading import load as load

# Where each name is. It is imported when it is first used, so that the program can heed signals before JAX is there.
_WHERE = {
    "__version__": "runtime.version",
    "Adaptive": "adaptive.adaptive",
    "InputError": "errors",
    "WorkError": "errors",
    "cost": "models.cost",
    "create_model": "models",
    "fit": "training.fitting",
    "from_pretrained": "weights.loading",
    "grid_features": "models.grids",
    "load": "weights.loading",
    "load_ladder": "weights.ladder",
    "predict_images": "models.predictions",
    "predict_maps": "models.predictions",
    "preprocess": "data.preprocess",
    "push_to_hub": "sharing.share",
    "read_impact": "impact.shards",
    "save_impact": "sharing.share",
    "save_pretrained": "sharing.share",
    "token_impact": "impact.token_impact",
    "view": "figures.view",
}

__all__ = [name for name in _WHERE if name != "__version__"]


def __getattr__(name: str):
    if name not in _WHERE:
        with suppress(ModuleNotFoundError):
            return importlib.import_module(f"{__name__}.{name}")  # tif_jax.models, without importing it first
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
