"""Reading an experiment: `--config NAME|FILE[:ARG] [--config.KEY=VALUE ...]`.

NAME is one of the configs that come with the program (`packaged`). A config file has one function get_config(arg) that
returns an ml_collections.ConfigDict of plain data. It says what differs from the defaults in `schema`. With
`--config.quick=true` the values of its `when_quick` apply, too. The command line has the last word.
"""

import dataclasses
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from tif_jax import checked, reducers
from tif_jax.errors import InputError
from tif_jax.experiment import checks, packaged
from tif_jax.experiment.preprocessing import resolved
from tif_jax.experiment.reducer_entry import ReducerEntry, option_kinds, read_entry
from tif_jax.experiment.schema import Experiment
from tif_jax.experiment.unread import changed, unread, warn
from tif_jax.models import FAMILIES, check_fields, field_kinds
from tif_jax.models.budget import AMOUNTS, SOLVED

Settings = dict[str, Any]


def load(filename: str, overrides: list[str] | tuple[str, ...] = ()) -> Experiment:
    """The experiment of NAME|FILE[:ARG] and `--config.KEY=VALUE` overrides. Raises InputError for anything amiss."""
    return from_settings(_file_settings(filename), overrides)


def from_settings(settings: Mapping[str, Any], overrides: list[str] | tuple[str, ...] = ()) -> Experiment:
    """`load`, of what a file's get_config returns."""
    merged = checked.plain(settings)
    given = list(_overrides(overrides))
    quick = merged.get("quick", False)
    for path, text in given:
        quick = checked.from_text(bool, text, path) if path == "quick" else quick
    _read(merged)  # the file is right by itself
    if changes := merged.get("when_quick"):
        quickly = _merged(merged, changes)
        with checked.named("when_quick"):
            _read(quickly)
        merged = quickly if quick else merged
    elif quick:
        raise InputError("quick is true, but this config has no when_quick, which says what the short version is")
    found = unread(_read(merged), changed(merged))
    _override(merged, given)
    experiment = _read(merged)
    checks.check(experiment)
    warn(found | unread(experiment, (path for path, _ in given)))
    # Said once, for all reducers and all stages of the run.
    labels = dataclasses.replace(experiment.filter, keep_ratio=checks.label_ratio(experiment))
    return resolved(dataclasses.replace(experiment, filter=labels))


def to_json(experiment: Experiment) -> Settings:
    """The experiment as plain JSON data: what checkpoints and reports carry."""
    settings = checked.to_json(experiment)
    settings["reducer"] = checked.to_json(experiment.reducer.described)
    settings["benchmark"]["reducers"] = [checked.to_json(entry.described) for entry in experiment.benchmark.reducers]
    return settings


def _read(settings: Settings) -> Experiment:
    """The experiment with these settings, each of them checked."""
    settings = dict(settings)
    reducer = settings["reducer"] = read_entry(settings.get("reducer", "full"), "reducer")
    benchmark = settings.get("benchmark", {})
    if isinstance(benchmark, dict):
        entries = benchmark.get("reducers", (reducer,))
        if not isinstance(entries, tuple):
            raise InputError(f"benchmark.reducers is {checked.shown(entries)}; it is a tuple of names and dicts")
        read = tuple(_benchmark_entry(entry, i, reducer) for i, entry in enumerate(entries))
        settings["benchmark"] = {**benchmark, "reducers": read}
    for where in ("backbone", "finetune"):
        if isinstance(of_stage := settings.get(where), dict) and of_stage.get("model") is not None:
            settings[where] = {**of_stage, "model": _model_fields(of_stage["model"], f"{where}.model", settings)}
    return checked.read(Experiment, settings)


def _benchmark_entry(entry: Any, number: int, reducer: ReducerEntry) -> ReducerEntry:
    """An entry of benchmark.reducers. The config's own reducer hands on its options, to other reducers only the amount."""
    if isinstance(entry, ReducerEntry):
        return entry
    where = f"benchmark.reducers[{number}]"
    name = entry.get("name") if isinstance(entry, Mapping) else entry
    handed_on = reducer.arguments
    if name != reducer.name:
        handed_on = {key: value for key, value in handed_on.items() if key in AMOUNTS}
    return read_entry(entry, where, handed_on)


def _model_fields(fields: Any, where: str, settings: Settings) -> Settings:
    """Fields of a model, of the right type and in range."""
    if not isinstance(fields, dict):
        raise InputError(f"{where} is {checked.shown(fields)}; it is a dict of fields of a model")
    return check_fields(fields, _family(settings), where)


def _family(settings: Settings) -> str:
    model = (settings.get("backbone") or {}).get("model") or {}
    family = model.get("family", "vit")
    if family not in FAMILIES:
        raise InputError(f"backbone.model.family is {checked.shown(family)}; allowed: {', '.join(map(repr, FAMILIES))}")
    return family


# The command line


def _overrides(arguments: list[str] | tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(key, text) for `--config.KEY=VALUE`, `--config.KEY VALUE` and `--noconfig.KEY`."""
    waiting = iter(arguments)
    for argument in waiting:
        match = re.fullmatch(r"--?(no)?config\.([^=]+)(?:=(.*))?", argument, re.DOTALL)
        if not match:
            raise InputError(
                f"unexpected {checked.shown(argument)}; a value of the config is given as --config.KEY=VALUE"
            )
        no, path, text = match.groups()
        if no:
            text = "false"
        elif text is None:
            text = next(waiting, None)
            if text is None or text.startswith("-"):
                raise InputError(
                    f"--config.{path[:200]} has no value; a value of the config is given as --config.KEY=VALUE"
                )
        yield path, text


def _override(settings: Settings, given: list[tuple[str, str]]) -> None:
    """Puts what the command line says into the settings."""
    of_reducer = [path for path, _ in given if path.startswith("reducer.")]
    names = [text for path, text in given if path == "reducer.name"]
    if of_reducer:
        settings["reducer"] = _made_room(settings.get("reducer", "full"), of_reducer, names[-1] if names else None)
    for path, text in given:
        _put(settings, path, checked.from_text(_kind_at(path, settings), text, path))


def _made_room(reducer: Any, given: list[str], name: str | None) -> Settings:
    """The file's reducer without what the command line replaces.

    An amount stands instead of the file's. A reducer of another name takes over the file's amount, and no more; one that a
    JSON file describes has its own.
    """
    reducer = {"name": reducer} if isinstance(reducer, str) else dict(reducer)
    if reducers.is_file(name):
        reducer = {"name": name}
    elif name is not None and name != reducer.get("name"):
        kinds = option_kinds(name, "reducer.name")
        known = {*kinds, "budget"} if any(key in kinds for key in SOLVED) else set(kinds)
        amounts = {key: value for key, value in reducer.items() if key in AMOUNTS and key in known}
        reducer = {"name": name, **amounts}
    if not {path.removeprefix("reducer.") for path in given}.isdisjoint(AMOUNTS):
        reducer = {key: value for key, value in reducer.items() if key not in AMOUNTS}
    if "reducer.then.name" in given:
        reducer.pop("then", None)
    return reducer


def _put(settings: Settings, path: str, value: Any) -> None:
    *sections, name = path.split(".")
    for part in sections:
        inner = settings.get(part)
        settings[part] = dict(inner) if isinstance(inner, Mapping) else {}
        settings = settings[part]
    settings[name] = value


def _kind_at(path: str, settings: Settings) -> Any:
    """The annotation of a key. Raises InputError, with the nearest one, for a key that nothing reads."""
    known = _known_keys(settings)
    if path in known:
        return known[path]
    if inside := [name for name in known if name.startswith(f"{path}.")]:
        raise InputError(
            f"{path} is a section of the config: set its keys one by one, as in --config.{inside[0]}=VALUE"
        )
    raise checked.unknown_key(path, list(known))


def _known_keys(settings: Settings) -> dict[str, Any]:
    """Every key that the command line may set, with its annotation."""
    known = {entry.path: entry.kind for entry in checked.keys(Experiment)}
    known |= {"benchmark.reducers": tuple[str | dict, ...], "reducer": str | dict, "reducer.name": str}
    for prefix in ("backbone.model", "finetune.model"):
        known |= {f"{prefix}.{name}": kind for name, kind in field_kinds(_family(settings)).items()}
    known["backbone.model.family"] = str
    for name in (settings.get("data") or {}).get("class_index") or {}:
        known[f"data.class_index.{name}"] = int
    entry, prefix = settings.get("reducer"), "reducer"
    while isinstance(entry, Mapping):
        known |= {f"{prefix}.name": str, f"{prefix}.budget": float | str}
        if isinstance(entry.get("name"), str):
            kinds = option_kinds(entry["name"], prefix)
            known |= {f"{prefix}.{name}": kind for name, kind in kinds.items()}
            known |= {f"{prefix}.then.name": str} if "then" in kinds else {}
        entry, prefix = entry.get("then"), f"{prefix}.then"
    return known


def _merged(settings: Mapping[str, Any], changes: Any) -> Settings:
    """The settings with these changes, which may be nested."""
    if not isinstance(changes, Mapping):
        raise InputError(f"when_quick is {checked.shown(changes)}; it is a dict of what --config.quick=true changes")
    merged = dict(settings)
    for name, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _merged(merged[name], value) if nested else value
    return merged


# The file


def _file_settings(filename: str) -> Settings:
    given, _, arg = filename.partition(":")
    path = packaged.path_of(given)
    spec = importlib.util.spec_from_file_location("config", path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    folders = [str(path.parent.absolute()), str(packaged.FOLDER)]
    sys.path[:0] = folders  # configs of one folder may share a file, and a copy of ours shares ours
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise InputError(f"{path} has no function get_config")
        if arg and not inspect.signature(module.get_config).parameters:
            raise InputError(f"{filename}: this file takes no argument after a colon")
        config = module.get_config(arg) if arg else module.get_config()
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{filename}: {type(error).__name__}: {' '.join(str(error).split())}") from None
    finally:
        for folder in folders:
            sys.path.remove(folder)
    if not isinstance(config, ConfigDict):
        raise InputError(f"{filename}: get_config returns a {type(config).__name__}; it must be a ConfigDict")
    return checked.plain(config.to_dict())
