"""Tables of what was evaluated: models without layers, single layers, rounded weights, and rounds of a search."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from avss_dist.analysis.verdict import metric_format, readable_value
from avss_dist.core.intervention import PARTS, count_removed, describe_removed
from avss_dist.core.names import LOSS
from avss_dist.core.registry import metrics_of
from avss_dist.core.text import count_of, describe_count, printable
from avss_dist.reports.section import (
    BarColumn,
    ReportColumn,
    ReportTable,
    decimals,
    known_interval,
    percent,
    significant,
)
from avss_dist.reports.terminal.tables import FittedTable
from avss_dist.stats.intervals import MINIMUM_UNITS
from avss_dist.stats.metrics import NO_INTERVAL
from avss_dist.stats.rankings import count_lowest

if TYPE_CHECKING:
    from avss_dist.evaluation.ablate import Ablation, Sensitivity
    from avss_dist.evaluation.evaluate import Evaluations
    from avss_dist.evaluation.search import SearchResult

(PROPAGATED,), (PREDICTED,) = metrics_of("propagated"), metrics_of("predicted")
_OF_LAYERS: Sequence[tuple[str, str, int, Callable[[dict[str, Any]], str]]] = (
    ("loss without", "loss", 4, lambda row: f"{row['loss']:z.4f}"),
    ("increase", "increase", 0, lambda row: _with_error(row["increase"], row["increase_stderr"])),
    ("attention alone", "attention", 1, lambda row: _with_error(row["attention"], row["attention_stderr"])),
    ("MLP alone", "mlp", 1, lambda row: _with_error(row["mlp"], row["mlp_stderr"])),
    ("Shapley", "shapley", 1, lambda row: f"{row['shapley']:z.4f}"),
    ("95% interval", "shapley_low", 3, lambda row: f"{row['shapley_low']:z.4f} .. {row['shapley_high']:z.4f}"),
    ("damage", "damage", 1, lambda row: f"{row['damage']:z.1f}"),
    ("predicted", PREDICTED, 2, lambda row: _with_error(row[PREDICTED], row["predicted_stderr"])),
    ("propagated", PROPAGATED, 2, lambda row: f"{row[PROPAGATED]:.4g}"),
    ("Taylor", "taylor", 2, lambda row: f"{row['taylor']:z.4g}"),
    ("gradient L1", "gradient_l1", 6, lambda row: f"{row['gradient_l1']:z.4g}"),
    ("gradient L2", "gradient_l2", 7, lambda row: f"{row['gradient_l2']:z.4g}"),
    ("weight norm", "weight_frobenius", 8, lambda row: f"{row['weight_frobenius']:z.4g}"),
)
"""Heading, column of `Ablation.table`, priority and format of each column."""


def evaluation_table(evaluations: Evaluations) -> RenderableType:
    """Return a table with a row for each subject and task, and the findings below. Losses are shown as perplexities."""
    caption = (
        "Retention: the metric without the layers over that with them (of a perplexity: with over without), "
        "and its 95% interval over the same samples."
    )
    if not all(one.retained.has_interval for one in evaluations if one.retained):
        caption = f"{caption} {NO_INTERVAL}"
    metrics = [one.result.metrics()[-1] for one in evaluations]
    errors = [error if math.isfinite(error) else None for *_, error in metrics]
    dropped = [one.subject.intervention.removed for one in evaluations]
    whole = [one.whole.metrics()[-1][1] if one.whole else None for one in evaluations]
    retained = [one.retained for one in evaluations]
    intervals = [retention and known_interval(retention.low, retention.high) for retention in retained]
    table = ReportTable(
        columns=[
            ReportColumn("", [one.subject.label for one in evaluations], number=False, wraps=True),
            ReportColumn("dropped", [count_removed(one) if one else None for one in dropped], number=False, priority=3),
            ReportColumn("task", [one.task for one in evaluations], number=False, wraps=True),
            ReportColumn("metric", [metric for metric, *_ in metrics], number=False),
            ReportColumn("value", [value for _, value, _ in metrics], significant(4)),
            ReportColumn("+/-", errors, significant(2), priority=4),
            ReportColumn("whole model", whole, significant(4), priority=2),
            ReportColumn("retention", [retention and retention.value for retention in retained], percent(1)),
            ReportColumn("95% interval", intervals, lambda ends: "{:z.1%} .. {:z.1%}".format(*ends), priority=1),
        ],
        caption=caption,
    )
    return Group(FittedTable(table), *(Text(printable(line)) for line in evaluations.findings))


def ablation_table(ablation: Ablation) -> FittedTable:
    """Return a table of the layers, with a bar of the first available measure. The least important are marked."""
    rows = ablation.table().to_pylist()
    drawn = ("increase", "shapley", "attention", "damage", "taylor")
    first = next(name for name in drawn if rows[0][name] is not None)
    lowest = sorted(rows, key=lambda row: row[first])[: count_lowest(len(rows))]
    marked = [row in lowest for row in rows]
    columns: list[ReportColumn | BarColumn] = [
        ReportColumn("layer", [row["layer"] for row in rows]),
        BarColumn(values=[row[first] for row in rows], marked=marked),
        *(
            ReportColumn(heading, rows, format_, priority=0 if name == first else priority)
            for heading, name, priority, format_ in _OF_LAYERS
            if rows[0][name] is not None
        ),
    ]
    number = count_lowest(len(ablation.layers))
    text = f"* the {'layer' if number == 1 else f'{number} layers'} with the lowest {first}. Losses, their increases "
    text += "and what is predicted of them are in nats per token."
    if any(rows[0][part] is not None for part in PARTS):
        text += " Alone: the increase without that sublayer of the layer."
    if rows[0]["damage"] is not None:
        text += " Damage is the mean of the ranks by predicted and propagated."
    truncated, permutations = ablation.permutations
    if truncated:
        text += f" {truncated} of {permutations} permutations were truncated where the model only guessed: their "
        text += "remaining layers share the rest of the loss alike. Truncation can be turned off."
    if ablation.whole is not None:
        text += f" Loss of the whole model: {_with_error(ablation.whole.value, ablation.whole.stderr)}; the error of "
        text += "an increase is of the same sequences with and without the layer."
    shapley = ablation.layers[0].results.get("shapley")
    if shapley is not None and len(shapley.samples) < MINIMUM_UNITS:
        text += f" No interval of Shapley values: {count_of(len(shapley.samples), 'permutation')}, {MINIMUM_UNITS} are "
        text += "needed (--shapley)."
    if math.isfinite(ablation.reliability):
        text += f" Other text of the same size would order the layers as this one does to {ablation.reliability:z.2f} "
        text += "(Spearman; split halves)."
    title = f"{ablation.model}  {ablation.corpus}"
    return FittedTable(ReportTable(columns=columns, title=title, caption=text, marked=marked))


def _with_error(value: float, stderr: float | None, digits: int = 4) -> str:
    error = f" +/- {stderr:.2g}" if stderr is not None and math.isfinite(stderr) else ""
    return f"{value:z.{digits}f}{error}"


def search_table(result: SearchResult) -> FittedTable:
    """Return a table of the best set of each round: its loss and perplexity, and the number of sets known by then."""
    rows = [("-", 0, result.whole, 0)]
    rows += [(describe_removed(x.best.removed), len(x.best.removed), x.best, x.sets) for x in result.steps]
    losses = [loss for *_, loss, _ in rows]
    errors = [loss.stderr if math.isfinite(loss.stderr) else None for loss in losses]
    return FittedTable(
        ReportTable(
            columns=[
                ReportColumn("dropped", [dropped for _, dropped, _, _ in rows]),
                ReportColumn("layers", [layers for layers, *_ in rows], number=False, wraps=True),
                ReportColumn("loss", [loss.value for loss in losses], decimals(4)),
                ReportColumn("+/-", errors, significant(2), priority=1),
                ReportColumn("perplexity", [readable_value(LOSS, loss.value) for loss in losses], metric_format(LOSS)),
                ReportColumn("sets", [sets for *_, sets in rows], describe_count, priority=2),
            ],
            title=f"{result.plan.model}  {result.corpus}",
            caption="The best set of each round, on the text of the search; sets: whose loss was known by then. "
            f"Of the plan: {result.chosen.value:.4f}.",
        )
    )


def sensitivity_tables(rounded: Sensitivity | None) -> Iterator[FittedTable]:
    """Yield a table of the layers and one of the linear maps, with columns for each number format."""
    if rounded is None:
        return
    rows = rounded.table().to_pylist()
    formats = list(rounded.reliability)
    columns = [ReportColumn("layer", [r["layer"] for r in rows if r["format"] == formats[0] and r["map"] is None])]
    for priority, name in enumerate(formats):
        by_layer = [row for row in rows if row["format"] == name and row["map"] is None]
        bits = sum(row["bits_per_weight"] * row["num_weights"] for row in by_layer)
        heading = f"{name}, {bits / sum(row['num_weights'] for row in by_layer):.3g} bits: "
        for column in ("increase", "predicted") if by_layer[0]["increase"] is not None else ("predicted",):
            values = [(row[column], row[f"{column}_stderr"]) for row in by_layer]
            columns.append(
                ReportColumn(
                    f"{heading}{column}", values, lambda change: _with_error(change[0], change[1], 5), priority=priority
                )
            )
            heading = ""
    caption = "Nats per token. Predicted: first and second order from gradients, summed over the linear maps of the "
    caption += "layer."
    if known := {name: value for name, value in rounded.reliability.items() if math.isfinite(value)}:
        caption += " Increase: measured, with the weights of that layer alone rounded. Other text of the same size "
        agreements = ", ".join(f"{value:z.2f} ({name})" for name, value in known.items())
        caption += f"would order the layers as this one does to {agreements} (Spearman; split halves)."
    title = f"{rounded.model}  {rounded.corpus}: rounded weights"
    yield FittedTable(ReportTable(columns=columns, title=title, caption=caption))
    if paths := list(dict.fromkeys(row["map"] for row in rows if row["map"])):
        yield FittedTable(_rounded_maps(rows, paths, formats))


def _rounded_maps(rows: Sequence[Mapping[str, Any]], paths: Sequence[str], formats: Sequence[str]) -> ReportTable:
    columns = [ReportColumn("linear map", paths, number=False)]
    for priority, name in enumerate(formats):
        for column in ("increase", "predicted"):
            by_path = [[row[column] for row in rows if row["map"] == path and row["format"] == name] for path in paths]
            if all(value is not None for values in by_path for value in values):
                sums = [sum(values) for values in by_path]
                columns.append(ReportColumn(f"{name}: {column}", sums, decimals(4), priority=priority))
    caption = "Sums over all layers, in nats per token, of maps that are rounded one at a time."
    return ReportTable(columns=columns, title="By linear map", caption=caption)
