"""Frozen dataclasses that check what they are made of: every key has a type, a default, a range and one line of help.

    @dataclass(frozen=True)
    class Filter:
        labels: str = key("top", "which tokens are worth keeping", choices=("top", "above", "quantile"))
        num_epochs: float = key(6.0, "epochs", least=0)

    read(Filter, {"labels": "above"}, "filter")  # a Filter, or an InputError that names key, value and what is allowed

The same definition parses the command line (`from_text`) and makes the tables of the documents (`keys`).
"""

import ast
import dataclasses
import difflib
import math
import numbers
import re
import types
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

from ml_collections import ConfigDict

from tif_jax.errors import InputError

Section = TypeVar("Section")

_TRUE, _FALSE = ("true", "1", "yes"), ("false", "0", "no")


class Range(NamedTuple):
    """What a value may be; of a tuple, each of its numbers. No float is NaN, and none infinite unless that is said."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    infinite: bool = False
    choices: tuple[Any, ...] = ()
    advice: str = ""  # what to do about a value out of range

    def has(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices
        if isinstance(value, tuple):
            return all(map(self.has, value))
        if isinstance(value, bool) or not isinstance(value, int | float):
            return True
        finite = isinstance(value, int) or math.isfinite(value)  # a whole number may be too long for isfinite
        return (finite or (self.infinite and value == math.inf)) and (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        """As in 'above 0, at most 1'."""
        if self.choices:
            return f"allowed: {', '.join(map(repr, self.choices))}"
        bounds = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        said = [f"{name} {bound:.10g}" for name, bound in bounds.items() if bound is not None]
        return ", ".join(said + ["or inf"] * self.infinite)


_ANY = Range()


class Key(NamedTuple):
    """A key of a section, as the documents show it."""

    path: str  # 'finetune.mixing.cutmix'
    kind: Any  # the annotation
    default: Any
    range: Range
    help: str

    @property
    def allowed(self) -> str:
        """Kind and range in words."""
        return _described(self.kind, self.range).removeprefix("it is ")


def key(default: Any, help: str, **bounds: Any) -> Any:
    """A field with its default, one line of help and the bounds of its `Range`."""
    metadata = {"help": help, "range": Range(**bounds)}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(kind: type) -> Any:
    """A field that is a section of its own, by default with all of its defaults."""
    return dataclasses.field(default_factory=kind)


def read(kind: type[Section], settings: Any, where: str = "") -> Section:
    """The section with these settings (a mapping) and its defaults. where: its name, as in 'finetune.mixing'.

    Raises InputError for a key that is unknown, with the nearest known one, and for a value of another type or out of
    range. A section may check more in `__post_init__`; what it raises is told with the section's name.
    """
    settings = plain(settings)
    if not isinstance(settings, dict):
        raise InputError(f"{where} is {shown(settings)}; it is a dict of {', '.join(kinds_of(kind))}")
    kinds = kinds_of(kind)
    for name in settings:
        if name not in kinds:
            raise unknown_key(dotted(where, name), [dotted(where, known) for known in kinds])
    ranges = {field.name: field.metadata.get("range", _ANY) for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values = {name: value_of(kinds[name], v, dotted(where, name), ranges[name]) for name, v in settings.items()}
    with named(where, kinds):
        return kind(**values)


@contextmanager
def named(where: str, keys: Collection[str] = ()) -> Iterator[None]:
    """Puts a section's name before what an InputError says: 'filter.rho is 2', 'reducer: blocks (1, 2) select tokens'."""
    try:
        yield
    except InputError as error:
        if not where:
            raise
        begins_with_key = str(error).partition(" ")[0] in keys
        raise InputError(f"{where}{'.' if begins_with_key else ': '}{error}") from None


def check(made: Any) -> None:
    """Raises InputError where a section that was made without `read` has a value of another type or out of range."""
    kinds = kinds_of(type(made))
    for field in dataclasses.fields(made):
        value_of(kinds[field.name], getattr(made, field.name), field.name, field.metadata.get("range", _ANY))


def value_of(kind: Any, value: Any, where: str, allowed: Range = _ANY) -> Any:
    """The value as the annotation `kind` has it. Raises InputError, naming `where`, for another type or out of range."""
    if dataclasses.is_dataclass(kind) and not isinstance(value, kind):  # type: ignore[arg-type]
        return read(kind, value, where)  # type: ignore[arg-type, type-var]
    fitting = [found for each in _alternatives(kind) if (found := _as(each, value)) is not _UNFIT]
    if not fitting:
        example = f", as in ({shown(value)},)" if kind == tuple[str, ...] and isinstance(value, str) else ""
        raise InputError(f"{where} is {shown(value)}; {_described(kind, allowed)}{example}")
    if not allowed.has(fitting[0]):
        unlike = isinstance(value, float) and not math.isfinite(value) and not allowed.infinite
        remedy = f"; {allowed.advice}" if allowed.advice else ""
        raise InputError(f"{where} is {shown(value)}; {_described(kind, allowed)}{', and finite' * unlike}{remedy}")
    return fitting[0]


def from_text(kind: Any, text: str, where: str) -> Any:
    """What a text on the command line says as a value of the annotation `kind`: '160,224' and '(160, 224)' are tuples."""
    alternatives = _alternatives(kind)
    candidates: list[Any] = []
    if bool in alternatives and text.lower() in (*_TRUE, *_FALSE):
        candidates.append(text.lower() in _TRUE)
    if type(None) in alternatives and text.lower() == "none":
        candidates.append(None)
    try:
        candidates.append(ast.literal_eval(text))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        if re.fullmatch("[+-]?(inf|nan)", text.lower()):
            candidates.append(float(text))
    candidates += [text, tuple(part.strip() for part in text.split(",") if part.strip())]
    if str in alternatives and not (
        dict in alternatives and text.startswith("{")
    ):  # '08' is a text where one is wanted
        candidates.insert(0, text)
    for candidate in candidates:
        if any(_as(each, candidate) is not _UNFIT for each in alternatives):
            return candidate
    raise InputError(f"{where} is {shown(text)}; it is {kind_text(kind)}")


def keys(kind: type, where: str = "") -> Iterator[Key]:
    """All keys of a section and of the sections in it, in order."""
    kinds = kinds_of(kind)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        path, of_field = dotted(where, field.name), kinds[field.name]
        if field.default_factory is of_field:
            yield from keys(of_field, path)  # type: ignore[arg-type]
        else:
            factory = field.default_factory
            default = field.default if factory is dataclasses.MISSING else factory()
            yield Key(path, of_field, default, field.metadata.get("range", _ANY), field.metadata["help"])


def kinds_of(kind: Any) -> dict[str, Any]:
    """The annotation of each key of a section."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def unknown_key(path: str, known: Collection[str]) -> InputError:
    """The error for a key that nothing reads; the nearest one is looked for where the path leaves the known ones."""
    parts, depth = path.split("."), 0
    while depth < len(parts) - 1 and any(f"{name}.".startswith(".".join(parts[: depth + 1]) + ".") for name in known):
        depth += 1
    level = {".".join(name.split(".")[: depth + 1]) for name in known}
    nearest = difflib.get_close_matches(".".join(parts[: depth + 1]), sorted(level), n=1, cutoff=0.0)
    hint = f"; the nearest is {nearest[0]!r}" if nearest else ""
    return InputError(f"config has no key {shown(path)}{hint}")


def shown(value: Any, length: int = 200) -> str:
    """The value as an error has it: its repr, of a long one the beginning and the end."""
    try:
        text = repr(value)
    except ValueError:  # Python prints no whole number of more than 4,300 digits
        text = f"a {type(value).__name__} too long to print"
    return text if len(text) <= length else f"{text[: length - 25]} ... {text[-20:]}"


def dotted(where: str, name: str) -> str:
    return f"{where}.{name}" if where else str(name)


def kind_text(kind: Any) -> str:
    """An annotation in words: 'a whole number', 'a number or a tuple of numbers'."""
    return " or ".join(dict.fromkeys(_one_kind_text(each) for each in _alternatives(kind)))


def is_plain(kind: Any) -> bool:
    """Whether `value_of` knows the values of an annotation."""
    kinds = [
        part for each in _alternatives(kind) for part in (typing.get_args(each) or (each,)) if part is not Ellipsis
    ]
    containers = {typing.get_origin(each) for each in _alternatives(kind)} - {None}
    known = {*_PLAIN, Any, dict, Mapping}
    return containers <= {tuple, Sequence, dict, Mapping} and all(
        part in known if not typing.get_args(part) else is_plain(part) for part in kinds
    )


def _described(kind: Any, allowed: Range) -> str:
    return str(allowed) if allowed.choices else f"it is {', '.join(filter(None, [kind_text(kind), str(allowed)]))}"


_UNFIT = object()
_PLAIN = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "none"}


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def _as(kind: Any, value: Any) -> Any:
    """The value as a plain type has it, or _UNFIT. Whole numbers are numbers, too; lists are tuples; a bool is no number."""
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin in (tuple, Sequence):
        if not isinstance(value, tuple | list):
            return _UNFIT
        each = inside if origin is tuple and inside[-1] is not Ellipsis else inside[:1] * len(value)
        if len(each) != len(value):
            return _UNFIT
        parts = [
            next((found for k in _alternatives(kind) if (found := _as(k, part)) is not _UNFIT), _UNFIT)
            for kind, part in zip(each, value, strict=True)
        ]
        return _UNFIT if any(part is _UNFIT for part in parts) else tuple(parts)
    if kind is Any:
        return value
    if isinstance(value, numbers.Number) and not isinstance(value, int | float | complex):
        value = value.item()  # type: ignore[attr-defined]  # one of numpy's
    if origin in (dict, Mapping) or kind in (dict, Mapping):
        if not isinstance(value, Mapping | ConfigDict):
            return _UNFIT
        values = {name: _as(inside[1], inner) if inside else inner for name, inner in plain(value).items()}
        return _UNFIT if any(inner is _UNFIT for inner in values.values()) else values
    if isinstance(value, bool):
        return value if kind is bool else _UNFIT
    if kind is float and isinstance(value, int):
        return float(value) if abs(value) < 2**1023 else _UNFIT
    return value if isinstance(kind, type) and isinstance(value, kind) else _UNFIT


def plain(value: Any) -> Any:
    """Mappings and ConfigDicts as dicts, lists as tuples, all the way down."""
    if isinstance(value, Mapping | ConfigDict):
        return {name: plain(inner) for name, inner in value.items()}
    return tuple(map(plain, value)) if isinstance(value, tuple | list) else value


def to_json(value: Any) -> Any:
    """A section, or what is in one, as JSON has it: dicts and lists; infinite numbers, which JSON lacks, as texts."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: to_json(inner) for name, inner in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(inner) for inner in value]
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def _one_kind_text(kind: Any) -> str:
    inside = typing.get_args(kind)
    if typing.get_origin(kind) in (tuple, Sequence):
        if inside[0] is Any:
            return "a tuple"
        each = [each for each in inside if each is not Ellipsis]
        if len(set(each)) > 1:
            return f"a tuple ({', '.join(map(kind_text, each))})"
        what = kind_text(each[0])
        what = f"{what.removeprefix('a ')}s" if what in _PLAIN.values() or what == "a dict" else f"entries, each {what}"
        return f"a tuple of {f'{len(each)} ' if len(each) > 1 else ''}{what}"
    if dataclasses.is_dataclass(kind) or typing.get_origin(kind) in (dict, Mapping) or kind in (dict, Mapping):
        return "a dict"
    return _PLAIN.get(kind, str(kind))
