"""What `tif --help` says: of the program, its commands, the keys of a config and the reducers."""

import difflib
import importlib
import itertools
import textwrap
from collections.abc import Iterator

from tif_jax import checked, reducers
from tif_jax.errors import InputError
from tif_jax.experiment import packaged
from tif_jax.experiment.schema import Experiment

WIDTH = 110
_USAGE = """\
usage: tif COMMAND --config NAME|FILE[:ARG] [--config.KEY=VALUE ...] --workdir DIR
"""
_EXAMPLES = """\
examples:
  tif run --config digits --workdir runs/quick --config.quick=true    the whole pipeline in minutes; no download
  tif run --config digits --workdir runs/half --config.reducer.keep_ratio=0.5
  tif run --config imagenette:plain --workdir runs/plain              your data folder is $TIF_DATA
  tif evaluate --config digits --workdir runs/half --config.reducer.keep_ratio=0.5
  tif convert deit_tiny.pth deit_tiny.safetensors                     weights, without PyTorch
  tif status runs/half                                                how far it is, and how long still
  tif report runs/quick runs/half --output comparison                 runs side by side
  tif predict --workdir runs/half photos --top 3                      classes of your pictures
  tif compare --weights deit_tiny.safetensors --images photos --out compared    reducers side by side
  tif calibrate --weights deit_tiny.safetensors --images photos --budget 0.6 --out s.json    a schedule for your pictures
  tif view --weights deit_tiny.safetensors cat.jpg                    what the model sees: impact, tokens, classes
  tif share --workdir runs/half --to shared                           the model with its card, for others
  tif export --workdir runs/half --to onnx                            a file that runs without this program

`tif help COMMAND` lists the flags of a command, `tif help config` the configs and their keys, `tif help
config data` those of one section, `tif help reducers` the reducers and their options. `tif --version` tells the
version."""
_CONFIG = """\
A config is a name of this list or a Python file; some take an argument after a colon (imagenette:plain). It
says what differs from the defaults below; --config.KEY=VALUE has the last word, as in
--config.finetune.num_epochs=2."""
_DATA = """\
imagenette finds its images and weights in $TIF_DATA (if that is not set: in ../shared/data, seen from the
current folder), the ImageNet configs theirs in $TFDS_DATA_DIR and $TIF_WEIGHTS."""


def help_on(topic: str, rest: list[str], commands: list[str]) -> str:
    """What there is to say on 'config', a section of it, or 'reducers'. Raises InputError for another topic."""
    if topic == "reducers":
        return _describe_reducers()
    if topic == "config":
        return _describe_section(rest[0]) if rest else _describe_config()
    nearest = difflib.get_close_matches(topic, ["config", "reducers", *commands], n=1, cutoff=0.0)
    raise InputError(f"no help on {topic!r}; did you mean `tif help {nearest[0]}`?")


def usage(commands: list[str]) -> str:
    return "\n".join(
        [_USAGE, *(_wrapped(f"  {name:<10} {_summary(name)}", " " * 13) for name in commands), "", _EXAMPLES]
    )


def _describe_reducers() -> str:
    """Each reducer: what its file says of it in one line, and its options with their defaults."""
    described = []
    for name in reducers.known():
        module = importlib.import_module(f"tif_jax.reducers.{name}")
        summary = " ".join((module.__doc__ or "").partition("\n\n")[0].split())
        options = [f"    {key} = {option.default!r}" for key, option in reducers.options(name).items()]
        described.append("\n".join([_wrapped(f"{name}: {summary}", "  "), *options]))
    return "\n\n".join(described)


def _describe_config() -> str:
    """The configs that come with the program, then each key with its default, what it may be and what it is for."""
    names = packaged.names()
    width = max(map(len, names))
    listed = [_wrapped(f"  {name:<{width}}  {packaged.summary(name)}", " " * (width + 4)) for name in names]
    where = f"They lie in {packaged.FOLDER}: copy one to change it."
    return "\n\n".join([_CONFIG, "\n".join(listed), f"{where}\n{_DATA}", *map(_describe_section, _sections())])


def _describe_section(name: str) -> str:
    sections = _sections()
    if name not in sections:
        nearest = difflib.get_close_matches(name, list(sections), n=1, cutoff=0.0)
        raise InputError(f"a config has no section {name!r}; did you mean `tif help config {nearest[0]}`?")
    return "\n".join([f"{name}", "-" * len(name), *itertools.chain(*map(_describe_key, sections[name]))])


def _describe_key(key: checked.Key) -> Iterator[str]:
    yield f"{key.path} = {getattr(key.default, 'described', key.default)!r}"
    yield _wrapped(f"    {key.help} ({key.allowed})", "    ")


def _sections() -> dict[str, list[checked.Key]]:
    """Keys by the first part of their path; 'general' has those outside of sections."""
    sections: dict[str, list[checked.Key]] = {"general": []}
    for key in checked.keys(Experiment):
        section, dot, _ = key.path.partition(".")
        sections.setdefault(section if dot else "general", []).append(key)
    return sections


def _wrapped(text: str, indent: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _summary(name: str) -> str:
    return (importlib.import_module(f"tif_jax.commands.{name}").__doc__ or "").splitlines()[0]
