"""Reading an experiment: `--config FILE[:ARG] [--config.KEY=VALUE ...]`.

A config file has one function get_config(arg) that returns an ml_collections.ConfigDict of plain data. With
`--config.quick=true` the values of its `when_quick` apply, except where the command line says otherwise.
"""

import difflib
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from tif_jax.errors import InputError
from tif_jax.training import recipe


def load(filename: str, overrides: list[str]) -> ConfigDict:
    """The config in FILE[:ARG] with recipe.py's defaults and `--config.KEY=VALUE` overrides, locked.

    Raises InputError for anything amiss.
    """
    config = _get_config(filename)
    recipe.fill_in(config)
    _check_keys(overrides, config)
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=overrides)
        _, *stray = values(["tif", *overrides])
    except (flags.Error, ValueError, TypeError) as error:
        raise InputError(_one_line(error)) from None
    if stray:
        raise InputError(f"unexpected {stray[0]!r}; a value of the config is given as --config.KEY=VALUE")
    given = config_flags.get_override_values(values["config"])
    config = values.config
    if config.get("quick"):
        for key, value in _leaves(config.when_quick):
            if key not in given:
                _update(config, key, value)
    recipe.check(config)
    return config.lock()


def to_json(config: ConfigDict) -> dict[str, Any]:
    """The config as plain JSON data: what checkpoints and reports carry."""
    return json.loads(config.to_json_best_effort())


def _get_config(filename: str) -> ConfigDict:
    path, _, arg = filename.partition(":")
    if not Path(path).is_file():
        raise InputError(f"no config file {path}")
    spec = importlib.util.spec_from_file_location("config", path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(arg) if arg else module.get_config()
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{filename}: {_one_line(error)}") from None
    if not isinstance(config, ConfigDict):
        raise InputError(f"{filename}: get_config returns a {type(config).__name__}; it must be a ConfigDict")
    return config


def _update(config: ConfigDict, key: str, value: Any) -> None:
    try:
        config.update_from_flattened_dict({key: value})
    except (KeyError, TypeError) as error:
        raise InputError(f"when_quick.{key} does not fit the config: {_one_line(error)}") from None


def _check_keys(overrides: list[str], config: ConfigDict) -> None:
    known = [key for key, _ in _leaves(config)]
    for argument in overrides:
        if not argument.startswith("-"):  # the value of `--config.KEY VALUE`
            continue
        key = re.sub(r"^--?(no)?config\.", "", argument.split("=", 1)[0])
        if key not in known and not isinstance(_get(config, key), ConfigDict):
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            raise InputError(f"config has no key {key!r}; the nearest is {nearest[0]!r}")


def _get(config: ConfigDict, key: str) -> Any:
    node: Any = config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, ConfigDict) else None
    return node


def _leaves(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, ConfigDict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
