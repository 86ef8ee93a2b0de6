"""Benchmarks take too long to be run here, but what they import is there, and README.md lists them all."""

import importlib
import pkgutil
from pathlib import Path

import benchmarks


def test_all_can_be_imported_and_are_listed():
    listed = (Path(benchmarks.__file__).parent / "README.md").read_text()
    for name in sorted(module.name for module in pkgutil.iter_modules(benchmarks.__path__)):
        if name in ("_timm_worker", "_torch_worker"):  # run in another Python
            continue
        module = importlib.import_module(f"benchmarks.{name}")
        if hasattr(module, "main") and not name.startswith("_"):
            assert f"python -m benchmarks.{name}" in listed and f"python -m benchmarks.{name}" in module.__doc__
