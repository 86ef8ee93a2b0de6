"""The rows of `tif compare`: which reducers under which budgets, and their models, which share the weights of one."""

import ast
import json
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx

from tif_jax import reducers
from tif_jax.commands._reducers import reducer_in
from tif_jax.errors import InputError
from tif_jax.experiment.reducer_entry import ReducerEntry, option_kinds, read_entry
from tif_jax.models import Model, blueprint, built_with, require_head
from tif_jax.models.budget import AMOUNTS, SOLVED, Speed, read_budget
from tif_jax.models.cost import cost
from tif_jax.models.params import params_of
from tif_jax.runtime import records
from tif_jax.runtime.digests import digest
from tif_jax.weights import hub
from tif_jax.weights.loading import load_with_fields

logger = logging.getLogger(__name__)

_SAID_ONCE = ("num_heads", "pool", "gelu", "norm_eps", "activation")  # what `load` says that it takes for granted
OWN = "own"  # --reducer own: the one that the weights were saved with


class Asked(NamedTuple):
    """A row that is asked for."""

    entry: ReducerEntry
    given: str  # the text after --reducer
    budget: str = ""  # the text after --budget

    @property
    def key(self) -> str:
        """Digest of the reducer, its options and budget."""
        return records.digest(self.entry.described)


class Weights(NamedTuple):
    """What all rows share: the weights, the model with all tokens, and what that was built with."""

    source: str
    full: Model
    fields: dict[str, Any]
    own: dict[str, Any]  # the reducer that they were saved with: name and options
    dtype: str
    digest: str  # of all parameters, those of the own reducer, too

    def model(self, reducer: dict[str, Any]) -> Model:
        """The model under a reducer, name and options. Raises InputError if the weights lack what it has to learn."""
        own = dict(reducer)
        known = {name: self.fields[name] for name in _SAID_ONCE if name in self.fields}
        model, _ = load_with_fields(
            self.source, reducer=own.pop("name"), dtype=self.dtype, fresh_told_at=None,
            named=[*reducers.modules_in(reducer)], preprocessing=self.full.preprocessing, **known, **own,
        )  # fmt: skip
        shared = {name: leaf for name, leaf in params_of(self.full).items() if name != "reducer"}
        nnx.update(model, shared)  # one copy in memory, however many rows there are
        return model


def read_weights(source: str, dtype: str) -> Weights:
    """Raises InputError for weights that can not be read, and for those of another task than classes of pictures."""
    source = hub.pinned(source) if hub.is_name(source) else source
    model, fields = load_with_fields(source, dtype=dtype, fresh_told_at=None)
    require_head(model, "a comparison")
    own, identity = built_with(model)["reducer"], digest(params_of(model))
    if own["name"] != "full":
        how = model.preprocessing
        model, fields = load_with_fields(source, reducer="full", dtype=dtype, fresh_told_at=None, preprocessing=how)
    return Weights(source, model, fields, own, dtype, identity)


def rows_asked(weights: Weights, given: Sequence[str], budgets: Sequence[str], batch_size: int) -> list[Asked]:
    """`full`, then every reducer under each budget, in the order given, each once.

    given: texts after --reducer; none: the reducers that need no training, and the weights' own. A reducer that says its
    amount itself is a row whatever the budgets. batch_size: of budgets that are speeds and say none.
    """
    wished = {text: _budget(text, batch_size) for text in budgets}
    found = [Asked(read_entry("full", "--reducer"), "full")]
    for text in given or _untrained(weights, bool(budgets)):
        entry = _entry(text, weights)
        if not wished or entry.name == "full" or any(entry.arguments.get(key) is not None for key in AMOUNTS):
            found.append(Asked(entry, text))
            continue
        for said, budget in wished.items():
            found.append(Asked(read_entry({**entry.described, "budget": budget}, f"--reducer {text}"), text, said))
    return list({asked.key: asked for asked in reversed(found)}.values())[::-1]


def labels_of(asked: Sequence[Asked]) -> list[str]:
    """What rows are called: by reducer and amount, told apart where that is the same."""
    labels: list[str] = []
    for one in asked:
        label, number = one.entry.label if one.entry.name != "full" else "full", 1
        while label in labels:
            number += 1
            label = f"{one.entry.label}#{number}"
        labels.append(label)
    return labels


def _budget(text: str, batch_size: int) -> float | str:
    budget = read_budget(text, "--budget")
    if not isinstance(budget, Speed):
        return budget
    return str(budget if " at " in text else budget._replace(batch_size=batch_size))


def _entry(text: str, weights: Weights) -> ReducerEntry:
    """'tome', 'evit:keep_ratio=0.5', "{'name': 'tome', ...}" or FILE.json. Raises InputError for anything else."""
    where = f"--reducer {text}"
    if text == OWN:
        return read_entry(weights.own, where)
    if text.endswith(".json"):
        return read_entry(text, where)
    if not text.startswith("{"):
        return read_entry(reducer_in(text), where)
    try:
        return read_entry(json.loads(text), where)
    except json.JSONDecodeError:
        pass
    try:
        return read_entry(ast.literal_eval(text), where)
    except (ValueError, SyntaxError):
        raise InputError(f"{where} is no dict; it is as in {{'name': 'tome', 'num_merged': 8}}") from None


def _untrained(weights: Weights, have_budget: bool) -> list[str]:
    """Names of the reducers that fit the model and learn nothing, those with an amount to solve for if there are budgets."""
    found = [OWN] if weights.own["name"] != "full" else []
    for name in reducers.known():
        if name == "full" or (have_budget and not {*SOLVED} & {*option_kinds(name)}):
            continue
        try:
            model = nnx.eval_shape(blueprint(weights.fields, reducer=name), jax.random.key(0))
            cost(model)  # walks it
        except InputError as error:  # an option without a default, or no way through a pyramid
            logger.info("%s is left out: %s", name, error)
            continue
        if "reducer" not in params_of(model):
            found.append(name)
    return found
