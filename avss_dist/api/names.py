"""Runs and thresholds by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from avss_dist.analysis.chosen import choose_runs, one_run
from avss_dist.core.text import parse_threshold
from avss_dist.stats.scores import Threshold
from avss_dist.warehouse.reader import Warehouse


def named_runs(opened: Warehouse, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the rows of ``runs`` with these names, or of every finished run without names."""
    return choose_runs(opened, names, every=True)


def named_run(opened: Warehouse, name: str | None, *, measured: bool = False) -> dict[str, Any]:
    """Return the row of the one run with this name, or of the newest run; see `chosen.choose_runs` for ``measured``."""
    return one_run(choose_runs(opened, [] if name is None else [name], measured=measured), str(name))


def named_threshold(value: str | float) -> Threshold:
    """Return a threshold from a number or a text."""
    number, kind = parse_threshold(value)
    return Threshold(value=number, kind=kind)
