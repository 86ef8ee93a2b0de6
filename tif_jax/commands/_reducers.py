"""Reducers as a line names them."""

import ast
import json
import re
from typing import Any

from tif_jax.errors import InputError
from tif_jax.experiment.reducer_entry import ReducerEntry, read_entry

_BETWEEN = re.compile(r",(?![^(]*\))")  # commas outside of brackets


def reducers_in(text: str, flag: str = "--reducers") -> list[dict[str, Any]]:
    """'evit,tome:num_merged=8' as dicts that name a reducer with its options."""
    found = []
    for said in _BETWEEN.split(text):
        name, *options = said.strip().split(":")
        pairs = dict(option.split("=", 1) for option in options if "=" in option)
        if not name or len(pairs) < len(options) or "name" in pairs:
            raise InputError(f"{flag} is {text!r}; it is as in evit,tome:num_merged=8,random:keep_ratio=0.5")
        found.append({"name": name, **{key: _value(value) for key, value in pairs.items()}})
    return found


def reducer_in(text: str, flag: str = "--reducer") -> dict[str, Any]:
    """'tome:num_merged=8' as a dict that names a reducer with its options."""
    found = reducers_in(text, flag)
    if len(found) != 1:
        raise InputError(f"{flag} is {text!r}; give one reducer")
    return found[0]


def entry_in(text: str, flag: str = "--reducer") -> ReducerEntry:
    """'tome', 'evit:keep_ratio=0.5', "{'name': 'tome', ...}" or FILE.json. Raises InputError for anything else."""
    where = f"{flag} {text}"
    if text.endswith(".json"):
        return read_entry(text, where)
    if not text.startswith("{"):
        return read_entry(reducer_in(text, flag), where)
    for read in (json.loads, ast.literal_eval):
        try:
            said = read(text)
        except (ValueError, SyntaxError):
            continue
        return read_entry(said, where)
    raise InputError(f"{where} is no dict; it is as in {{'name': 'tome', 'num_merged': 8}}")


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
