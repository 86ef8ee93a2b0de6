"""The rows of `tif compare`: which reducers under which budgets."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from flax import nnx

from tif_jax import reducers
from tif_jax.commands._reducers import entry_in
from tif_jax.commands._weights import Weights
from tif_jax.errors import InputError
from tif_jax.experiment.reducer_entry import ReducerEntry, option_kinds, read_entry
from tif_jax.models import blueprint
from tif_jax.models.budget import AMOUNTS, SOLVED, Speed, label_of, read_budget
from tif_jax.models.cost import cost
from tif_jax.models.params import params_of
from tif_jax.runtime import records

logger = logging.getLogger(__name__)

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


def rows_asked(weights: Weights, given: Sequence[str], budgets: Sequence[str], batch_size: int) -> list[Asked]:
    """`full`, then every reducer under each budget, in the order given, each once.

    given: texts after --reducer; none: the reducers that need no training, and the weights' own. A reducer that says its
    amount itself is a row whatever the budgets; a folder has a schedule for each of them. batch_size: of budgets that are
    speeds and say none.
    """
    wished = {text: _budget(text, batch_size) for text in budgets}
    found = [Asked(read_entry("full", "--reducer"), "full")]
    for text in given or _untrained(weights, bool(budgets)):
        if os.path.isdir(text):
            found += [Asked(entry, text, said) for said, entry in _in_folder(text, wished)]
            continue
        entry = read_entry(weights.own, "--reducer own") if text == OWN else entry_in(text)
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


def _in_folder(folder: str, budgets: Mapping[str, float | str]) -> list[tuple[str, ReducerEntry]]:
    """Schedules as `tif calibrate` names them: one for each budget; without budgets all there are."""
    paths = {said: Path(folder) / f"{label_of(read_budget(budget))}.json" for said, budget in budgets.items()}
    for said, path in paths.items():
        if not path.exists():
            raise InputError(
                f"there is no {path}: `tif calibrate` makes one schedule for each --budget, and {said!r} means "
                f"'{read_budget(budgets[said])}' here"
            )
    if budgets:
        return [(said, entry_in(str(path))) for said, path in paths.items()]
    there = sorted(str(path) for path in Path(folder).glob("*.json"))
    if not there:
        raise InputError(f"--reducer is {folder}, a folder without a schedule (.json)")
    return [("", entry_in(path)) for path in there]


def _budget(text: str, batch_size: int) -> float | str:
    budget = read_budget(text, "--budget")
    if not isinstance(budget, Speed):
        return budget
    return str(budget if " at " in text else budget._replace(batch_size=batch_size))


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
