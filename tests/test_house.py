"""Files and functions stay short enough to be read at once."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAX_LINES_OF_FILE = 350
MAX_LINES_OF_FUNCTION = 60


def files(*folders):
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert found
    return [(path.relative_to(ROOT), path.read_text()) for path in found]


def functions(text):
    """Name and number of lines, from `def` on, of every function, methods and inner ones too."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.end_lineno - node.lineno + 1


def test_files_are_short():
    lengths = {path: len(text.splitlines()) for path, text in files("tif_jax", "benchmarks", "tests", "configs")}
    too_long = [f"{path}: {length} lines" for path, length in lengths.items() if length > MAX_LINES_OF_FILE]
    assert not too_long, "\n".join([f"more than {MAX_LINES_OF_FILE} lines:", *too_long])


def test_functions_are_short():
    too_long = [
        f"{path}: {name} has {length} lines"
        for path, text in files("tif_jax")
        for name, length in functions(text)
        if length > MAX_LINES_OF_FUNCTION
    ]
    assert not too_long, "\n".join([f"more than {MAX_LINES_OF_FUNCTION} lines:", *too_long])
