"""Reducers: how tokens travel through the blocks. One method, one file; this folder is the registry.

A reducer is an nnx.Module (if it has parameters) or a frozen dataclass, called as

    reducer(blocks, x, tokens, rngs) -> (x, aux)

`aux` is the whole side channel. Reserved names:
  kept           int32 (B, K), raster positions of the patches that stay tokens of their own, ascending
  source         int32 (B, N), for each patch the row among the patch tokens that come out in which it lives, or -1
  filter_logits  (B, N), raster order: how much each patch is worth keeping
  loss/...       per-example terms that the training step adds
  logits/...     further predictions that the classification loss scores with the labels
"""

import importlib
import inspect
import pkgutil
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float

from tif_jax.errors import InputError
from tif_jax.reducers.full import Full as Full
from tif_jax.tokens import Tokens

Aux = dict[str, Array]
# Given to a reducer by the model it joins, where its constructor asks for them.
_SHAPE = ("width", "num_heads", "depth", "num_patches", "rngs")


@runtime_checkable
class Reducer(Protocol):
    def __call__(
        self, blocks: Sequence[Any], x: Float[Array, "B T D"], tokens: Tokens, rngs: Any = None
    ) -> tuple[Float[Array, "B S D"], Aux]: ...


def known() -> list[str]:
    """Names that `build` takes: the files of this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def options(name: str) -> dict[str, inspect.Parameter]:
    """The options a user may give to a reducer, with their defaults."""
    if name not in known():
        raise InputError(f"Unknown reducer {name!r}. Known: {', '.join(known())}")
    return {k: p for k, p in _parameters(name).items() if k not in _SHAPE}


def build(name: str, *, width: int, num_heads: int, depth: int, num_patches: int, rngs: Any, **given: Any) -> Reducer:
    """The reducer in file `name`, for a model of that shape and number of patch tokens. Raises InputError on misuse."""
    allowed = options(name)
    if unknown := sorted(set(given) - set(allowed)):
        raise InputError(f"Reducer {name!r} takes {', '.join(allowed) or 'no options'}; got {', '.join(unknown)}")
    required = {k for k, p in allowed.items() if p.default is p.empty}
    if missing := sorted(required - set(given)):
        raise InputError(f"Reducer {name!r} needs {', '.join(missing)}")
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}  # as a stored config has them
    shape = dict(width=width, num_heads=num_heads, depth=depth, num_patches=num_patches, rngs=rngs)
    return _constructor(name)(**given, **{k: v for k, v in shape.items() if k in _parameters(name)})


def _parameters(name: str) -> dict[str, inspect.Parameter]:
    signature = inspect.signature(_constructor(name).__init__)
    return {k: p for k, p in signature.parameters.items() if k != "self"}


def _constructor(name: str) -> Any:
    module = importlib.import_module(f"{__name__}.{name}")
    return getattr(module, "".join(word.capitalize() for word in name.split("_")))
