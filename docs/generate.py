"""Fills the marked tables of the pages from the code: `python docs/generate.py`.

`<!-- options: NAME -->` begins the table of a reducer's options, `<!-- config: SECTION -->` that of the keys of a config's
section ('top': of those outside of sections; a name of `SHARED`: of those that several sections have, which then stand
there alone), and `<!-- end -->` ends it. The last column of a reducer's table is written
by hand and kept: a new option comes with an empty cell, which `tests/test_docs.py` does not accept.
"""

import inspect
import re
from pathlib import Path

from tif_jax import checked, reducers
from tif_jax.experiment.schema import Experiment

DOCS = Path(__file__).parent
# Tables of the rows that are the same in all of these sections.
SHARED = {"training": ("backbone", "filter", "adapter", "finetune"), "network": ("backbone", "finetune")}
BLOCK = re.compile(
    r"(?P<head><!-- (?P<kind>options|config): (?P<name>\w+) -->\n)(?P<body>.*?)(?P<tail><!-- end -->)", re.DOTALL
)


def main() -> None:
    for page in sorted(DOCS.rglob("*.md")):
        text = page.read_text()
        if (filled := fill(text)) != text:
            page.write_text(filled)
            print(f"{page.relative_to(DOCS)} is written anew")


def fill(text: str) -> str:
    """The page with its marked tables as the code has them."""

    def table(found: re.Match) -> str:
        name, body = found["name"], found["body"]
        rows = options_table(name, body) if found["kind"] == "options" else config_table(name)
        return found["head"] + rows + found["tail"]

    return BLOCK.sub(table, text)


def options_table(name: str, before: str) -> str:
    """Option, type, default and what it is for; the last from the table that was there before."""
    meanings = {option: meaning.strip() for option, meaning in re.findall(r"^\| `(\w+)` .*\|([^|]*)\|$", before, re.M)}
    rows = [
        f"| `{option}` | {_type(parameter)} | `{parameter.default!r}` | {meanings.get(option, '')} |\n"
        for option, parameter in reducers.options(name).items()
    ]
    return "".join(["| option | type | default | what it is |\n", "|---|---|---|---|\n", *rows]) if rows else "None.\n"


def config_table(name: str) -> str:
    """Key, default, what it may be and what it is for: of a section, or what several sections share."""
    rows = _shared_rows(name) if name in SHARED else rows_of(name)
    elsewhere = [
        row for other, sections in SHARED.items() if other != name and name in sections for row in _shared_rows(other)
    ]
    own = [row for row in rows if row not in elsewhere]
    return "".join(["| key | default | may be | what it is |\n", "|---|---|---|---|\n", *own])


def _shared_rows(name: str) -> list[str]:
    """The rows that all sections of `SHARED[name]` have, without those of the table 'training', which comes first."""
    first, *others = map(rows_of, SHARED[name])
    earlier = _shared_rows("training") if name != "training" else []
    return [row for row in first if all(row in rows for rows in others) and row not in earlier]


def rows_of(section: str) -> list[str]:
    """The rows of a section's keys."""
    return [
        f"| `{key.path.removeprefix(f'{section}.')}` | `{getattr(key.default, 'described', key.default)!r}` "
        f"| {key.allowed.removeprefix('allowed: ')} | {key.help} |\n"
        for key in checked.keys(Experiment)
        if section_of(key) == section
    ]


def section_of(key: checked.Key) -> str:
    """The first part of a key's path, or 'top' for a key outside of sections."""
    section, dot, _ = key.path.partition(".")
    return section if dot else "top"


def _type(parameter: inspect.Parameter) -> str:
    """The annotation in words that fit into a cell; a reducer that comes `then` is given as a dict."""
    text = inspect.formatannotation(parameter.annotation).replace("collections.abc.Callable", "dict")
    return text.replace(" | ", " or ").replace(", ...", "")


if __name__ == "__main__":
    main()
