"""What `tif help` says on the keys of a config and on the reducers."""

import difflib
import importlib
import itertools
from collections.abc import Iterator

from tif_jax import checked, reducers
from tif_jax.commands._usage import wrapped
from tif_jax.errors import InputError
from tif_jax.experiment import packaged
from tif_jax.experiment.schema import Experiment

_CONFIG = """\
A config is a name of this list or a Python file; some take an argument after a colon (imagenette:plain). It
says what differs from the defaults below; --config.KEY=VALUE has the last word, as in
--config.finetune.num_epochs=2."""
_DATA = """\
imagenette, tiny_imagenet and depth find images and weights in $TIF_DATA (if that is not set: in
../shared/data, seen from the current folder). depth:tfds and the ImageNet configs find data in
$TFDS_DATA_DIR, the latter their weights in $TIF_WEIGHTS (if that is not set: in the current folder)."""


def help_on(topic: str, rest: list[str], commands: list[str]) -> str:
    """What there is to say on 'config', a section of it, or 'reducers'. Raises InputError for another topic."""
    if topic == "reducers":
        return _describe_reducers()
    if topic == "config":
        return _describe_section(rest[0]) if rest else _describe_config()
    nearest = difflib.get_close_matches(topic, ["config", "reducers", *commands], n=1, cutoff=0.0)
    raise InputError(f"no help on {topic!r}; did you mean `tif help {nearest[0]}`?")


def _describe_reducers() -> str:
    """Each reducer: what its file says of it in one line, and its options with their defaults."""
    described = []
    for name in reducers.known():
        module = importlib.import_module(f"tif_jax.reducers.{name}")
        summary = " ".join((module.__doc__ or "").partition("\n\n")[0].split())
        options = [f"    {key} = {option.default!r}" for key, option in reducers.options(name).items()]
        described.append("\n".join([wrapped(f"{name}: {summary}", "  "), *options]))
    return "\n\n".join(described)


def _describe_config() -> str:
    """The configs that come with the program, then each key with its default, what it may be and what it is for."""
    names = packaged.names()
    width = max(map(len, names))
    listed = [wrapped(f"  {name:<{width}}  {packaged.summary(name)}", " " * (width + 4)) for name in names]
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
    yield wrapped(f"    {key.help} ({key.allowed})", "    ")


def _sections() -> dict[str, list[checked.Key]]:
    """Keys by the first part of their path; 'general' has those outside of sections."""
    sections: dict[str, list[checked.Key]] = {"general": []}
    for key in checked.keys(Experiment):
        section, dot, _ = key.path.partition(".")
        sections.setdefault(section if dot else "general", []).append(key)
    return sections
