"""Names of scores that people bring: a column of a file, a function of another package, or values from Python."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

GROUP = "avss_dist.scores"
"""Group of entry points of functions that score the layers of a run. See `analysis.scorecard.own_score`."""
VALUES = "values:"


def score_functions() -> dict[str, EntryPoint]:
    """Return the functions of installed packages that score layers, by the name of their entry point."""
    return {point.name: point for point in entry_points(group=GROUP)}


def is_own(name: str) -> bool:
    """Whether a name is that of a score that people bring: ``FILE:COLUMN``, or an entry point."""
    return ":" in name or name in score_functions()


def name_values(value: Any) -> Any:
    """Return a name that holds the values of a mapping from layer to value; other values unchanged."""
    if not isinstance(value, Mapping):
        return value
    return VALUES + json.dumps({str(int(layer)): float(number) for layer, number in value.items()})
