"""The pages: their tables are those of the code, their links lead somewhere, and every reducer is explained."""

import importlib.util
import re
from pathlib import Path

import pytest

from tif_jax import checked, reducers
from tif_jax.experiment.schema import Experiment

ROOT = Path(__file__).parents[1]
PAGES = [
    str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.md"), *ROOT.glob("launch/*.md"), *ROOT.glob("docs/**/*.md")]
]
_spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
assert _spec is not None and _spec.loader is not None
generate = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(generate)


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_those_of_the_code(page):
    text = (ROOT / page).read_text()
    assert generate.fill(text) == text, "run `python docs/generate.py`"
    assert text.count("<!-- end -->") == len(generate.BLOCK.findall(text))


@pytest.mark.parametrize("name", reducers.known())
def test_every_option_of_a_reducer_is_explained(name):
    found = [
        block["body"]
        for page in (ROOT / "docs" / "methods").glob("*.md")
        for block in generate.BLOCK.finditer(page.read_text())
        if (block["kind"], block["name"]) == ("options", name)
    ]
    assert len(found) == 1
    for option in reducers.options(name):
        row = next(line for line in found[0].splitlines() if line.startswith(f"| `{option}` |"))
        assert row.split("|")[-2].strip(), f"say in docs/methods what {option} of {name} is"


def test_every_section_and_every_key_of_a_config_is_in_a_table():
    text = (ROOT / "docs" / "config.md").read_text()
    found = [block["name"] for block in generate.BLOCK.finditer(text)]
    sections = {generate.section_of(key) for key in checked.keys(Experiment)}
    assert sorted(found) == sorted(sections | set(generate.SHARED))
    assert not [row for section in sections for row in generate.rows_of(section) if row not in text]


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    links = re.findall(r"\]\((?!https?:)([^)\s]*)\)", text) + re.findall(r'(?:href|src)="(?!https?:)([^"]*)"', text)
    for link in links:
        file, _, anchor = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in _anchors(target.read_text()), link


def _anchors(text: str) -> list[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
