"""What a config says of a reducer, parsed once.

`reducer=dict(name="evit", keep_ratio=0.5)` or an entry of benchmark.reducers: a name or such a dict. Keys are the options
of the reducer's constructor, and `budget` (GMAC, or a speed as
'120 images/s') instead of an amount.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flax import nnx

from tif_jax import checked, reducers
from tif_jax.errors import InputError
from tif_jax.models.budget import AMOUNTS, SOLVED, Speed, read_budget

FITTED = ("tif", "tosa")  # reducers with a part that is fitted before fine-tuning (`experiment.stages`)


@dataclasses.dataclass(frozen=True)
class ReducerEntry:
    """A reducer by name, its options, and perhaps the GMAC, or the speed, that its amount is solved for."""

    name: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    budget: float | str | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """What `create_model` and `load` take beside the name."""
        return dict(self.options) if self.budget is None else {**self.options, "budget": self.budget}

    @property
    def described(self) -> dict[str, Any]:
        """Plain data, as a config and a checkpoint have it."""
        return {"name": self.name, **self.arguments}

    @property
    def label(self) -> str:
        """NAME-AMOUNT, as in 'tif-0.5', and the options that differ from their defaults: 'evit-0.5,fuse=False'."""
        return f"{self.name}-{self._amount}{self._differing(AMOUNTS)}"

    @property
    def is_fitted_first(self) -> bool:
        """Whether a part of it is fitted before fine-tuning."""
        return self.name in FITTED and self.options.get("selector", "learned") == "learned"

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter is fitted between its filter and fine-tuning."""
        return self.name == "tif" and self.options.get("adapter", 0) > 0

    @property
    def fitted_name(self) -> str:
        """The folder of its fitted part: 'filter' for tif; of others the name and the options but the amount follow."""
        return "filter" if self.name == "tif" else f"filter-{self.name}{self._differing(AMOUNTS)}"

    @property
    def modules(self) -> set[str]:
        """The modules outside of `tif_jax.reducers` that it names."""
        return set(reducers.modules_in(self.described))

    def without(self, *names: str) -> "ReducerEntry":
        """The entry without these options; 'budget' is one of them."""
        kept = {name: value for name, value in self.options.items() if name not in names}
        return ReducerEntry(self.name, kept, None if "budget" in names else self.budget)

    def replaced(self, **options: Any) -> "ReducerEntry":
        """The entry with these options; an amount stands instead of whatever said how much to keep."""
        base = self.without(*AMOUNTS) if any(name in AMOUNTS for name in options) else self
        budget = options.pop("budget", base.budget)
        return ReducerEntry(self.name, {**base.options, **options}, budget)

    @property
    def _amount(self) -> str:
        if self.budget is not None:
            budget = read_budget(self.budget)
            return budget.label if isinstance(budget, Speed) else f"{budget:g}GMAC"
        defaults = _defaults(self.name)
        solved = [key for key in SOLVED if key in defaults]
        given = [self.options[key] for key in solved if self.options.get(key) is not None]
        amount = next(iter(given), defaults[solved[0]] if solved else 1)
        return _spelled(self.options.get("num_kept") or self.options.get("clusters") or amount)

    def _differing(self, but: tuple[str, ...]) -> str:
        defaults = _defaults(self.name)
        differing = {key: v for key, v in self.options.items() if key not in but and v != defaults[key]}
        return "".join(f",{key}={_spelled(value)}" for key, value in differing.items())


def read_entry(settings: Any, where: str, taken_over: Mapping[str, Any] | None = None) -> ReducerEntry:
    """The entry that a name, a dict or a JSON file of such a dict says.

    taken_over: options that it has unless it says otherwise, as far as the reducer knows them. An amount of its own stands
    instead of those taken over. Raises InputError, with the nearest known key, for an option that the reducer lacks.
    """
    own = {"name": settings} if isinstance(settings, str) else checked.plain(settings)
    if isinstance(own, dict) and reducers.is_file(own.get("name")):
        with checked.named(where):
            own = {**reducers.described_in(own["name"]), **{key: own[key] for key in own if key != "name"}}
    if not isinstance(own, dict) or not isinstance(own.get("name"), str):
        example = "a name, or a dict as in dict(name='evit', keep_ratio=0.5)"
        raise InputError(f"{where} is {checked.shown(settings)}; it is {example}")
    name = own.pop("name")
    kinds = option_kinds(name, where)
    for key in own:
        if key not in (*kinds, "budget"):
            raise _unknown_option(where, name, key, kinds)
    solvable = any(key in kinds for key in SOLVED)
    inherited = dict(taken_over or {})
    if not own.keys().isdisjoint(AMOUNTS):
        inherited = {key: value for key, value in inherited.items() if key not in AMOUNTS}
    given = {key: value for key, value in inherited.items() if key in kinds or (key == "budget" and solvable)} | own
    options = {key: _option(kinds[key], value, f"{where}.{key}") for key, value in given.items() if key in kinds}
    budget = None
    if "budget" in given:
        if not solvable:
            raise InputError(
                f"{where}.budget is {checked.shown(given['budget'])}, but {name!r} has no amount to solve for"
            )
        read = read_budget(given["budget"], f"{where}.budget")
        budget = str(read) if isinstance(read, Speed) else read
        if amounts := sorted(key for key in AMOUNTS if options.get(key) is not None):
            raise InputError(f"{where} has a budget and {', '.join(amounts)}; a budget stands instead of them")
    return ReducerEntry(name, options, budget)


def phases_of(entry: ReducerEntry, phases: Sequence[Mapping[str, Any]]) -> list[tuple[float, ReducerEntry]]:
    """Until which epoch the reducer has which options; after the last phase come its own.

    A phase is dict(until=EPOCH, OPTION=...). The reducer takes those of its options that it knows.
    """
    kinds, found = option_kinds(entry.name), []
    if any(key in kinds for key in SOLVED):
        kinds = {**kinds, "budget": float}
    for i, phase in enumerate(phases):
        changed = {key: value for key, value in phase.items() if key in kinds}
        typed = {key: checked.value_of(kinds[key], v, f"finetune.phases[{i}].{key}") for key, v in changed.items()}
        found.append((float(phase["until"]), entry.replaced(**typed)))
    return found


def option_kinds(name: str, where: str = "") -> dict[str, Any]:
    """The annotation of each option of a reducer, named or described by a JSON file.

    Raises InputError for an unknown name, which stands at the key `where`.
    """
    with checked.named(where):
        parameters = reducers.options(reducers.described_in(name)["name"] if reducers.is_file(name) else name)
    return {key: Any if p.annotation is p.empty else p.annotation for key, p in parameters.items()}


def check_options(entry: ReducerEntry, where: str) -> None:
    """Raises InputError if the reducer can not be built with these options, whatever the model."""

    def build() -> None:  # a reducer need not be something that jit can return
        reducers.build(entry.name, width=2, num_patches=4, rngs=nnx.Rngs(0), **entry.options)

    with checked.named(where, entry.options):
        nnx.eval_shape(build)


def _option(kind: Any, value: Any, where: str) -> Any:
    """An option as its annotation has it; `then` is a reducer of its own."""
    if where.endswith(".then"):
        if value is not None and not isinstance(value, Mapping):
            raise InputError(
                f"{where} is {checked.shown(value)}; it is a dict, as in dict(name='evo_vit', keep_ratio=0.5)"
            )
        return None if value is None else read_entry(value, where).described
    return checked.value_of(kind, value, where)


def _unknown_option(where: str, name: str, key: str, kinds: Iterable[str]) -> InputError:
    known = [*kinds, "budget"]
    if where.startswith("--"):
        return InputError(f"{where}: {name!r} has no option {key!r}; it takes {', '.join(sorted(known))}")
    error = checked.unknown_key(f"{where}.{key}", [f"{where}.{other}" for other in known])
    return InputError(f"{error} ({name!r} takes {', '.join(sorted(known))})")


def default_of(name: str, option: str) -> Any:
    return _defaults(name)[option]


def _defaults(name: str) -> dict[str, Any]:
    return {key: parameter.default for key, parameter in reducers.options(name).items()}


def _spelled(value: Any) -> str:
    """A value as a label has it."""
    if isinstance(value, Mapping):
        others = [f"{key}={_spelled(v)}" for key, v in value.items() if key != "name"]
        return "+".join([str(value.get("name")), *others])
    if isinstance(value, tuple | list):
        return "+".join(map(_spelled, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
