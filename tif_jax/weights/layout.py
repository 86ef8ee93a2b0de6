"""What timm's layouts of all families have in common: tensors by its names become parameters by our paths, and back."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from tif_jax.errors import InputError

Tensors = Mapping[str, np.ndarray]


class Transform(NamedTuple):
    """How a tensor becomes a parameter, and back. What `read` can not read, it leaves as it is, for `translate` to name."""

    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]


class Rule(NamedTuple):
    """Where the tensor of a name goes."""

    path: str  # of our parameter, its keys joined by /
    transform: Transform


Rules = dict[str, Rule]  # by the tensor's name
SAME = Transform(lambda tensor: tensor, lambda parameter: parameter)


def modules(paths: Mapping[str, str], leaves: Mapping[str, Rule]) -> Rules:
    """The rules of modules that all have these leaves. paths: a module's name -> its path."""
    return {
        f"{name}.{leaf}": Rule(f"{path}/{rule.path}", rule.transform)
        for name, path in paths.items()
        for leaf, rule in leaves.items()
    }


def translate(
    tensors: Tensors, rules: Rules, wanted: Mapping[str, Any], ignored: Collection[str] = ()
) -> dict[str, Any]:
    """The tensors as a nested dict of parameters. wanted: path -> what has its shape; ignored: names that have no place.

    Raises InputError with all missing, surplus and misshapen tensors in one line.
    """
    found: dict[str, np.ndarray] = {}
    surplus, wrong = [], []
    for name, tensor in tensors.items():
        path, transform = rules.get(name, ("", SAME))
        if path in wanted and path not in found:
            found[path] = transform.read(tensor)
            if tensor.dtype.kind != "f":
                wrong.append(f"{name} has dtype {tensor.dtype}, not a float")
            elif found[path].shape != wanted[path].shape:
                wrong.append(
                    f"{name} has shape {tensor.shape}, which gives {found[path].shape}, not {wanted[path].shape}"
                )
        elif name not in ignored:
            surplus.append(name)
    missing = {path: name for name, (path, _) in reversed(rules.items()) if path in wanted and path not in found}
    complaints = {"missing": sorted(missing.values()), "surplus": sorted(surplus), "wrong": wrong}
    if any(complaints.values()):
        raise InputError(
            "the weights do not fit the model: "
            + "; ".join(f"{kind}: {shortened(names)}" for kind, names in complaints.items() if names)
        )
    return traverse_util.unflatten_dict(found, sep="/")


def translate_back(params: Mapping[str, Any], rules: Rules) -> dict[str, np.ndarray]:
    """The parameters as float32 tensors by name. Raises InputError with all parameters that no rule leads to."""
    flat = traverse_util.flatten_dict(dict(params), sep="/")
    if other := sorted(set(flat) - {path for path, _ in rules.values()}):
        raise InputError(f"timm's layout has no place for {shortened(other)}")
    found = {
        name: rule.transform.write(np.asarray(flat[rule.path])) for name, rule in rules.items() if rule.path in flat
    }
    return {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in found.items()}


def shortened(names: Sequence[str], limit: int = 8) -> str:
    """The names separated by commas, those beyond the limit only counted."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
