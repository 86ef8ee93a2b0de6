"""Fills the marked tables of the pages from the code: `python docs/generate.py`.

`<!-- options: NAME -->` begins the table of a reducer's options, and `<!-- end -->` ends it. Its last column is written by
hand and kept: a new option comes with an empty cell, which `tests/test_docs.py` does not accept.
"""

import inspect
import re
from pathlib import Path

from tif_jax import reducers

DOCS = Path(__file__).parent
BLOCK = re.compile(r"(?P<head><!-- options: (?P<name>\w+) -->\n)(?P<body>.*?)(?P<tail><!-- end -->)", re.DOTALL)


def main() -> None:
    for page in sorted(DOCS.rglob("*.md")):
        text = page.read_text()
        if (filled := fill(text)) != text:
            page.write_text(filled)
            print(f"{page.relative_to(DOCS)} is written anew")


def fill(text: str) -> str:
    """The page with its marked tables as the code has them."""
    return BLOCK.sub(lambda found: found["head"] + options_table(found["name"], found["body"]) + found["tail"], text)


def options_table(name: str, before: str) -> str:
    """Option, type, default and what it is for; the last from the table that was there before."""
    meanings = {option: meaning.strip() for option, meaning in re.findall(r"^\| `(\w+)` .*\|([^|]*)\|$", before, re.M)}
    rows = [
        f"| `{option}` | {_type(parameter)} | `{parameter.default!r}` | {meanings.get(option, '')} |\n"
        for option, parameter in reducers.options(name).items()
    ]
    return "".join(["| option | type | default | what it is |\n", "|---|---|---|---|\n", *rows]) if rows else "None.\n"


def _type(parameter: inspect.Parameter) -> str:
    """The annotation in words that fit into a cell; a reducer that comes `then` is given as a dict."""
    text = inspect.formatannotation(parameter.annotation).replace("collections.abc.Callable", "dict")
    return text.replace(" | ", " or ").replace(", ...", "")


if __name__ == "__main__":
    main()
