"""Renders the API reference from the docstrings, and checks its links: `python docs/api.py [FOLDER]`, by default build/api.

Needs the extra `docs` (pdoc).
"""

import re
import sys
from itertools import groupby
from pathlib import Path

# What somebody calls or extends; the other modules are the house's own.
MODULES = (
    "tif_jax",
    "tif_jax.data.source",
    "tif_jax.impact.oracle",
    "tif_jax.impact.shards",
    "tif_jax.models.levit",
    "tif_jax.models.model",
    "tif_jax.models.vit",
    "tif_jax.reducers",
    "tif_jax.tokens",
    "tif_jax.training.losses",
)
ARGUMENT = re.compile(r"^([a-z]\w*(?:, \w+)*(?: \([\w ,]+\))?): ?")


def main(folder: Path) -> None:
    import pdoc
    import pdoc.docstrings

    import tif_jax

    tif_jax.__doc__ = f"{tif_jax.__doc__}\n\nMore: {', '.join(f'`{name}`' for name in MODULES[1:])}."
    pdoc.docstrings.convert = lambda text, *_: markdown(text)
    pdoc.pdoc(*MODULES, output_directory=folder)
    if broken := broken_links(folder):
        sys.exit("\n".join(broken))
    print(f"{len(list(folder.rglob('*.html')))} pages in {folder}, whose links lead somewhere")


def markdown(docstring: str) -> str:
    """A docstring with a paragraph per argument; tables, which are indented and follow a colon or nothing, as they stand."""
    written: list[str] = []
    for indented, lines in groupby(docstring.splitlines(), lambda line: line.startswith("  ")):
        above = written[-1] if written else ""
        if not indented:
            for line in lines:
                written += ["", ARGUMENT.sub(r"**\1**: ", line)] if ARGUMENT.match(line) else [line]
        elif above and not above.rstrip().endswith(":"):
            written += [line.strip() for line in lines]
        else:
            written += ["", *(f"    {line}" for line in lines), ""]
    return "\n".join(written)


def broken_links(folder: Path) -> list[str]:
    """One line per link of the folder's pages to a file or an anchor that is not there."""
    broken = []
    for page in folder.rglob("*.html"):
        text = re.sub(r"<script.*?</script>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for link in re.findall(r'(?:href|src)="(?!\w+:)([^"]*)"', text):
            file, _, anchor = link.partition("#")
            target = page.parent / file if file else page
            if not target.is_file() or (anchor and f'id="{anchor}"' not in target.read_text(encoding="utf-8")):
                broken.append(f"{page.name}: {link} leads nowhere")
    return broken


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/api"))
