"""Tables of estimates, plans and evaluations: memory, jobs, sparsity, models without layers, rounds of a search."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from avss_dist.analysis.section import (
    BarColumn,
    ReportColumn,
    ReportTable,
    known_interval,
)
from avss_dist.analysis.verdict import metric_format, readable_value
from avss_dist.core.intervention import PARTS, count_removed, describe_removed
from avss_dist.core.registry import LOSS, metrics_of
from avss_dist.core.text import count_of, describe_bytes, describe_count, describe_seconds, printable
from avss_dist.pruning.map_plans import SparsityPlan
from avss_dist.reports.terminal.tables import FittedTable
from avss_dist.stats.intervals import MINIMUM_UNITS
from avss_dist.stats.metrics import NO_INTERVAL
from avss_dist.stats.rankings import count_lowest

if TYPE_CHECKING:
    from avss_dist.estimation import Estimate, Preview
    from avss_dist.evaluation.ablate import Ablation
    from avss_dist.evaluation.evaluate import Evaluations
    from avss_dist.evaluation.events import SearchStep
    from avss_dist.pruning.plan import Plan

STATUS_STYLES = {"done": "green", "partial": "yellow", "missing": "", "repeated": "dim", "refused": "bold red"}
(PROPAGATED,), (PREDICTED,) = metrics_of("propagated"), metrics_of("predicted")
_ABLATION_COLUMNS: Sequence[tuple[str, str, int, Callable[[dict[str, Any]], str]]] = (
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
    if not all(evaluation.retained.has_interval for evaluation in evaluations if evaluation.retained):
        caption = f"{caption} {NO_INTERVAL}"
    metrics = [evaluation.result.metrics()[-1] for evaluation in evaluations]
    dropped = [evaluation.subject.intervention.removed for evaluation in evaluations]
    whole = [evaluation.whole.metrics()[-1][1] if evaluation.whole else None for evaluation in evaluations]
    retained = [evaluation.retained for evaluation in evaluations]
    table = ReportTable(
        columns=[
            ReportColumn("", [evaluation.subject.label for evaluation in evaluations], number=False, wraps=True),
            ReportColumn(
                "dropped",
                [count_removed(removed) if removed else None for removed in dropped],
                number=False,
                priority=3,
            ),
            ReportColumn("task", [evaluation.task for evaluation in evaluations], number=False, wraps=True),
            ReportColumn("metric", [metric for metric, *_ in metrics], number=False),
            ReportColumn("value", [value for _, value, _ in metrics], "{:z.4g}".format),
            ReportColumn(
                "+/-",
                [error if math.isfinite(error) else None for *_, error in metrics],
                "{:z.2g}".format,
                priority=4,
            ),
            ReportColumn("whole model", whole, "{:z.4g}".format, priority=2),
            ReportColumn("retention", [retention and retention.value for retention in retained], "{:z.1%}".format),
            ReportColumn(
                "95% interval",
                [retention and known_interval(retention.low, retention.high) for retention in retained],
                lambda ends: "{:z.1%} .. {:z.1%}".format(*ends),
                priority=1,
            ),
        ],
        caption=caption,
    )
    return Group(FittedTable(table), *(Text(printable(line)) for line in evaluations.findings))


def ablation_table(ablation: Ablation) -> FittedTable:
    """Return a table of the layers, with a bar of the first available measure. The least important are marked."""
    rows = ablation.table().to_pylist()
    first = next(name for name in ("increase", "shapley", "attention", "damage", "taylor") if rows[0][name] is not None)
    lowest = sorted(rows, key=lambda row: row[first])[: count_lowest(len(rows))]
    marked, number = [row in lowest for row in rows], len(lowest)
    text = (
        f"* the {'layer' if number == 1 else f'{number} layers'} with the lowest {first}. Losses, their increases "
        "and what is predicted of them are in nats per token."
    )
    if any(rows[0][part] is not None for part in PARTS):
        text += " Alone: the increase without that sublayer of the layer."
    if rows[0]["damage"] is not None:
        text += " Damage is a layer's mean rank by predicted and by propagated."
    truncated, permutations = ablation.permutations
    if truncated:
        text += (
            f" {truncated} of {permutations} permutations were truncated where the model only guessed: their "
            "remaining layers share the rest of the loss alike. Truncation can be turned off."
        )
    if ablation.whole is not None:
        text += (
            f" Loss of the whole model: {_with_error(ablation.whole.value, ablation.whole.stderr)}; the error of "
            "an increase is of the same sequences with and without the layer."
        )
    shapley = next(iter(ablation.layers.values())).get("shapley")
    if shapley is not None and len(shapley.samples) < MINIMUM_UNITS:
        text += (
            f" No interval of Shapley values: {count_of(len(shapley.samples), 'permutation')}, {MINIMUM_UNITS} are "
            "needed (--shapley)."
        )
    if math.isfinite(ablation.reliability):
        text += (
            f" Other text of the same size would order the layers as this one does to {ablation.reliability:z.2f} "
            "(Spearman; split halves)."
        )
    return FittedTable(
        ReportTable(
            columns=[
                ReportColumn("layer", [row["layer"] for row in rows]),
                BarColumn(values=[row[first] for row in rows], marked=marked),
                *(
                    ReportColumn(heading, rows, format_, priority=0 if name == first else priority)
                    for heading, name, priority, format_ in _ABLATION_COLUMNS
                    if rows[0][name] is not None
                ),
            ],
            title=f"{ablation.model}  {ablation.corpus}",
            caption=text,
            marked=marked,
        )
    )


def _with_error(value: float, stderr: float | None, digits: int = 4) -> str:
    error = f" +/- {stderr:.2g}" if stderr is not None and math.isfinite(stderr) else ""
    return f"{value:z.{digits}f}{error}"


def search_table(plan: Plan, steps: Sequence[SearchStep]) -> FittedTable:
    """Return a table of the best set of each round: its loss and perplexity, and the number of sets known by then."""
    losses = [step.best for step in steps]
    errors = [loss.stderr if math.isfinite(loss.stderr) else None for loss in losses]
    return FittedTable(
        ReportTable(
            columns=[
                ReportColumn("dropped", [len(loss.removed) for loss in losses]),
                ReportColumn(
                    "layers", [describe_removed(loss.removed) or "-" for loss in losses], number=False, wraps=True
                ),
                ReportColumn("loss", [loss.value for loss in losses], "{:z.4f}".format),
                ReportColumn("+/-", errors, "{:z.2g}".format, priority=1),
                ReportColumn("perplexity", [readable_value(LOSS, loss.value) for loss in losses], metric_format(LOSS)),
                ReportColumn("sets", [step.sets for step in steps], describe_count, priority=2),
            ],
            title=f"{plan.model}  {plan.why['text']}",
            caption="The best set of each round, on the text of the search; sets: whose loss was known by then. "
            f"Of the plan: {steps[-1].best.value:.4f}.",
        )
    )


def sensitivity_tables(ablation: Ablation) -> Iterator[FittedTable]:
    """Yield a table of the layers and one of the linear maps, with columns for each number format."""
    if (rounded := ablation.sensitivity) is None:
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
    caption = (
        "Nats per token. Predicted: first and second order from gradients, summed over the linear maps of the layer."
    )
    agreements = [f"{value:z.2f} ({name})" for name, value in rounded.reliability.items() if math.isfinite(value)]
    if agreements:
        caption += (
            " Increase: measured, with the weights of that layer alone rounded. Other text of the same size would "
            f"order the layers as this one does to {', '.join(agreements)} (Spearman; split halves)."
        )
    yield FittedTable(
        ReportTable(columns=columns, title=f"{ablation.model}  {ablation.corpus}: rounded weights", caption=caption)
    )
    if paths := list(dict.fromkeys(row["map"] for row in rows if row["map"])):
        yield FittedTable(_rounded_maps(rows, paths, formats))


def _rounded_maps(rows: Sequence[Mapping[str, Any]], paths: Sequence[str], formats: Sequence[str]) -> ReportTable:
    columns = [ReportColumn("linear map", paths, number=False)]
    for priority, name in enumerate(formats):
        for column in ("increase", "predicted"):
            by_path = [[row[column] for row in rows if row["map"] == path and row["format"] == name] for path in paths]
            if all(value is not None for values in by_path for value in values):
                columns.append(
                    ReportColumn(f"{name}: {column}", [*map(sum, by_path)], "{:z.4f}".format, priority=priority)
                )
    return ReportTable(
        columns=columns,
        title="By linear map",
        caption="Sums over all layers, in nats per token, of maps that are rounded one at a time.",
    )


def estimate_table(estimate: Estimate) -> RenderableType:
    """Return a table of the memory that each partition takes and whether it fits, with another of ways to distill."""
    free = describe_bytes(estimate.host_bytes)
    if estimate.device == "cuda":
        free = f"{describe_bytes(estimate.device_bytes)} on each GPU and {free} on the host"
    held = f"as stored, computing in {estimate.dtype}" if estimate.quantized else f"in {estimate.dtype}"
    rows, ways = estimate.rows, estimate.distillation
    table = ReportTable(
        title=estimate.model,
        columns=[
            ReportColumn("partition", [row.partition for row in rows], number=False),
            ReportColumn("ranks", [row.ranks for row in rows]),
            ReportColumn("memory of each device", [row.device_bytes for row in rows], describe_bytes),
            ReportColumn("memory of the host", [row.host_bytes for row in rows], describe_bytes, priority=1),
            _fits([row.fits for row in rows]),
            ReportColumn("why", [row.why for row in rows], number=False, wraps=True),
        ],
        caption=f"{estimate.num_parameters:,} parameters in {estimate.num_layers} layers, "
        f"{describe_bytes(estimate.weight_bytes)} {held}.\nMemory is that of weights, activations of a batch, and "
        f"the interpreter, libraries and counters of each process. Here, or allowed: {free}.",
        marked=[not row.fits for row in rows],
        mark="failed",
    )
    distillation = ReportTable(
        title=f"Distilling {estimate.model}",
        columns=[
            ReportColumn("train", [row.train for row in ways], number=False),
            ReportColumn("sharding", [row.sharding or "one process" for row in ways], number=False),
            ReportColumn("ranks", [row.ranks for row in ways], priority=1),
            ReportColumn("trained parameters", [row.trained for row in ways], "{:,}".format, priority=2),
            ReportColumn("memory of each device", [row.device_bytes for row in ways], describe_bytes),
            _fits([row.fits for row in ways]),
            ReportColumn("why", [row.why for row in ways], number=False, wraps=True, priority=3),
        ],
        caption="Memory at the peak of avss distill, with the teacher on each rank. Weights are trained in float32.",
        marked=[not row.fits for row in ways],
        mark="failed",
    )
    return Group(
        FittedTable(table), Text(automatic(estimate), style="bold"), *([FittedTable(distillation)] if ways else [])
    )


def _fits(values: Sequence[bool]) -> ReportColumn:
    """Return the column that says what fits."""
    return ReportColumn(
        "fits", values, lambda fits: "yes" if fits else "no", style=lambda fits: "green" if fits else "bold red"
    )


def automatic(estimate: Estimate) -> str:
    """Return the choice of ``auto`` as a line: ``auto takes single: 175 kB of weights ... fit into ...``"""
    return f"auto takes {estimate.auto}: {estimate.auto_why}." if estimate.auto else f"auto: {estimate.auto_why}"


def plan_table(previews: Sequence[Preview], warehouse: str) -> RenderableType:
    """Return a table of the runs (model, text, status and amount of work) and a summary."""
    statuses = [f"{p.status} {p.kept_shards}/{p.num_shards}" if p.status == "partial" else p.status for p in previews]
    table = ReportTable(
        title=f"{count_of(len(previews), 'run')} into {warehouse}",
        columns=[
            ReportColumn("model", [p.model for p in previews], number=False, wraps=True),
            ReportColumn("revision", [p.revision[:12] for p in previews], number=False, wraps=True, priority=3),
            ReportColumn("corpus", [p.corpus for p in previews], number=False, wraps=True),
            ReportColumn("partition", [p.partition for p in previews], number=False, priority=2),
            ReportColumn("status", statuses, style=lambda status: STATUS_STYLES[status.split()[0]], number=False),
            ReportColumn("weights", [p.weight_bytes or None for p in previews], describe_bytes, priority=1),
            ReportColumn("tokens", [p.num_tokens or None for p in previews], describe_count),
            ReportColumn("time", [p.seconds for p in previews], describe_seconds),
        ],
    )
    count = {status: sum(p.status == status for p in previews) for status in STATUS_STYLES}
    text = f"{', '.join(f'{number} {status}' for status, number in count.items() if number)}."
    if seconds := [p.seconds for p in previews if p.seconds]:
        text += f" About {describe_seconds(sum(seconds))} of measuring, at the speed of earlier runs."
    if unknown := sum(p.seconds is None for p in previews if p.status in ("partial", "missing")):
        text += f" {count_of(unknown, 'run')} of unknown time: no finished run has the shape of the model."
    if count["refused"]:
        text += " The refused ones will be recorded as failed; the others run."
    return Group(
        FittedTable(table),
        *(Text(f"{p.model}: {p.error}", style="red") for p in previews if p.error),
        *(
            Text(warning, style="yellow")
            for warning in dict.fromkeys(f"{p.model}: {p.warning}" for p in previews if p.warning)
        ),
        Text(text, style="bold"),
    )


def thresholds_table(plan: SparsityPlan) -> ReportTable:
    """Return a table of a plan: threshold or share and expected sparsity by layer and linear map, in shades."""

    def shade(point: Any) -> str:
        red = round(255 * min(point.sparsity, 1.0))
        return f"rgb({red},128,{255 - red})"

    maps = list(dict.fromkeys(planned.map for planned in plan.projections))
    by_place = {(planned.layer, planned.map): planned for planned in plan.projections}
    layers = sorted({planned.layer for planned in plan.projections})
    return ReportTable(
        title=f"What becomes zero in {plan.model}: by {plan.projections[0].by}, and the sparsity that is expected",
        columns=[
            ReportColumn("layer", layers),
            *(
                ReportColumn(
                    name.rpartition(".")[2],
                    [by_place.get((layer, name)) for layer in layers],
                    lambda planned: f"{planned.value:z.3g} {planned.sparsity:4.0%}",
                    style=shade,
                    priority=number,
                )
                for number, name in enumerate(maps)
            ),
        ],
    )
