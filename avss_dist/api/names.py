"""What a name stands for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from avss_dist.analysis.chosen import choose_runs, one_run
from avss_dist.runs.run import Run
from avss_dist.stats.scores import Threshold
from avss_dist.text import parse_threshold
from avss_dist.warehouse.reader import Warehouse

RunName = str | Run


def named_runs(opened: Warehouse, run: RunName | Sequence[RunName] | None) -> list[dict[str, Any]]:
    """Rows of ``runs``; of every finished run without a name."""
    names = [run] if isinstance(run, (str, Run)) else run or ()
    return choose_runs(opened, [str(getattr(name, "run_id", name)) for name in names], every=True)


def named_run(opened: Warehouse, run: RunName | None) -> dict[str, Any]:
    """The row of the one run of that name, or of the newest."""
    name = str(getattr(run, "run_id", run))
    return one_run(choose_runs(opened, [] if run is None else [name]), name)


def named_threshold(value: str | float) -> Threshold:
    """A threshold from a number or a text."""
    number, kind = parse_threshold(value)
    return Threshold(value=number, kind=kind)
