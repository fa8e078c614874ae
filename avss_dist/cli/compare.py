"""`avss compare` and `findings`: analyses of the runs of a warehouse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from avss_dist.cli.choose import MOST_NAMED, choose_run_ids, choose_runs, choose_threshold, open_warehouse
from avss_dist.cli.options import FORMATS, takes
from avss_dist.core.text import describe_threshold
from avss_dist.read_requests import CompareRequest, FindingsAtRequest
from avss_dist.system.streams import console, emit, say

if TYPE_CHECKING:
    from avss_dist.analysis.compare import RankingComparison
    from avss_dist.warehouse.reader import Warehouse


MAX_TABLED = 20_000  # pairs of which all are compared in full for a table on a terminal


@takes(CompareRequest, FORMATS)
def compare(format: str, **values: Any) -> None:
    """Compare layer rankings between runs: how far they agree, or how they move along training, size or text."""
    request = CompareRequest(**values)
    if request.along:
        _follow(request, format)
    else:
        _compare_pairs(request, format)


def _follow(request: CompareRequest, format: str) -> None:
    """Print the curves of layer rankings along an axis."""
    from avss_dist.api.read import follow_runs
    from avss_dist.report.curves import curve_section
    from avss_dist.report.output import write_table
    from avss_dist.report.terminal.tables import rendered

    opened = open_warehouse(str(request.warehouse))
    curves = follow_runs(opened, choose_run_ids(opened, request.run), request)
    _say_reasons(curves.left_out)
    if request.output is not None:
        say(f"Ranks along {request.along}: {request.output}")
    if format != FORMATS[0]:
        return write_table(curves.table(), format, console())
    console().print(rendered(*(curve_section(curve, "curve") for curve in curves.curves)))
    return None


def _compare_pairs(request: CompareRequest, format: str) -> None:
    """Print the agreement of pairs of runs, and the findings that speak against it."""
    from avss_dist.analysis.compare import MAX_PAIRS
    from avss_dist.analysis.findings import findings as find
    from avss_dist.analysis.findings import of_rankings
    from avss_dist.api.read import compare_runs
    from avss_dist.report.output import write_table
    from avss_dist.report.terminal.agreement import comparison_tables, findings_list

    opened, by, score = open_warehouse(str(request.warehouse)), request.by, request.score
    names = choose_run_ids(opened, request.run)
    at = choose_threshold(request.threshold)
    comparison = compare_runs(opened, names, request, max_listed=MAX_PAIRS if format != FORMATS[0] else MAX_TABLED)
    _say_left_out(comparison)
    if request.output is not None:
        say(f"Map of all pairs: {request.output}")
    pairs = comparison.pairs
    if format != FORMATS[0] and len(pairs) < comparison.number:
        say(f"Of {comparison.number:,} pairs, the {len(pairs):,} most and least alike are listed.")
    if format != FORMATS[0]:
        return write_table(pairs, format, console())
    fixed = {
        "score": score,
        "site": request.site,
        "recipe": request.recipe,
        "threshold": f"|x| < {describe_threshold(at.value, at.kind)}",
    }
    reading = " / ".join(text for name, text in fixed.items() if name != by)
    console().print(comparison_tables(comparison, f"by {by}  {reading}"))
    bearing = find(
        opened,
        sorted(set(names) - set(comparison.left_out)),
        threshold=at,
        site=None if by == "site" else request.site,
        recipe=None if by == "recipe" else request.recipe,
        rankings_alone=True,
    )
    console().print(findings_list(of_rankings(bearing, score if by != "score" else "avss")))
    say(f"avss findings -w {opened.root} lists what else speaks against each of these runs.")
    return None


def _say_left_out(comparison: RankingComparison) -> None:
    """Print which runs were not compared, and why."""
    if comparison.conditions:
        same = ", ".join(comparison.conditions)
        say(f"Only runs with the same {same} are compared with each other; --allow-mismatch compares all.")
    _say_reasons(comparison.left_out)


def _say_reasons(left_out: Mapping[str, str]) -> None:
    """Print the runs that were left out, by reason."""
    run_ids: dict[str, list[str]] = {}
    for run_id, reason in left_out.items():
        run_ids.setdefault(reason, []).append(run_id)
    for reason, names in run_ids.items():
        more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
        say(f"Left out: {', '.join(names[:MOST_NAMED])}{more}: {reason}.")


@takes(FindingsAtRequest, FORMATS)
def findings(format: str, **values: Any) -> None:
    """List findings that speak against scores: they track depth, noise, rounding, single units, and so on."""
    from avss_dist.analysis.findings import findings as find
    from avss_dist.report.output import write_table
    from avss_dist.report.terminal.agreement import findings_list

    request = FindingsAtRequest(**values)
    opened = open_warehouse(str(request.warehouse))
    if request.truth:
        return _compare_with_truth(opened, request, format)
    names = choose_run_ids(opened, request.run)
    table = find(
        opened,
        names if request.run else None,
        threshold=choose_threshold(request.threshold),
        site=None if request.every else request.site,
        recipe=None if request.every else request.recipe,
    )
    if format != FORMATS[0]:
        return write_table(table, format, console())
    console().print(findings_list(table))
    if not request.every:
        emit("--all also lists findings at other sites and recipes.")
    return None


def _compare_with_truth(opened: Warehouse, request: FindingsAtRequest, format: str) -> None:
    """Print how far each score of a run agrees with the ground truth."""
    from avss_dist.analysis.scorecard import best_readings, score_cards
    from avss_dist.report.output import write_table
    from avss_dist.report.scorecards import scorecard_sections
    from avss_dist.report.terminal.tables import rendered

    cards = score_cards(opened, choose_runs(opened, request.run, every=True), request.by)
    cards = cards if request.every else best_readings(cards)
    if format != FORMATS[0]:
        return write_table(cards, format, console())
    console().print(rendered(*scorecard_sections(cards)))
    return None
