"""Reducers: how tokens travel through the blocks. One method, one file; this folder is the registry.

A method of one's own may also lie in any module that can be imported: 'my_reducers.key_norm' is its class KeyNorm.

A reducer is an nnx.Module (if it has parameters) or a frozen dataclass, called as

    reducer(blocks, x, tokens, rngs) -> (x, aux)

Blocks have to be told what the rows of x are: block(x, tokens, ...) and block.attend(x, tokens, ...) -> (x, QueryKey).
A reducer that takes patch tokens away, moves or joins them changes `tokens` with them (`tokens.keep`, `keep_rows`, `at_rows`,
`merged`, `set_aside`): rotary positions turn queries and keys by where in the raster each token lies, and a dense head asks
what every patch is, in any block (`models/grids.py`). A block refuses tokens of another number.

The last of the blocks may leave patch tokens as they are, where the model's heads read special tokens alone
(`models/special_alone.py`): a reducer that reads patches behind it, or runs it before others, asks its users for
lean_last_block=False.

A pyramid's shrink blocks (`models/levit_blocks.py`) have `stride` 2 and need the complete raster. A reducer that leads
tokens through them says so by an attribute `walks_pyramids = True`; the others are refused by such models.

`aux` is the whole side channel. Reserved names:
  kept           int32 (B, K), raster positions of the patches that stay tokens of their own, ascending
  source         int32 (B, P), for each patch of the raster the row among the patch tokens that come out in which it lives,
                 or -1: `tokens.source` as it is in the end
  mask           float (B, S), 1 for the patch tokens that come out and are still there, 0 for those masked out (training
                 forms that gather nothing)
  size           float (B, S), how many patches each patch token that comes out stands for in attention pooling
  filter_logits  (B, N), raster order: how much each patch is worth keeping
  loss/...       per-example terms that the training step adds
  logits/...     predictions of single heads, where the model has several: the classification loss scores each
  blocks/I       (B, rows, columns, D), every patch after block I: the model adds those that its dense head reads
  tokens         (B, S, D), the patch tokens that come out, after the last norm: the step adds them for distillation
"""

import importlib
import inspect
import json
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float

from tif_jax import checked
from tif_jax.errors import InputError
from tif_jax.reducers.full import Full as Full
from tif_jax.tokens import Tokens

Aux = dict[str, Array]
# Given to a reducer by the model it joins, where its constructor asks for them. build: `build` for the same model.
_OF_MODEL = ("width", "num_patches", "num_heads", "depth", "rngs", "build")


@runtime_checkable
class Reducer(Protocol):
    def __call__(
        self, blocks: Sequence[Any], x: Float[Array, "B T D"], tokens: Tokens, rngs: Any = None
    ) -> tuple[Float[Array, "B S D"], Aux]: ...


def known() -> list[str]:
    """Names that `build` takes: the files of this folder, less those that begin with an underscore."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name for name in names if not name.startswith("_"))


def options(name: str) -> dict[str, inspect.Parameter]:
    """The options a user may give to a reducer, with their types and defaults."""
    return {k: p for k, p in _parameters(name).items() if k not in _OF_MODEL}


def build(
    name: str,
    *,
    width: int,
    num_patches: int,
    num_heads: int | None = None,
    depth: int | None = None,
    rngs: Any,
    **given: Any,
) -> Reducer:
    """The reducer in file `name`, for a model of that width, number of patch tokens, heads and blocks.

    None: not known, where only the options are checked. Raises InputError on misuse.
    """
    allowed = options(name)
    if unknown := sorted(set(given) - set(allowed)):
        raise InputError(f"Reducer {name!r} takes {', '.join(allowed) or 'no options'}; got {', '.join(unknown)}")
    required = {k for k, p in allowed.items() if p.default is p.empty}
    if missing := sorted(required - set(given)):
        raise InputError(f"Reducer {name!r} needs {', '.join(missing)}")
    given = {k: _typed(allowed[k].annotation, v, k) for k, v in given.items()}
    if (then := given.get("then")) is not None:
        if not isinstance(then, Mapping) or "name" not in then:
            said = dict(then) if isinstance(then, Mapping) else then
            raise InputError(
                f"then is {said!r}; it is a dict that names a reducer, as in dict(name='tome', num_merged=8)"
            )
        given["then"] = dict(then)
    of_model = {"width": width, "num_patches": num_patches, "num_heads": num_heads, "depth": depth, "rngs": rngs}
    of_model["build"] = partial(build, **of_model)
    try:
        return _constructor(name)(**given, **{k: v for k, v in of_model.items() if k in _parameters(name)})
    except TypeError as error:
        raise InputError(f"Reducer {name!r} can not take {given}: {error}") from error


def is_file(name: Any) -> bool:
    """Whether it is no name of a reducer, but of a JSON file that describes one (`described_in`)."""
    return isinstance(name, str) and name.endswith(".json")


def described_in(path: str) -> dict[str, Any]:
    """The reducer that a JSON file describes, as `tif calibrate` writes it: name and options. InputError for no such file."""
    try:
        found = json.loads(Path(path).expanduser().read_bytes())
    except OSError as error:
        raise InputError(f"the reducer's file {path} can not be read ({error.strerror})") from None
    except ValueError:
        found = None
    found = found.get("reducer") if isinstance(found, dict) else None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        raise InputError(
            f"{path} describes no reducer; `tif calibrate` writes such files: {{'reducer': {{'name': ...}}}}"
        )
    return found


def modules_in(description: Any) -> Iterator[str]:
    """The modules outside of this folder that a reducer's description, or one within it, names: to build it runs them."""
    if isinstance(description, Mapping):
        if isinstance(name := description.get("name"), str) and "." in name:
            yield name
        for value in description.values():
            yield from modules_in(value)
    elif isinstance(description, list | tuple):
        for value in description:
            yield from modules_in(value)


def _typed(kind: Any, value: Any, where: str) -> Any:
    """The value as the annotation has it, tuples for the lists of a stored config. What is no plain kind is left alone."""
    if kind is inspect.Parameter.empty or not checked.is_plain(kind):
        return tuple(value) if isinstance(value, list) else value
    return checked.value_of(kind, value, where)


def _parameters(name: str) -> dict[str, inspect.Parameter]:
    signature = inspect.signature(_constructor(name).__init__, eval_str=True)
    return {k: p for k, p in signature.parameters.items() if k != "self"}


def _constructor(name: str) -> Any:
    if not all(part.isidentifier() for part in name.split(".")):
        raise InputError(f"{checked.shown(name)} is no name of a reducer, nor of a module: 'package.module'")
    path = name if "." in name else f"{__name__}.{name}"
    class_name = "".join(word.capitalize() for word in path.rpartition(".")[2].split("_"))
    try:
        if "." in name or name in known():
            return getattr(importlib.import_module(path), class_name)
    except (ImportError, AttributeError) as error:
        missing = getattr(error, "name", None)
        if "." not in name or not (missing == class_name or f"{path}.".startswith(f"{missing}.")):
            raise  # a mistake inside the file
        raise InputError(f"No class {class_name} in a module {path} that can be imported from here") from error
    raise InputError(
        f"Unknown reducer {checked.shown(name)}. Known: {', '.join(known())}, or a module of your own, 'package.module'"
    )
