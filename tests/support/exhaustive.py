"""Cases that run only where they are asked for: other combinations of what the cases that always run cover."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def further(*cases: Any) -> list[Any]:
    """Return cases of `pytest.mark.parametrize` that run with ``--exhaustive``, or where their test is named.

    A case of several arguments is a tuple.
    """
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.exhaustive) for case in cases
    ]


def all_of(cases: Iterable[Any], always: Iterable[Any]) -> list[Any]:
    """Return all cases; those that are not in ``always`` run as those of `further` do.

    Raises:
        ValueError: ``always`` has what is not a case.
    """
    every, first = list(cases), list(always)
    if unknown := [case for case in first if case not in every]:
        raise ValueError(f"No case: {unknown}")
    return [*first, *further(*(case for case in every if case not in first))]
