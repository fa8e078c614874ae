"""Reading a warehouse."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from avss_dist.analysis import compare as comparing
from avss_dist.analysis import findings as finding
from avss_dist.api.names import RunName, named_runs, named_threshold
from avss_dist.results import Table
from avss_dist.settings import DEFAULT_WAREHOUSE, LOWEST_SHARE, PUBLISHED_THRESHOLD, RECIPES, SITES
from avss_dist.warehouse.reader import Warehouse


def compare(
    *,
    warehouse: str | Path = DEFAULT_WAREHOUSE,
    run: RunName | Sequence[RunName] | None = None,
    by: str = "run",
    site: str = SITES[0],
    recipe: str = RECIPES[0],
    threshold: str | float = PUBLISHED_THRESHOLD,
    score: str = "avss",
    k: int | None = None,
    share: float = LOWEST_SHARE,
    allow_mismatch: bool = False,
) -> comparing.RankingComparison:
    """How far the rankings of layers agree: see `analysis.compare.compare`; of all finished runs by default."""
    opened = Warehouse(warehouse)
    names = [row["run_id"] for row in named_runs(opened, run)]
    at = named_threshold(threshold)
    how: dict[str, Any] = {"by": by, "site": site, "recipe": recipe, "score": score, "k": k, "share": share}
    return comparing.compare(opened, names, threshold=at, allow_mismatch=allow_mismatch, **how)


def findings(
    *,
    warehouse: str | Path = DEFAULT_WAREHOUSE,
    run: RunName | Sequence[RunName] | None = None,
    threshold: str | float = PUBLISHED_THRESHOLD,
) -> Table:
    """What to know before believing scores: see `analysis.findings.findings`; of all finished runs by default."""
    opened = Warehouse(warehouse)
    names = [row["run_id"] for row in named_runs(opened, run)]
    return Table(finding.findings(opened, names, threshold=named_threshold(threshold)))
