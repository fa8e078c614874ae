"""Scores of layers, quantiles of their values, agreement of runs, and findings, for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import isnan
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from avss_dist.analysis.findings import TRACKS_DEPTH
from avss_dist.analysis.section import (
    BarColumn,
    ReportColumn,
    ReportTable,
    column_of,
    known_interval,
)
from avss_dist.analysis.thresholds import INTERPOLATED
from avss_dist.core.errors import first_names
from avss_dist.core.registry import LOWEST_SHARE, SCORES
from avss_dist.core.streams import WIDTH
from avss_dist.core.text import basename, describe_count, describe_layers, describe_threshold
from avss_dist.reports.terminal.tables import FittedTable
from avss_dist.stats.intervals import why_no_interval
from avss_dist.stats.layer_stats import bin_edges
from avss_dist.stats.rankings import count_lowest, depth_correlation
from avss_dist.warehouse.reader import grouped

if TYPE_CHECKING:
    from avss_dist.analysis.agreement import CorrelationSummary
    from avss_dist.analysis.comparison import RankingComparison

SHOWN_PAIRS = 40  # shown on a terminal
NUMBERS_WIDTH = 44  # of the columns that are always shown of a pair, their borders, and some of the others
FEW = 3  # runs that a finding names, and messages of one kind, before they are only counted
NEARLY_SAME, ALIKE, RELATED = 0.9, 0.7, 0.3  # correlations above which rankings are called so
DUE_TO_DEPTH = 0.2  # difference to the correlation given depth, above which depth is named as a reason
COLOR = {"warning": "yellow", "note": "dim"}
OF_SHARDS = ("95% interval", "lowest 25%")  # columns that a run of too few shards does not have


def layer_table(run: Mapping[str, Any], scores: Sequence[Mapping[str, Any]], own: Sequence[str] = ()) -> RenderableType:
    """Return a table with a row for each layer: smoothed AVSS, its rank and certainty, block influence.

    Args:
        run: a row of ``runs``.
        scores: rows of ``scores`` of one site, recipe and threshold.
        own: names of the scores that people bring, which are columns of the rows.
    """
    first, count = scores[0], count_lowest(len(scores))
    lowest = [s["rank"] is not None and s["rank"] <= count for s in scores]
    column, number = partial(column_of, scores), "{:z.4g}".format
    columns: list[ReportColumn | BarColumn] = [
        column("layer", "layer"),
        BarColumn(values=[s["avss_smoothed"] for s in scores], marked=lowest),
        column(SCORES["avss"].title, "avss_smoothed", number),
        ReportColumn(
            "95% interval",
            [known_interval(s["avss_low"], s["avss_high"]) for s in scores],
            lambda ends: "{:z.4g} .. {:z.4g}".format(*ends),
            priority=4,
        ),
        column("rank", "rank"),
        column("lowest 25%", "lowest_set_probability", "{:z.0%}".format, 3),
        column("variance", "variance", number, 6),
        column("near zero", "near_zero_count", "{:,.0f}".format, 5),
        column("block influence", "block_influence", number, 2),
        *(column(name, name, number, 1) for name in own),
    ]
    if why_no_interval(run["num_shards"] or 0):
        columns = [column for column in columns if isinstance(column, BarColumn) or column.heading not in OF_SHARDS]
    threshold = describe_threshold(first["threshold"], first["threshold_kind"])
    table = ReportTable(
        columns=columns,
        title=f"{run['model']}  {first['site']} / {first['recipe']} / |x| < {threshold}",
        caption=_caption(run, scores, count),
        marked=lowest,
    )
    return Group(FittedTable(table), *(Text(f"note: {note}", style="yellow") for note in run["notes"] or []))


def describe_exactness(scores: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a sentence on the error of interpolated near-zero counts and the nearest exact ones, if any."""
    inexact = [s for s in scores if s["exactness"] == INTERPOLATED]
    if not inexact:
        return
    off = max(max(s["near_zero_high"] - k, k - s["near_zero_low"]) / k for s in inexact if (k := s["near_zero_count"]))
    where = (
        " Exact: {:.10g} and {:.10g}.".format(*bin_edges(scores[0]["threshold"]))
        if scores[0]["threshold_kind"] == "absolute"
        else ""
    )
    yield (
        f"{len(inexact)} of {len(scores)} near-zero counts are interpolated from stored counts, and off by {off:.0%} "
        f"at the very most.{where}"
    )


def _caption(run: Mapping[str, Any], scores: Sequence[Mapping[str, Any]], lowest: int) -> str:
    noisy, weights = sum(s["quality"] != "ok" for s in scores), ""
    if run.get("quantization"):
        computed = f", computed by {run['quantized_modules']}" if run.get("quantized_modules") else ""
        weights = f"Weights: {run['quantization']}{computed}.\n"
    text = (
        f"{run['run_id']}: {describe_count(run['num_tokens'])} tokens of {run['corpus']}, "
        f"{run['dtype']} on {run['device']}.\n{weights}"
        f"* the {'layer' if lowest == 1 else f'{lowest} layers'} with the lowest {SCORES['avss'].title}, "
        f"{LOWEST_SHARE:.0%} of {len(scores)}"
    )
    missing = why_no_interval(run["num_shards"] or 0)
    resampled = "; 'lowest 25%' is the share of resamples of the shards in which a layer is among them."
    text += f".\n{missing}" if missing else resampled
    if unranked := [s["layer"] for s in scores if s["rank"] is None and s["avss_smoothed"] is not None]:
        text += f"\nNaN or infinite activations in layers {describe_layers(unranked)}: they have no rank."
    if noisy:
        text += f"\n{noisy} of {len(scores)} layers have fewer than 100 near-zero elements: their sparsity is noise."
    depth = depth_correlation([s["avss_smoothed"] for s in scores])
    if abs(depth) > TRACKS_DEPTH:
        text += f"\nThis score tracks depth (Spearman {depth:z.3f}): it says little beyond the layer's position."
    return text


def quantiles_table(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Return a table of the quantiles of one run and site: a row for each layer, a column for each share."""
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    texts = {
        (row["layer"], row["share"]): f"{row['value']:.4g}"
        + (f" ({row['rms_multiple']:.3g} x RMS)" if row["rms_multiple"] else "")
        for row in rows
        if row["value"] is not None and not isnan(row["value"])
    }
    columns = [
        ReportColumn(f"|x| below which {share:.4g}", [texts.get((layer, share)) for layer in layers])
        for share in dict.fromkeys(row["share"] for row in rows)
    ]
    exact = all(row["low"] == row["high"] for row in rows if row["low"] is not None)
    return FittedTable(
        ReportTable(
            title=f"{rows[0]['run_id']}  {rows[0]['site']}",
            columns=[ReportColumn("layer", layers), *columns],
            caption="Every one is exact: each value was counted."
            if exact
            else "The truth lies close by: --format csv has the edges between which it is.",
        )
    )


def shown_pairs(comparison: RankingComparison) -> pa.Table:
    """Return the pairs of a comparison that a terminal shows: of many, the most and the least alike."""
    pairs = comparison.pairs
    if len(pairs) <= SHOWN_PAIRS:
        return pairs
    half = SHOWN_PAIRS // 2
    return pa.concat_tables([pairs[:half], pairs[-half:]])


def comparison_tables(
    comparison: RankingComparison, title: str, labels: Mapping[str, str] | None = None, width: int = WIDTH
) -> RenderableType:
    """Return the tables of the pairs and of the groups of a comparison, with a summary.

    Args:
        labels: names of runs by id; by default their ids.
        width: cells of a line. Names of a pair that leave no room for its numbers are one below the other.
    """
    from avss_dist.analysis.comparison import MAX_PAIRS

    ends = shown_pairs(comparison)
    rows, groups = ends.to_pylist(), comparison.groups.to_pylist()
    column = partial(column_of, rows)
    sides = [_sides(row, labels or {}) for row in rows]
    names = ["run", "a", "b"] if all(len(side) == 3 for side in sides) else ["a", "b"]
    if max((sum(map(cell_len, side)) for side in sides), default=0) > width - NUMBERS_WIDTH:
        names, sides = [", ".join(names)], [("\n".join(side),) for side in sides]
    layers = [f"{'~' if row['interpolated'] else ''}{row['layers']}" for row in rows]
    columns = [
        *(ReportColumn(name, [side[i] for side in sides], number=False) for i, name in enumerate(names)),
        ReportColumn("layers", layers, priority=5),
        column("Spearman", "spearman", "{:z.3f}".format),
        column("given depth", "given_depth", "{:z.3f}".format, 1),
        ReportColumn(
            "shared lowest",
            [f"{row['shared']} of {row['k']}" for row in rows],
            meaning="layers that are among the lowest of both",
            priority=1,
        ),
        replace(
            column("Jaccard", "jaccard", "{:z.2f}".format, 3),
            meaning="the shared lowest layers over those that are lowest in one or in both",
        ),
        replace(column("by chance", "jaccard_by_chance", "{:z.2f}".format, 7), meaning="the Jaccard of random sets"),
        replace(
            column("p", "p_by_chance", "{:z.2g}".format, 2), meaning="the probability that random sets share as many"
        ),
    ]
    parts: list[RenderableType] = [FittedTable(ReportTable(columns=columns, title=title)), Text(summary(comparison))]
    if hidden := comparison.number - len(ends):
        listed = ": --format csv" if comparison.number <= MAX_PAIRS else ""
        parts.append(Text(f"{hidden:,} pairs between the most and the least alike are not shown{listed}."))
    if pc.any(comparison.pairs["interpolated"]).as_py():
        parts.append(Text("~ models of different depth, compared at the relative depths of the one with fewer layers."))
    if comparison.odd:
        parts.append(Text(comparison.odd))
    if len(groups) > 1:
        by = groups[0]["by"]
        columns = [
            ReportColumn(f"a {by}", [row["a"] for row in groups], number=False),
            ReportColumn("and", [row["b"] if row["b"] != row["a"] else "itself" for row in groups], number=False),
            ReportColumn("pairs", [row["pairs"] for row in groups], "{:,}".format, priority=2),
            ReportColumn("Spearman", [row["spearman"] for row in groups], "{:z.3f}".format),
            ReportColumn("given depth", [row["given_depth"] for row in groups], "{:z.3f}".format, priority=1),
        ]
        parts.append(FittedTable(ReportTable(columns=columns, title=f"Mean correlation of models by {by}")))
    return Group(*parts)


def _sides(row: Mapping[str, Any], labels: Mapping[str, str]) -> tuple[str, ...]:
    """Return the names of a pair: the run and its two readings, or its two runs with the values that differ."""
    run, other = (labels.get(row[name], row[name]) for name in ("a_run_id", "b_run_id"))
    if row["a_run_id"] == row["b_run_id"]:
        return run, row["a"], row["b"]
    if row["by"] == "run":
        return run, other
    return _with_value(run, short_name(row["a"])), _with_value(other, short_name(row["b"]))


def _with_value(label: str, value: str) -> str:
    """Return the name of a run with a value of it, unless the name has it."""
    return label if value in label else f"{label} ({value})"


def short_name(text: str) -> str:
    """Return the last part of a local path, and any other name, such as a hub id, unchanged."""
    return basename(text) if text.startswith(("/", "./", "../", "~")) else text


def summary(comparison: RankingComparison) -> str:
    """Return a line on the correlations of all pairs, and one on shared lowest layers if all are listed."""
    rho, given_depth, pairs = comparison.spearman, comparison.given_depth, comparison.pairs
    layers, k, shared = (pairs[name].to_numpy() for name in ("layers", "k", "shared"))
    correlations = "no Spearman correlation is defined"
    if rho.count:
        span = f", from {rho.lowest:z.3f} to {rho.highest:z.3f}" if rho.count > 1 else ""
        beyond_depth = "nothing is left, as one of each pair is the order of the layers"
        if given_depth.count:
            beyond_depth = f"(a partial correlation) {_median(given_depth)}"
        correlations = f"Spearman {_median(rho)}{span}; given depth {beyond_depth}: {_verdict(rho, given_depth)}"
    lines = [f"{f'{comparison.number:,} pairs' if comparison.number > 1 else 'One pair'}: {correlations}."]
    if len(pairs) == comparison.number:
        lines.append(
            f"{shared.sum() / k.sum():.0%} of the lowest layers of one are the lowest of the other; by chance it would "
            f"be {(k * k / layers).sum() / k.sum():.0%}."
        )
    return "\n".join(lines)


def _median(rho: CorrelationSummary) -> str:
    return f"{rho.median:z.3f}{' at the median' if rho.count > 1 else ''}"


def _verdict(rho: CorrelationSummary, given_depth: CorrelationSummary) -> str:
    """Return one verdict on the correlations of rankings and those given depth."""
    beyond_depth = given_depth.median if given_depth.count else 0.0
    if rho.median > ALIKE and beyond_depth <= RELATED:
        return "the rankings agree only because both follow depth"
    if rho.median <= RELATED and beyond_depth > ALIKE:
        return "the rankings differ only in how they follow depth"
    if rho.lowest > NEARLY_SAME:
        strength = "the rankings are nearly the same"
    elif rho.median > ALIKE:
        strength = "the rankings are alike" + ("" if rho.lowest > 0.5 else ", but not in every pair")
    elif rho.median > RELATED:
        strength = "the rankings have something in common"
    else:
        strength = (
            "the rankings are the other way round" if rho.median <= -RELATED else "the rankings have little in common"
        )
    due_to_depth = rho.median > RELATED and rho.median - beyond_depth > DUE_TO_DEPTH
    return f"{strength}, in part because both follow depth" if due_to_depth else strength


def findings_list(findings: pa.Table) -> RenderableType:
    """Return findings of `findings.SCHEMA` in order. If many differ only in the run, the first stands for all."""
    places: dict[tuple[str, ...], dict[str, list[str]]] = {}  # the runs of each message
    merged = grouped(findings.to_pylist(), itemgetter("severity", "kind", "site", "message"))
    for (*place, message), rows in merged.items():
        recipes = dict.fromkeys(row["recipe"] for row in rows if row["recipe"])
        run_ids = dict.fromkeys(row["run_id"] for row in rows if row["run_id"])
        places.setdefault((*place, ", ".join(recipes)), {})[message] = [*run_ids]
    lines: list[RenderableType] = []
    for (severity, kind, site, of_recipes), messages in places.items():
        where = " / ".join(part for part in (site, of_recipes) if part)
        lines.append(Text.assemble((f"{severity}: {kind.replace('_', ' ')}", COLOR[severity]), f"  {where}"))
        if len(messages) > FEW:
            alike = list(dict.fromkeys(run for runs in messages.values() for run in runs))
            messages = {f"of {alike[0]}: {next(iter(messages))}": alike}
        for message, runs in messages.items():
            named = f"{first_names(runs, FEW)}: {message}" if runs else message
            lines.append(Padding(Text(named), (0, 0, 0, 2), expand=False))
    if any(len(messages) > FEW for messages in places.values()):
        lines.append(Text("Of many, the first stands for all: avss findings --format csv has each."))
    return Group(*lines) if lines else Text("Nothing to warn of.")
