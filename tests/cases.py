"""Which cases of a test run always, and which with `-m long` only."""

import pytest


def mostly_long(cases, short=(0,)):
    """The cases for parametrize; those whose positions are not in `short` run with -m long."""
    return [
        case if i in short else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.long)
        for i, case in enumerate(cases)
    ]
