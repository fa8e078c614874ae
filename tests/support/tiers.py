"""Tiers of tests: by default those that are quick, and with ``--nightly`` all of them.

A test, a case or a whole file is of the nightly tier if it has the mark `pytest.mark.nightly`. A test that is named on
the command line (``FILE::TEST``) runs in any case.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def nightly(*cases: Any) -> list[Any]:
    """Return cases of `pytest.mark.parametrize` that are of the nightly tier.

    A case of several arguments is a tuple.
    """
    marked = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        marked.append(pytest.param(*values, marks=pytest.mark.nightly))
    return marked


def all_of(cases: Iterable[Any], default: Iterable[Any]) -> list[Any]:
    """Return all cases; those that are not in ``default`` are of the nightly tier.

    Raises:
        ValueError: ``default`` holds a value that is not among the cases.
    """
    every = list(cases)
    first = list(default)
    if unknown := [case for case in first if case not in every]:
        raise ValueError(f"No case: {unknown}")
    return [*first, *nightly(*(case for case in every if case not in first))]
