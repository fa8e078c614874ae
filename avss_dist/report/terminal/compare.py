"""Tables and sentences on comparisons, findings and quantiles, for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from avss_dist.analysis.agreement import CorrelationSummary
from avss_dist.analysis.compare import MAX_PAIRS as MAX_LISTED
from avss_dist.analysis.compare import RankingComparison
from avss_dist.core.text import basename
from avss_dist.report.section import ReportColumn, ReportTable, decimals, significant
from avss_dist.report.terminal.tables import FittedTable

MAX_PAIRS = 40  # shown on a terminal
WIDEST_LABELS = 36  # beside each other; longer ones are one below the other
FEW = 3  # runs that a finding names, and messages of one kind, before they are only counted
NEARLY_SAME, ALIKE, RELATED = 0.9, 0.7, 0.3  # correlations above which rankings are called so
DUE_TO_DEPTH = 0.2  # difference to the correlation given depth, above which depth is named as a reason
COLOR = {"warning": "yellow", "note": "dim"}


def comparison_tables(comparison: RankingComparison, title: str) -> RenderableType:
    """Return the tables of the pairs and of the groups of a comparison, with a summary.

    Of many pairs, the most and the least alike are shown.
    """
    pairs, half = comparison.pairs, MAX_PAIRS // 2
    ends = pairs if len(pairs) <= MAX_PAIRS else pa.concat_tables([pairs[:half], pairs[-half:]])
    chosen = ends.to_pylist()
    table = FittedTable(ReportTable(columns=[*_label_columns(chosen), *_agreement_columns(chosen)], title=title))
    notes = [Text(summary(comparison))]
    if hidden := comparison.number - len(ends):
        listed = ": --format csv" if comparison.number <= MAX_LISTED else ""
        notes.append(Text(f"{hidden:,} pairs between the most and the least alike are not shown{listed}."))
    if pc.any(pairs["interpolated"]).as_py():
        notes.append(Text("~ models of different depth, compared at the relative depths of the one with fewer layers."))
    if comparison.odd:
        notes.append(Text(comparison.odd))
    groups = [groups_table(comparison.groups)] if len(comparison.groups) > 1 else []
    return Group(table, *notes, *groups)


def groups_table(groups: pa.Table) -> RenderableType:
    """Return a table of groups of `groups.SCHEMA`: mean correlations within and between them."""
    rows = groups.to_pylist()
    columns = [
        ReportColumn(f"a {rows[0]['by']}", [row["a"] for row in rows], number=False),
        ReportColumn("and", [row["b"] if row["b"] != row["a"] else "itself" for row in rows], number=False),
        ReportColumn("pairs", [row["pairs"] for row in rows], "{:,}".format, priority=2),
        ReportColumn("Spearman", [row["spearman"] for row in rows], decimals(3)),
        ReportColumn("given depth", [row["given_depth"] for row in rows], decimals(3), priority=1),
    ]
    return FittedTable(ReportTable(columns=columns, title=f"Mean correlation of models by {rows[0]['by']}"))


def _label_columns(rows: Sequence[Mapping[str, Any]]) -> list[ReportColumn]:
    """Return the columns that name the compared runs. Wide names are lines of one column."""
    one_run = all(row["a_run_id"] == row["b_run_id"] for row in rows)
    names = ["run", "a", "b"] if one_run else ["a", "b"]
    labels = [_labels(row, one_run) for row in rows]
    if max((sum(map(len, label)) for label in labels), default=0) > WIDEST_LABELS:
        names, labels = [", ".join(names)], [["\n".join(label)] for label in labels]
    return [ReportColumn(name, [label[i] for label in labels], number=False) for i, name in enumerate(names)]


def _labels(row: Mapping[str, Any], one_run: bool) -> list[str]:
    if one_run:
        return [row["a_run_id"], row["a"], row["b"]]
    if row["by"] == "run":
        return [row["a"], row["b"]]
    return [f"{short_name(row[side])}\n{row[f'{side}_run_id']}" for side in "ab"]


def short_name(text: str) -> str:
    """Return the last part of a local path, and any other name, such as a hub id, unchanged."""
    return basename(text) if text.startswith(("/", "./", "../", "~")) else text


def _agreement_columns(rows: Sequence[Mapping[str, Any]]) -> list[ReportColumn]:
    def column(heading: str, name: str, format_: Callable[[Any], str], priority: int) -> ReportColumn:
        return ReportColumn(heading, [row[name] for row in rows], format_, priority=priority)

    layers = [f"{'~' if row['interpolated'] else ''}{row['layers']}" for row in rows]
    shared = [f"{row['shared']} of {row['k']}" for row in rows]
    return [
        ReportColumn("layers", layers, priority=5),
        column("Spearman", "spearman", decimals(3), 0),
        column("given depth", "given_depth", decimals(3), 1),
        ReportColumn("shared lowest", shared, priority=1),
        column("Jaccard", "jaccard", decimals(2), 3),
        column("by chance", "jaccard_by_chance", decimals(2), 7),
        column("p", "p_by_chance", significant(2), 2),
    ]


def summary(comparison: RankingComparison) -> str:
    """Return a line on the correlations of all pairs, and one on shared lowest layers if all are listed."""
    rho, pairs = comparison.spearman, comparison.pairs
    layers, k, shared = (pairs[name].to_numpy() for name in ("layers", "k", "shared"))
    count = f"{comparison.number:,} pairs" if comparison.number > 1 else "One pair"
    lines = [f"{count}: {_correlations(rho, comparison.given_depth)}."]
    if len(pairs) == comparison.number:
        lines.append(
            f"{shared.sum() / k.sum():.0%} of the lowest layers of one are the lowest of the other; by chance it would "
            f"be {(k * k / layers).sum() / k.sum():.0%}."
        )
    return "\n".join(lines)


def _correlations(rho: CorrelationSummary, given_depth: CorrelationSummary) -> str:
    """Return the correlations of pairs, those given depth, and one verdict on both."""
    if not rho.count:
        return "no Spearman correlation is defined"
    span = f", from {rho.lowest:z.3f} to {rho.highest:z.3f}" if rho.count > 1 else ""
    text = f"Spearman {_median(rho)}{span}"
    given = "nothing is left, as one of each pair is the order of the layers"
    if given_depth.count:
        given = f"(a partial correlation) {_median(given_depth)}"
    return f"{text}; given depth {given}: {_verdict(rho, given_depth)}"


def _median(rho: CorrelationSummary) -> str:
    return f"{rho.median:z.3f}{' at the median' if rho.count > 1 else ''}"


def _verdict(rho: CorrelationSummary, given_depth: CorrelationSummary) -> str:
    """Return one verdict on the correlations of rankings and those given depth."""
    beyond_depth = given_depth.median if given_depth.count else 0.0
    if rho.median > ALIKE and beyond_depth <= RELATED:
        return "the rankings agree only because both follow depth"
    if rho.median > RELATED and rho.median - beyond_depth > DUE_TO_DEPTH:
        return f"{_strength(rho)}, in part because both follow depth"
    if rho.median <= RELATED and beyond_depth > ALIKE:
        return "the rankings differ only in how they follow depth"
    return _strength(rho)


def _strength(rho: CorrelationSummary) -> str:
    if rho.lowest > NEARLY_SAME:
        return "the rankings are nearly the same"
    if rho.median > ALIKE:
        return "the rankings are alike" + ("" if rho.lowest > 0.5 else ", but not in every pair")
    if rho.median > RELATED:
        return "the rankings have something in common"
    return "the rankings have little in common" if rho.median > -RELATED else "the rankings are the other way round"


def findings_list(findings: pa.Table) -> RenderableType:
    """Return findings of `findings.SCHEMA` in order. If many differ only in the run, the first stands for all."""
    places = _by_place(findings)
    if not places:
        return Text("Nothing to warn of.")
    lines: list[RenderableType] = []
    for (severity, kind, site, recipes), messages in places.items():
        where = " / ".join(part for part in (site, recipes) if part)
        heading = Text.assemble((f"{severity}: {kind.replace('_', ' ')}", COLOR[severity]), f"  {where}")
        if len(messages) > FEW:
            alike = list(dict.fromkeys(run for runs in messages.values() for run in runs))
            messages = {f"{alike[0]}: {next(iter(messages))}": alike}
        for message, runs in messages.items():
            more = [f"and {len(runs) - FEW} more"] if len(runs) > FEW else []
            below = Text("\n".join([*runs[:FEW], *more, message]))
            lines += [heading, Padding(below, (0, 0, 0, 2), expand=False)]
    if any(len(messages) > FEW for messages in places.values()):
        lines.append(Text("Of many, the first stands for all: avss findings --format csv has each."))
    return Group(*lines)


def _by_place(findings: pa.Table) -> dict[tuple[str, ...], dict[str, list[str]]]:
    """Return runs by message, by (severity, kind, site, recipes). Recipes with the same message are merged."""
    merged: dict[tuple[str, ...], tuple[list[str], list[str]]] = {}
    for row in findings.to_pylist():
        key = (row["severity"], row["kind"], row["site"] or "", row["message"])
        for names, name in zip(merged.setdefault(key, ([], [])), (row["run_id"], row["recipe"]), strict=True):
            if name and name not in names:
                names.append(name)
    places: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for (*place, message), (runs, recipes) in merged.items():
        places.setdefault((*place, ", ".join(recipes)), {})[message] = runs
    return places


def quantiles_table(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Return a table of the quantiles of one run and site: a row for each layer, a column for each share."""
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    by_place = {(row["layer"], row["share"]): row for row in rows}
    columns = [
        ReportColumn(
            f"|x| below which {share:.4g}", [_defined(by_place.get((layer, share))) for layer in layers], _quantile
        )
        for share in dict.fromkeys(row["share"] for row in rows)
    ]
    exact = all(row["low"] == row["high"] for row in rows if row["low"] is not None)
    inexact = "The truth lies close by: --format csv has the edges between which it is."
    table = ReportTable(
        title=f"{rows[0]['run_id']}  {rows[0]['site']}",
        columns=[ReportColumn("layer", layers), *columns],
        caption="Every one is exact: each value was counted." if exact else inexact,
    )
    return FittedTable(table)


def _defined(row: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    return None if row is None or row["value"] is None or np.isnan(row["value"]) else row


def _quantile(row: Mapping[str, Any]) -> str:
    multiple = row["rms_multiple"]
    return f"{row['value']:.4g}" + (f" ({multiple:.3g} x RMS)" if multiple else "")
