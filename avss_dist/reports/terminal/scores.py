"""Scores of layers, quantiles of their values, agreement of runs, and findings, for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

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
    ReportRow,
    ReportTable,
    interval,
    known_interval,
)
from avss_dist.analysis.thresholds import INTERPOLATED
from avss_dist.core.errors import first_names
from avss_dist.core.streams import WIDTH
from avss_dist.core.text import basename, describe_count, describe_layers
from avss_dist.core.thresholds import describe_threshold
from avss_dist.core.values import NewRow, TableRow
from avss_dist.reports.terminal.tables import FittedTable
from avss_dist.stats.catalog import LOWEST_SHARE, SCORES
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

# Correlations above which rankings are called so.
NEARLY_SAME = 0.9
ALIKE = 0.7
RELATED = 0.3
ALIKE_IN_EVERY_PAIR = 0.5  # the lowest correlation above which rankings are alike without a restriction
DUE_TO_DEPTH = 0.2  # difference to the correlation given depth, above which depth is named as a reason
COLOR = {"warning": "yellow", "note": "dim"}

_NUMBER = "{:z.4g}".format
_COEFFICIENT = "{:z.3f}".format
_LAYER_COLUMNS: Sequence[ReportColumn | BarColumn] = (
    ReportColumn("layer", "layer"),
    BarColumn(key="avss_smoothed"),
    ReportColumn(SCORES["avss"].title, "avss_smoothed", _NUMBER),
    ReportColumn("95% interval", "interval", interval(_NUMBER, " .. "), priority=4),
    ReportColumn("rank", "rank"),
    ReportColumn("lowest 25%", "lowest_set_probability", "{:z.0%}".format, priority=3),
    ReportColumn("variance", "variance", _NUMBER, priority=6),
    ReportColumn("near zero", "near_zero_count", "{:,.0f}".format, priority=5),
    ReportColumn("block influence", "block_influence", _NUMBER, priority=2),
)
_NEED_SHARDS = ("interval", "lowest_set_probability")
"""Keys of the columns that a run of too few shards does not have."""
_PAIR_COLUMNS = (
    ReportColumn("layers", "layers", priority=5),
    ReportColumn("Spearman", "spearman", _COEFFICIENT),
    ReportColumn("given depth", "given_depth", _COEFFICIENT, priority=1),
    ReportColumn("shared lowest", "shared_lowest", meaning="layers that are among the lowest of both", priority=1),
    ReportColumn(
        "Jaccard",
        "jaccard",
        "{:z.2f}".format,
        meaning="the shared lowest layers over those that are lowest in one or in both",
        priority=3,
    ),
    ReportColumn("by chance", "jaccard_by_chance", "{:z.2f}".format, meaning="the Jaccard of random sets", priority=7),
    ReportColumn(
        "p", "p_by_chance", "{:z.2g}".format, meaning="the probability that random sets share as many", priority=2
    ),
)
_GROUP_COLUMNS = (
    ReportColumn("and", "other", number=False),
    ReportColumn("pairs", "pairs", "{:,}".format, priority=2),
    ReportColumn("Spearman", "spearman", _COEFFICIENT),
    ReportColumn("given depth", "given_depth", _COEFFICIENT, priority=1),
)


def layer_table(run: TableRow, scores: Sequence[TableRow], own: Sequence[str] = ()) -> RenderableType:
    """Return a table with a row for each layer: smoothed AVSS, its rank and certainty, block influence.

    Args:
        run: a row of ``runs``.
        scores: rows of ``scores`` of one site, recipe and threshold.
        own: names of the scores that people bring, which are columns of the rows.
    """
    columns = list(_LAYER_COLUMNS)
    if why_no_interval(run["num_shards"] or 0) is not None:
        columns = [column for column in columns if column.key not in _NEED_SHARDS]
    columns += [ReportColumn(name, name, _NUMBER, priority=1) for name in own]
    first_layer = scores[0]
    threshold = describe_threshold(first_layer["threshold"], first_layer["threshold_kind"])
    num_lowest = count_lowest(len(scores))
    table = ReportTable(
        columns=columns,
        rows=[_layer_row(score, num_lowest) for score in scores],
        title=f"{run['model']}  {first_layer['site']} / {first_layer['recipe']} / |x| < {threshold}",
        caption=_caption(run, scores, num_lowest),
        mark="lowest",
    )
    notes = [Text(f"note: {note}", style="yellow") for note in run["notes"] or []]
    return Group(FittedTable(table), *notes)


def _layer_row(score: TableRow, num_lowest: int) -> ReportRow:
    """Return the row of a layer, which is marked if it is one of the lowest."""
    values = {**score, "interval": known_interval(score["avss_low"], score["avss_high"])}
    is_lowest = score["rank"] is not None and score["rank"] <= num_lowest
    return ReportRow(values, is_marked=is_lowest)


def describe_exactness(scores: Sequence[TableRow]) -> Iterator[str]:
    """Yield a sentence on the error of interpolated near-zero counts and the nearest exact ones, if any."""
    inexact = [score for score in scores if score["exactness"] == INTERPOLATED]
    if not inexact:
        return
    largest_error = max(_count_error(score) for score in inexact if score["near_zero_count"])
    sentence = (
        f"{len(inexact)} of {len(scores)} near-zero counts are interpolated from stored counts, and off by "
        f"{largest_error:.0%} at the very most."
    )
    if scores[0]["threshold_kind"] == "absolute":
        low, high = bin_edges(scores[0]["threshold"])
        sentence += f" Exact: {low:.10g} and {high:.10g}."
    yield sentence


def _count_error(score: TableRow) -> float:
    """Return the largest possible error of a near-zero count, as a share of it."""
    count = score["near_zero_count"]
    too_many = count - score["near_zero_low"]
    too_few = score["near_zero_high"] - count
    error: float = max(too_many, too_few) / count
    return error


def _caption(run: TableRow, scores: Sequence[TableRow], num_lowest: int) -> str:
    """Return the explanation of a table of layers: the measurement, the marks, and what makes it less certain."""
    caption = (
        f"{run['run_id']}: {describe_count(run['num_tokens'])} tokens of {run['corpus']}, "
        f"{run['dtype']} on {run['device']}.\n"
    )
    if run.get("quantization"):
        caption += f"Weights: {run['quantization']}"
        if run.get("quantized_modules"):
            caption += f", computed by {run['quantized_modules']}"
        caption += ".\n"
    layers = "layer" if num_lowest == 1 else f"{num_lowest} layers"
    caption += f"* the {layers} with the lowest {SCORES['avss'].title}, {LOWEST_SHARE:.0%} of {len(scores)}"
    missing = why_no_interval(run["num_shards"] or 0)
    if missing is not None:
        caption += f".\n{missing}"
    else:
        caption += "; 'lowest 25%' is the share of resamples of the shards in which a layer is among them."
    unranked = []
    for score in scores:
        if score["rank"] is None and score["avss_smoothed"] is not None:
            unranked.append(score["layer"])
    if unranked:
        caption += f"\nNaN or infinite activations in layers {describe_layers(unranked)}: they have no rank."
    noisy = [score for score in scores if score["quality"] != "ok"]
    if noisy:
        caption += (
            f"\n{len(noisy)} of {len(scores)} layers have fewer than 100 near-zero elements: their sparsity is noise."
        )
    depth = depth_correlation([score["avss_smoothed"] for score in scores])
    if abs(depth) > TRACKS_DEPTH:
        caption += f"\nThis score tracks depth (Spearman {depth:z.3f}): it says little beyond the layer's position."
    return caption


def quantiles_table(rows: Sequence[TableRow]) -> RenderableType:
    """Return a table of the quantiles of one run and site: a row for each layer, a column for each share."""
    columns = [ReportColumn("layer", "layer")]
    for share in dict.fromkeys(row["share"] for row in rows):
        columns.append(ReportColumn(f"|x| below which {share:.4g}", str(share)))
    caption = "Every one is exact: each value was counted."
    if not all(row["low"] == row["high"] for row in rows if row["low"] is not None):
        caption = "The truth lies close by: --format csv has the edges between which it is."
    by_layer = grouped(rows, itemgetter("layer"))
    table = ReportTable(
        title=f"{rows[0]['run_id']}  {rows[0]['site']}",
        columns=columns,
        rows=[_quantiles_row(layer, quantiles) for layer, quantiles in by_layer.items()],
        caption=caption,
    )
    return FittedTable(table)


def _quantiles_row(layer: int, quantiles: Sequence[TableRow]) -> ReportRow:
    """Return the row of a layer, given its quantile of each share."""
    values: NewRow = {"layer": layer}
    for quantile in quantiles:
        values[str(quantile["share"])] = _describe_quantile(quantile)
    return ReportRow(values)


def _describe_quantile(quantile: TableRow) -> str | None:
    """Return the value of a quantile, and how often it is the root mean square. None if there is no value."""
    if quantile["value"] is None or isnan(quantile["value"]):
        return None
    text = f"{quantile['value']:.4g}"
    if quantile["rms_multiple"]:
        text += f" ({quantile['rms_multiple']:.3g} x RMS)"
    return text


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

    pairs = shown_pairs(comparison).to_pylist()
    parts: list[RenderableType] = [
        FittedTable(_pairs_table(pairs, title, labels or {}, width)),
        Text(summary(comparison)),
    ]
    hidden = comparison.number - len(pairs)
    if hidden:
        listed = ": --format csv" if comparison.number <= MAX_PAIRS else ""
        parts.append(Text(f"{hidden:,} pairs between the most and the least alike are not shown{listed}."))
    if pc.any(comparison.pairs["interpolated"]).as_py():
        parts.append(Text("~ models of different depth, compared at the relative depths of the one with fewer layers."))
    if comparison.odd:
        parts.append(Text(comparison.odd))
    if len(comparison.groups) > 1:
        parts.append(FittedTable(_groups_table(comparison.groups.to_pylist())))
    return Group(*parts)


def _pairs_table(pairs: Sequence[TableRow], title: str, labels: Mapping[str, str], width: int) -> ReportTable:
    """Return the table of pairs.

    Args:
        labels, width: see `comparison_tables`.
    """
    names = [_PairNames.of(pair, labels) for pair in pairs]
    headings = ["a", "b"]
    if all(name.run for name in names):
        headings = ["run", "a", "b"]
    widest = max((name.width for name in names), default=0)
    if widest > width - NUMBERS_WIDTH:
        name_columns = [ReportColumn(", ".join(headings), "names", number=False)]
    else:
        name_columns = [ReportColumn(heading, heading, number=False) for heading in headings]
    rows = [_pair_row(pair, name) for pair, name in zip(pairs, names, strict=True)]
    return ReportTable(columns=[*name_columns, *_PAIR_COLUMNS], rows=rows, title=title)


def _pair_row(pair: TableRow, names: _PairNames) -> ReportRow:
    """Return the row of a pair."""
    values = dict(pair)
    values["run"] = names.run
    values["a"] = names.a
    values["b"] = names.b
    values["names"] = "\n".join(names.parts)
    values["layers"] = f"~{pair['layers']}" if pair["interpolated"] else str(pair["layers"])
    values["shared_lowest"] = f"{pair['shared']} of {pair['k']}"
    return ReportRow(values)


def _groups_table(groups: Sequence[TableRow]) -> ReportTable:
    """Return the table of the mean correlations within and between groups."""
    by = groups[0]["by"]
    rows = []
    for group in groups:
        other = "itself" if group["a"] == group["b"] else group["b"]
        rows.append(ReportRow({**group, "other": other}))
    return ReportTable(
        columns=[ReportColumn(f"a {by}", "a", number=False), *_GROUP_COLUMNS],
        rows=rows,
        title=f"Mean correlation of models by {by}",
    )


@dataclass(frozen=True)
class _PairNames:
    """Names of a pair.

    Attributes:
        run: the run whose two readings are compared; empty if two runs are.
        a, b: the readings, or the runs with the values in which they differ.
    """

    run: str
    a: str
    b: str

    @classmethod
    def of(cls, pair: TableRow, labels: Mapping[str, str]) -> _PairNames:
        """Return the names of a pair.

        Args:
            labels: names of runs by id.
        """
        a_run = labels.get(pair["a_run_id"], pair["a_run_id"])
        b_run = labels.get(pair["b_run_id"], pair["b_run_id"])
        if pair["a_run_id"] == pair["b_run_id"]:
            return cls(a_run, pair["a"], pair["b"])
        if pair["by"] == "run":
            return cls("", a_run, b_run)
        return cls("", _with_value(a_run, short_name(pair["a"])), _with_value(b_run, short_name(pair["b"])))

    @property
    def parts(self) -> list[str]:
        """The names that are not empty."""
        return [self.run, self.a, self.b] if self.run else [self.a, self.b]

    @property
    def width(self) -> int:
        """Cells that the names take beside each other."""
        return sum(cell_len(part) for part in self.parts)


def _with_value(label: str, value: str) -> str:
    """Return the name of a run with a value of it, unless the name has it."""
    return label if value in label else f"{label} ({value})"


def short_name(text: str) -> str:
    """Return the last part of a local path, and any other name, such as a hub id, unchanged."""
    return basename(text) if text.startswith(("/", "./", "../", "~")) else text


def summary(comparison: RankingComparison) -> str:
    """Return a line on the correlations of all pairs, and one on shared lowest layers if all are listed."""
    rho = comparison.spearman
    pairs = "One pair"
    if comparison.number > 1:
        pairs = f"{comparison.number:,} pairs"
    correlations = "no Spearman correlation is defined"
    if rho.count:
        correlations = _describe_correlations(rho, comparison.given_depth)
    lines = f"{pairs}: {correlations}."
    if len(comparison.pairs) == comparison.number:
        lines += f"\n{_describe_shared(comparison.pairs)}"
    return lines


def _describe_correlations(rho: CorrelationSummary, given_depth: CorrelationSummary) -> str:
    """Return the correlations of rankings, those given depth, and a verdict, in words."""
    span = ""
    if rho.count > 1:
        span = f", from {rho.lowest:z.3f} to {rho.highest:z.3f}"
    beyond_depth = "nothing is left, as one of each pair is the order of the layers"
    if given_depth.count:
        beyond_depth = f"(a partial correlation) {_median(given_depth)}"
    return f"Spearman {_median(rho)}{span}; given depth {beyond_depth}: {_verdict(rho, given_depth)}"


def _describe_shared(pairs: pa.Table) -> str:
    """Return a sentence on the share of the lowest layers that are lowest in both of a pair, and that by chance."""
    layers = pairs["layers"].to_numpy()
    lowest = pairs["k"].to_numpy()
    shared = pairs["shared"].to_numpy()
    by_chance = (lowest * lowest / layers).sum()
    return (
        f"{shared.sum() / lowest.sum():.0%} of the lowest layers of one are the lowest of the other; by chance it "
        f"would be {by_chance / lowest.sum():.0%}."
    )


def _median(rho: CorrelationSummary) -> str:
    if rho.count > 1:
        return f"{rho.median:z.3f} at the median"
    return f"{rho.median:z.3f}"


def _verdict(rho: CorrelationSummary, given_depth: CorrelationSummary) -> str:
    """Return one verdict on the correlations of rankings and those given depth."""
    beyond_depth = given_depth.median if given_depth.count else 0.0
    if rho.median > ALIKE and beyond_depth <= RELATED:
        return "the rankings agree only because both follow depth"
    if rho.median <= RELATED and beyond_depth > ALIKE:
        return "the rankings differ only in how they follow depth"
    verdict = _describe_strength(rho)
    if rho.median > RELATED and rho.median - beyond_depth > DUE_TO_DEPTH:
        verdict += ", in part because both follow depth"
    return verdict


def _describe_strength(rho: CorrelationSummary) -> str:
    """Return how much rankings have in common, in words."""
    if rho.lowest > NEARLY_SAME:
        return "the rankings are nearly the same"
    if rho.median > ALIKE and rho.lowest > ALIKE_IN_EVERY_PAIR:
        return "the rankings are alike"
    if rho.median > ALIKE:
        return "the rankings are alike, but not in every pair"
    if rho.median > RELATED:
        return "the rankings have something in common"
    if rho.median > -RELATED:
        return "the rankings have little in common"
    return "the rankings are the other way round"


class _Place(NamedTuple):
    """Subject of findings that are listed together, and their severity."""

    severity: str
    kind: str
    site: str | None
    recipes: str


def findings_list(findings: pa.Table) -> RenderableType:
    """Return findings of `findings.SCHEMA` in order. If many differ only in the run, the first stands for all."""
    lines: list[RenderableType] = []
    some_are_hidden = False
    for place, runs_by_message in _findings_by_place(findings.to_pylist()).items():
        where = " / ".join(part for part in (place.site, place.recipes) if part)
        title = f"{place.severity}: {place.kind.replace('_', ' ')}"
        lines.append(Text.assemble((title, COLOR[place.severity]), f"  {where}"))
        if len(runs_by_message) > FEW:
            some_are_hidden = True
            runs_by_message = _first_for_all(runs_by_message)
        for message, runs in runs_by_message.items():
            line = f"{first_names(runs, FEW)}: {message}" if runs else message
            lines.append(Padding(Text(line), (0, 0, 0, 2), expand=False))
    if some_are_hidden:
        lines.append(Text("Of many, the first stands for all: avss findings --format csv has each."))
    if not lines:
        lines.append(Text("Nothing to warn of."))
    return Group(*lines)


def _findings_by_place(findings: Sequence[TableRow]) -> dict[_Place, dict[str, list[str]]]:
    """Return the ids of the runs of each message, by what the message is about. Recipes with one message share it."""
    places: dict[_Place, dict[str, list[str]]] = {}
    same_message = grouped(findings, itemgetter("severity", "kind", "site", "message"))
    for (severity, kind, site, message), rows in same_message.items():
        recipes = dict.fromkeys(row["recipe"] for row in rows if row["recipe"])
        run_ids = dict.fromkeys(row["run_id"] for row in rows if row["run_id"])
        place = _Place(severity, kind, site, ", ".join(recipes))
        places.setdefault(place, {})[message] = list(run_ids)
    return places


def _first_for_all(runs_by_message: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return the first message, named as that of the first run, with the runs of all messages."""
    all_runs: dict[str, None] = {}
    for runs in runs_by_message.values():
        all_runs |= dict.fromkeys(runs)
    run_ids = list(all_runs)
    first_message = next(iter(runs_by_message))
    return {f"of {run_ids[0]}: {first_message}": run_ids}
