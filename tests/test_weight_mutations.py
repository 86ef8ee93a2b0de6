"""Damaged weight files under a memory limit: each is refused in one line, or is the same model; none is a trace."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

MUTANTS = Path(__file__).with_name("weight_mutants.py")


@pytest.mark.parametrize(("count", "seed"), [(300, 0), pytest.param(30_000, 1, marks=pytest.mark.long)])
def test_damaged_weight_files(tmp_path, count, seed):
    command = [sys.executable, MUTANTS, tmp_path, count, seed]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert not found["bad"], json.dumps(found["bad"], indent=2)[:5000]
    # Both ends are reached: damage that nothing can see, as in a weight, and damage that is seen.
    outcomes = found["outcomes"]
    assert sum(outcomes.values()) == count and min(outcomes["refused"], outcomes["same fields"]) > count / 20
    assert found["peak"] < 1e9
