"""Functions that read a warehouse."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from avss_dist.analysis import comparison as comparing
from avss_dist.analysis import curves as following
from avss_dist.analysis import findings as finding
from avss_dist.analysis.chosen import choose_runs, one_run
from avss_dist.core.results import Table
from avss_dist.core.text import parse_threshold
from avss_dist.core.validation import keywords
from avss_dist.read_requests import CompareRequest, FindingsRequest
from avss_dist.stats.scores import Threshold
from avss_dist.warehouse.reader import Warehouse


@keywords(CompareRequest)
def compare(request: CompareRequest) -> comparing.RankingComparison | following.RankingCurves:
    """Compare the layer rankings of runs, by default of all finished ones, by pairs or ``along`` an axis."""
    opened = Warehouse(request.warehouse)
    run_ids = _run_ids(opened, request.run)
    return follow_runs(opened, run_ids, request) if request.along else compare_runs(opened, run_ids, request)


def follow_runs(opened: Warehouse, run_ids: Sequence[str], request: CompareRequest) -> following.RankingCurves:
    """Follow the layer rankings of runs along the axis of a request, and draw the picture that it asks for."""
    names = ("along", "site", "recipe", "score", "allow_mismatch")
    values = {name: getattr(request, name) for name in names}
    curves = following.ranking_curves(opened, run_ids, threshold=named_threshold(request.threshold), **values)
    if request.output is not None:
        from avss_dist.report.chart import save_chart
        from avss_dist.report.curves import curves_chart

        save_chart(curves_chart(curves.curves), Path(request.output))
    return curves


def compare_runs(
    opened: Warehouse, run_ids: Sequence[str], request: CompareRequest, *, max_listed: int = comparing.MAX_PAIRS
) -> comparing.RankingComparison:
    """Compare runs as a request says, and list all pairs if there are at most ``max_listed``.

    If the request has an output, the similarity map is saved there.
    """
    names = ("by", "score", "share", "site", "recipe", "allow_mismatch")
    values = {name: getattr(request, name) for name in names} | {"threshold": named_threshold(request.threshold)}
    mapped = request.output is not None
    comparison = comparing.compare(opened, run_ids, **values, max_listed=max_listed, mapped=mapped)
    if request.output is not None:
        from avss_dist.report.chart import save_chart, similarity_chart  # altair takes a second to import

        save_chart(similarity_chart(comparison), Path(request.output))
    return comparison


@keywords(FindingsRequest)
def findings(request: FindingsRequest) -> Table:
    """List findings that speak against the scores of runs, by default of all finished ones."""
    opened = Warehouse(request.warehouse)
    return Table(finding.findings(opened, _run_ids(opened, request.run), threshold=named_threshold(request.threshold)))


def _run_ids(opened: Warehouse, names: Sequence[str]) -> list[str]:
    """Return the ids of the runs with these names, or of all finished ones without names."""
    return [row["run_id"] for row in choose_runs(opened, names, every=True, columns=("run_id",))]


def named_run(opened: Warehouse, name: str | None, *, measured: bool = False) -> dict[str, Any]:
    """Return the row of the one run with this name, or of the newest run without a name.

    See `chosen.choose_runs` for ``measured``.
    """
    return one_run(choose_runs(opened, [] if name is None else [name], measured=measured), str(name))


def named_threshold(value: str | float) -> Threshold:
    """Return a threshold from a number or a text."""
    number, kind = parse_threshold(value)
    return Threshold(value=number, kind=kind)
