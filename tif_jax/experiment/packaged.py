"""The configs that come with the program: the files of configs/, which a wheel has inside the package."""

import ast
import difflib
from pathlib import Path

from tif_jax.errors import InputError

_PACKAGE = Path(__file__).parents[1]
FOLDER = next(folder for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if folder.is_dir())


def names() -> list[str]:
    """What `--config` takes instead of a file."""
    return sorted(path.stem for path in FOLDER.glob("[!_]*.py"))


def summary(name: str) -> str:
    """The first line of a config's docstring."""
    return first_line(FOLDER / f"{name}.py").rstrip(":")


def first_line(path: Path) -> str:
    """Of the docstring of a Python file, which is not imported: that may take seconds."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def path_of(given: str) -> Path:
    """The file that `--config` names: a packaged config by its name, or a path. InputError where there is none."""
    if given in names():
        return FOLDER / f"{given}.py"
    path = Path(given)
    if path.is_file():
        return path
    here = [str(file) for file in path.parent.glob("*.py")] if path.parent.is_dir() else []
    # Somebody who has no source tree types what the pages say of one: configs/digits.py.
    nearest = path.stem if path.stem in names() else difflib.get_close_matches(given, [*names(), *here], 1, 0.0)[0]
    raise InputError(f"no config file {given}, and no config that comes with the program; the nearest is {nearest!r}")
