"""Tables and sentences on comparisons and findings, for the terminal."""

from __future__ import annotations

from functools import partial

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from avss_dist.analysis.agreement import CorrelationSummary
from avss_dist.analysis.comparison import MAX_PAIRS as MAX_LISTED
from avss_dist.analysis.comparison import RankingComparison
from avss_dist.analysis.section import ReportColumn, ReportTable, column_of
from avss_dist.core.text import basename
from avss_dist.reports.terminal.tables import FittedTable

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
    rows, groups = ends.to_pylist(), comparison.groups.to_pylist()

    column = partial(column_of, rows)
    one_run = all(row["a_run_id"] == row["b_run_id"] for row in rows)
    names, labels = ["run", "a", "b"] if one_run else ["a", "b"], []
    for row in rows:
        label = [row["a"], row["b"]]
        if one_run:
            label = [row["a_run_id"], *label]
        elif row["by"] != "run":
            label = [f"{short_name(row[side])}\n{row[f'{side}_run_id']}" for side in "ab"]
        labels.append(label)
    if max((sum(map(len, label)) for label in labels), default=0) > WIDEST_LABELS:  # lines of one column
        names, labels = [", ".join(names)], [["\n".join(label)] for label in labels]
    layers = [f"{'~' if row['interpolated'] else ''}{row['layers']}" for row in rows]
    columns = [
        *(ReportColumn(name, [label[i] for label in labels], number=False) for i, name in enumerate(names)),
        ReportColumn("layers", layers, priority=5),
        column("Spearman", "spearman", "{:z.3f}".format),
        column("given depth", "given_depth", "{:z.3f}".format, 1),
        ReportColumn("shared lowest", [f"{row['shared']} of {row['k']}" for row in rows], priority=1),
        column("Jaccard", "jaccard", "{:z.2f}".format, 3),
        column("by chance", "jaccard_by_chance", "{:z.2f}".format, 7),
        column("p", "p_by_chance", "{:z.2g}".format, 2),
    ]
    parts: list[RenderableType] = [FittedTable(ReportTable(columns=columns, title=title)), Text(summary(comparison))]
    if hidden := comparison.number - len(ends):
        listed = ": --format csv" if comparison.number <= MAX_LISTED else ""
        parts.append(Text(f"{hidden:,} pairs between the most and the least alike are not shown{listed}."))
    if pc.any(pairs["interpolated"]).as_py():
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
        given = "nothing is left, as one of each pair is the order of the layers"
        if given_depth.count:
            given = f"(a partial correlation) {_median(given_depth)}"
        correlations = f"Spearman {_median(rho)}{span}; given depth {given}: {_verdict(rho, given_depth)}"
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
    merged: dict[tuple[str, ...], tuple[list[str], list[str]]] = {}  # runs and recipes of a message
    for row in findings.to_pylist():
        key = (row["severity"], row["kind"], row["site"] or "", row["message"])
        for names, name in zip(merged.setdefault(key, ([], [])), (row["run_id"], row["recipe"]), strict=True):
            if name and name not in names:
                names.append(name)
    places: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for (*place, message), (runs, recipes) in merged.items():
        places.setdefault((*place, ", ".join(recipes)), {})[message] = runs
    lines: list[RenderableType] = []
    for (severity, kind, site, of_recipes), messages in places.items():
        where = " / ".join(part for part in (site, of_recipes) if part)
        heading = Text.assemble((f"{severity}: {kind.replace('_', ' ')}", COLOR[severity]), f"  {where}")
        if len(messages) > FEW:
            alike = list(dict.fromkeys(run for runs in messages.values() for run in runs))
            messages = {f"{alike[0]}: {next(iter(messages))}": alike}
        for message, runs in messages.items():
            more = [f"and {len(runs) - FEW} more"] if len(runs) > FEW else []
            lines += [heading, Padding(Text("\n".join([*runs[:FEW], *more, message])), (0, 0, 0, 2), expand=False)]
    if any(len(messages) > FEW for messages in places.values()):
        lines.append(Text("Of many, the first stands for all: avss findings --format csv has each."))
    return Group(*lines) if lines else Text("Nothing to warn of.")
