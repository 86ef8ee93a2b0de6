"""Fills the marked tables of the pages from the code: `python docs/generate.py`.

`<!-- options: NAME -->` begins the table of a reducer's options, `<!-- config: SECTION -->` that of the keys of a config's
section ('top': of those outside of sections), and `<!-- end -->` ends it. The last column of a reducer's table is written
by hand and kept: a new option comes with an empty cell, which `tests/test_docs.py` does not accept.
"""

import inspect
import re
from pathlib import Path

from tif_jax import checked, reducers
from tif_jax.experiment.schema import Experiment

DOCS = Path(__file__).parent
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


def config_table(section: str) -> str:
    """Key, default, what it may be and what it is for."""
    rows = [
        f"| `{key.path.removeprefix(f'{section}.')}` | `{getattr(key.default, 'described', key.default)!r}` "
        f"| {key.allowed.removeprefix('allowed: ')} | {key.help} |\n"
        for key in checked.keys(Experiment)
        if section_of(key) == section
    ]
    return "".join(["| key | default | may be | what it is |\n", "|---|---|---|---|\n", *rows])


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
