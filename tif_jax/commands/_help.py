"""What `tif --help` says: of the program, its commands, the keys of a config and the reducers."""

import difflib
import importlib
import sys

from tif_jax import checked, reducers
from tif_jax.experiment.schema import Experiment


def help_on(topic: str, commands: list[str]) -> int:
    """Prints what there is to say on 'config' or 'reducers'; returns the exit status."""
    if topic in _TOPICS:
        print(_TOPICS[topic]())
        return 0
    nearest = difflib.get_close_matches(topic, [*_TOPICS, *commands], n=1, cutoff=0.0)
    print(f"tif: no help on {topic!r}; did you mean `tif --help {nearest[0]}`?", file=sys.stderr)
    return 2


def usage(commands: list[str]) -> str:
    lines = [f"  {name:<10} {_summary(name)}" for name in commands]
    head = "usage: tif COMMAND --config FILE[:ARG] [--config.KEY=VALUE ...] --workdir DIR"
    topics = "`tif --help config` lists the keys of a config, `tif --help reducers` the reducers and their options"
    return "\n".join([head, "", *lines, "", topics])


def _describe_reducers() -> str:
    """Each reducer: what its file says of it in one line, and its options with their defaults."""
    described = []
    for name in reducers.known():
        module = importlib.import_module(f"tif_jax.reducers.{name}")
        options = [f"  {key} = {option.default!r}" for key, option in reducers.options(name).items()]
        described.append("\n".join([f"{name}: {(module.__doc__ or '').splitlines()[0]}", *options]))
    return "\n\n".join(described)


def _describe_config() -> str:
    """Each key of a config with its default, what it may be and what it is for."""
    lines = []
    for key in checked.keys(Experiment):
        default = getattr(key.default, "described", key.default)
        lines += [f"{key.path} = {default!r}", f"    {key.help} ({key.allowed})"]
    return "\n".join(lines)


_TOPICS = {"config": _describe_config, "reducers": _describe_reducers}


def _summary(name: str) -> str:
    return (importlib.import_module(f"tif_jax.commands.{name}").__doc__ or "").splitlines()[0]
