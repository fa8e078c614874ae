"""Tables of estimates, plans and evaluations: memory, jobs, sparsity, models without layers, rounds of a search."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from avss_dist.analysis.differences import DIFFERENCE_COLUMNS, difference_row
from avss_dist.analysis.section import (
    BarColumn,
    ReportColumn,
    ReportRow,
    ReportTable,
    interval,
    known_interval,
)
from avss_dist.analysis.verdict import metric_format, readable_value
from avss_dist.core.intervention import PARTS, count_removed, describe_removed
from avss_dist.core.text import count_of, describe_bytes, describe_count, describe_seconds, printable
from avss_dist.core.values import NewRow, TableRow
from avss_dist.plans.map_plans import MapPlan, SparsityPlan
from avss_dist.reports.terminal.tables import FittedTable
from avss_dist.stats.catalog import metrics_of
from avss_dist.stats.intervals import MINIMUM_UNITS
from avss_dist.stats.metrics import LOSS, NO_INTERVAL
from avss_dist.stats.rankings import count_lowest
from avss_dist.warehouse.reader import grouped

if TYPE_CHECKING:
    from avss_dist.estimation import DistillRow, Estimate, Preview
    from avss_dist.evaluation.events import SearchStep
    from avss_dist.plans.plan import Plan
    from avss_dist.pruning.repair.costs import RepairCost
    from avss_dist.studies.ablate import Ablation
    from avss_dist.studies.evaluate import Evaluation, Evaluations

STATUS_STYLES = {"done": "green", "partial": "yellow", "missing": "", "repeated": "dim", "refused": "bold red"}
PREDICTED = metrics_of("predicted")[0]
PROPAGATED = metrics_of("propagated")[0]
FIRST_MEASURES = ("increase", "shapley", "attention", "damage", "taylor")
"""Measures of layers of which the first that is known is drawn as bars, and tells the lowest layers."""
SENSITIVITY_DIGITS = 5  # after the point, of the small effects of rounding
REVISION_LENGTH = 12  # digits of a revision that are shown


def _describe_fit(fits: bool) -> str:
    return "yes" if fits else "no"


def _fit_style(fits: bool) -> str:
    return "green" if fits else "bold red"


def _status_style(status: str) -> str:
    return STATUS_STYLES[status.split()[0]]


_EVALUATION_COLUMNS = (
    ReportColumn("", "subject", number=False, wraps=True),
    ReportColumn("dropped", "dropped", number=False, priority=3),
    ReportColumn("task", "task", number=False, wraps=True),
    ReportColumn("metric", "metric", number=False),
    ReportColumn("value", "value", "{:z.4g}".format),
    ReportColumn("+/-", "stderr", "{:z.2g}".format, priority=4),
    ReportColumn("whole model", "whole", "{:z.4g}".format, priority=2),
    ReportColumn("retention", "retention", "{:z.1%}".format),
    ReportColumn("95% interval", "interval", interval("{:z.1%}".format, " .. "), priority=1),
)
_DIFFERENCE_SUBJECT = (
    ReportColumn("", "subject", number=False, wraps=True),
    ReportColumn("task", "task", number=False, wraps=True),
    ReportColumn("metric", "metric", number=False),
)
"""Columns that name the rows of a table of differences."""
_ABLATION_COLUMNS = (
    ReportColumn("loss without", "loss", "{:z.4f}".format, priority=4),
    ReportColumn("increase", "increase"),
    ReportColumn("attention alone", "attention", priority=1),
    ReportColumn("MLP alone", "mlp", priority=1),
    ReportColumn("Shapley", "shapley", "{:z.4f}".format, priority=1),
    ReportColumn("95% interval", "shapley_interval", interval("{:z.4f}".format, " .. "), priority=3),
    ReportColumn("damage", "damage", "{:z.1f}".format, priority=1),
    ReportColumn("predicted", PREDICTED, priority=2),
    ReportColumn("propagated", PROPAGATED, "{:.4g}".format, priority=2),
    ReportColumn("Taylor", "taylor", "{:z.4g}".format, priority=2),
    ReportColumn("gradient L1", "gradient_l1", "{:z.4g}".format, priority=6),
    ReportColumn("gradient L2", "gradient_l2", "{:z.4g}".format, priority=7),
    ReportColumn("weight norm", "weight_frobenius", "{:z.4g}".format, priority=8),
)
"""Columns of the measures of layers. A table has those that were measured."""
_SEARCH_COLUMNS = (
    ReportColumn("dropped", "dropped"),
    ReportColumn("layers", "layers", number=False, wraps=True),
    ReportColumn("loss", "loss", "{:z.4f}".format),
    ReportColumn("+/-", "stderr", "{:z.2g}".format, priority=1),
    ReportColumn("perplexity", "perplexity", metric_format(LOSS)),
    ReportColumn("sets", "sets", describe_count, priority=2),
)
_PARTITION_COLUMNS = (
    ReportColumn("partition", "partition", number=False),
    ReportColumn("ranks", "ranks"),
    ReportColumn("memory of each device", "device_bytes", describe_bytes),
    ReportColumn("memory of the host", "host_bytes", describe_bytes, priority=1),
    ReportColumn("fits", "fits", _describe_fit, style=_fit_style),
    ReportColumn("why", "why", number=False, wraps=True),
)
_DISTILLATION_COLUMNS = (
    ReportColumn("train", "train", number=False),
    ReportColumn("sharding", "sharding", number=False),
    ReportColumn("ranks", "ranks", priority=1),
    ReportColumn("trained parameters", "trained", "{:,}".format, priority=2),
    ReportColumn("memory of each device", "device_bytes", describe_bytes),
    ReportColumn("fits", "fits", _describe_fit, style=_fit_style),
    ReportColumn("why", "why", number=False, wraps=True, priority=3),
)
_PREVIEW_COLUMNS = (
    ReportColumn("model", "model", number=False, wraps=True),
    ReportColumn("revision", "revision", number=False, wraps=True, priority=3),
    ReportColumn("corpus", "corpus", number=False, wraps=True),
    ReportColumn("partition", "partition", number=False, priority=2),
    ReportColumn("status", "status", style=_status_style, number=False),
    ReportColumn("weights", "weight_bytes", describe_bytes, priority=1),
    ReportColumn("tokens", "num_tokens", describe_count),
    ReportColumn("time", "seconds", describe_seconds),
)


def evaluation_table(evaluations: Evaluations) -> RenderableType:
    """Return a table with a row for each subject and task, one of their differences, and the findings below.

    Losses are shown as perplexities.
    """
    caption = (
        "Retention: the metric without the layers over that with them (of a perplexity: with over without), "
        "and its 95% interval over the same samples."
    )
    if not all(evaluation.retained.has_interval for evaluation in evaluations if evaluation.retained):
        caption += f" {NO_INTERVAL}"
    rows = [_evaluation_row(evaluation) for evaluation in evaluations]
    table = ReportTable(columns=_EVALUATION_COLUMNS, rows=rows, caption=caption)
    findings = [Text(printable(finding)) for finding in evaluations.findings]
    return Group(FittedTable(table), *_difference_tables(evaluations), *findings)


def _difference_tables(evaluations: Evaluations) -> Iterator[FittedTable]:
    """Yield a table of the differences from the first subject, if there are several."""
    comparisons = evaluations.comparisons
    if not comparisons:
        return
    rows = []
    for comparison in comparisons:
        labels = {"subject": comparison.label, "task": comparison.task}
        rows.append(ReportRow({**difference_row(comparison), **labels}))
    caption = (
        f"Each model's value less that of {comparisons[0].reference}, over the same samples. Kept: the difference of "
        f"the retentions, in percentage points. No interval where fewer than {MINIMUM_UNITS} samples differ."
    )
    columns = [*_DIFFERENCE_SUBJECT, *DIFFERENCE_COLUMNS]
    title = f"Compared with {comparisons[0].reference}"
    yield FittedTable(ReportTable(columns=columns, rows=rows, title=title, caption=caption))


def _evaluation_row(evaluation: Evaluation) -> ReportRow:
    """Return the row of a metric of one subject on a task. A loss has its perplexity as the last of its metrics."""
    metric, value, stderr = evaluation.result.metrics()[-1]
    removed = evaluation.subject.intervention.removed
    row: NewRow = {
        "subject": evaluation.subject.label,
        "dropped": count_removed(removed) if removed else None,
        "task": evaluation.task,
        "metric": metric,
        "value": value,
        "stderr": stderr if math.isfinite(stderr) else None,
        "whole": None,
        "retention": None,
        "interval": None,
    }
    if evaluation.whole is not None:
        _, row["whole"], _ = evaluation.whole.metrics()[-1]
    retained = evaluation.retained
    if retained is not None:
        row["retention"] = retained.value
        row["interval"] = known_interval(retained.low, retained.high)
    return ReportRow(row)


def ablation_table(ablation: Ablation) -> FittedTable:
    """Return a table of the layers, with a bar of the first available measure. The least important are marked."""
    measured = ablation.table().to_pylist()
    drawn = next(name for name in FIRST_MEASURES if measured[0][name] is not None)
    ordered = sorted(measured, key=itemgetter(drawn))
    lowest = {row["layer"] for row in ordered[: count_lowest(len(ordered))]}
    rows = [_ablation_row(row, drawn, is_lowest=row["layer"] in lowest) for row in measured]
    columns: list[ReportColumn | BarColumn] = [ReportColumn("layer", "layer"), BarColumn(key="bar")]
    for column in _ABLATION_COLUMNS:
        if rows[0].values[column.key] is None:
            continue
        # A terminal has always room for the measure that the layers are marked by.
        columns.append(replace(column, priority=0) if column.key == drawn else column)
    table = ReportTable(
        columns=columns,
        rows=rows,
        title=f"{ablation.model}  {ablation.corpus}",
        caption=_ablation_caption(ablation, measured[0], drawn, len(lowest)),
        mark="lowest",
    )
    return FittedTable(table)


def _ablation_row(measured: TableRow, drawn: str, *, is_lowest: bool) -> ReportRow:
    """Return the row of a layer, with texts of the measures that have a standard error.

    Args:
        measured: a row of `Ablation.table`.
        drawn: the measure that bars show.
    """
    row = dict(measured)
    row["bar"] = measured[drawn]
    row["increase"] = _with_error(measured["increase"], measured["increase_stderr"])
    row["attention"] = _with_error(measured["attention"], measured["attention_stderr"])
    row["mlp"] = _with_error(measured["mlp"], measured["mlp_stderr"])
    row[PREDICTED] = _with_error(measured[PREDICTED], measured["predicted_stderr"])
    row["shapley_interval"] = None
    if measured["shapley_low"] is not None:
        row["shapley_interval"] = (measured["shapley_low"], measured["shapley_high"])
    return ReportRow(row, is_marked=is_lowest)


def _ablation_caption(ablation: Ablation, first_layer: TableRow, drawn: str, num_lowest: int) -> str:
    """Return the explanation of a table of layers.

    Args:
        first_layer: row of a layer, which has the measures of all layers.
        drawn: the measure that the lowest layers are marked by.
    """
    layers = "layer" if num_lowest == 1 else f"{num_lowest} layers"
    caption = (
        f"* the {layers} with the lowest {drawn}. Losses, their increases and what is predicted of them are in nats "
        "per token."
    )
    if any(first_layer[part] is not None for part in PARTS):
        caption += " Alone: the increase without that sublayer of the layer."
    if first_layer["damage"] is not None:
        caption += " Damage is a layer's mean rank by predicted and by propagated."
    truncated, permutations = ablation.permutations
    if truncated:
        caption += (
            f" {truncated} of {permutations} permutations were truncated where the model only guessed: their "
            "remaining layers share the rest of the loss alike. Truncation can be turned off."
        )
    if ablation.whole is not None:
        caption += (
            f" Loss of the whole model: {_with_error(ablation.whole.value, ablation.whole.stderr)}; the error of "
            "an increase is of the same sequences with and without the layer."
        )
    shapley = next(iter(ablation.layers.values())).get("shapley")
    if shapley is not None and len(shapley.samples) < MINIMUM_UNITS:
        caption += (
            f" No interval of Shapley values: {count_of(len(shapley.samples), 'permutation')}, {MINIMUM_UNITS} are "
            "needed (--shapley)."
        )
    if math.isfinite(ablation.reliability):
        caption += (
            f" Other text of the same size would order the layers as this one does to {ablation.reliability:z.2f} "
            "(Spearman; split halves)."
        )
    return caption


def _with_error(value: float | None, stderr: float | None, digits: int = 4) -> str | None:
    """Return a value and its standard error as text. None if it was not measured."""
    if value is None:
        return None
    text = f"{value:z.{digits}f}"
    if stderr is not None and math.isfinite(stderr):
        text += f" +/- {stderr:.2g}"
    return text


def search_table(plan: Plan, steps: Sequence[SearchStep]) -> FittedTable:
    """Return a table of the best set of each round: its loss and perplexity, and the number of sets known by then."""
    loss_of_plan = steps[-1].best.value
    table = ReportTable(
        columns=_SEARCH_COLUMNS,
        rows=[_search_row(step) for step in steps],
        title=f"{plan.model}  {plan.why['text']}",
        caption="The best set of each round, on the text of the search; sets: whose loss was known by then. "
        f"Of the plan: {loss_of_plan:.4f}.",
    )
    return FittedTable(table)


def _search_row(step: SearchStep) -> ReportRow:
    """Return the row of one round of a search."""
    loss = step.best
    return ReportRow(
        {
            "dropped": len(loss.removed),
            "layers": describe_removed(loss.removed) or "-",
            "loss": loss.value,
            "stderr": loss.stderr if math.isfinite(loss.stderr) else None,
            "perplexity": readable_value(LOSS, loss.value),
            "sets": step.sets,
        }
    )


def sensitivity_tables(ablation: Ablation) -> Iterator[FittedTable]:
    """Yield a table of the layers and one of the linear maps, with columns for each number format."""
    sensitivity = ablation.sensitivity
    if sensitivity is None:
        return
    rounded = sensitivity.table().to_pylist()
    of_layers = [row for row in rounded if row["map"] is None]
    of_maps = [row for row in rounded if row["map"] is not None]
    caption = (
        "Nats per token. Predicted: first and second order from gradients, summed over the linear maps of the layer."
    )
    agreements = []
    for name, reliability in sensitivity.reliability.items():
        if math.isfinite(reliability):
            agreements.append(f"{reliability:z.2f} ({name})")
    if agreements:
        caption += (
            " Increase: measured, with the weights of that layer alone rounded. Other text of the same size would "
            f"order the layers as this one does to {', '.join(agreements)} (Spearman; split halves)."
        )
    by_layer = grouped(of_layers, itemgetter("layer"))
    table = ReportTable(
        columns=_sensitivity_columns(of_layers),
        rows=[_sensitivity_row(layer, rows) for layer, rows in by_layer.items()],
        title=f"{ablation.model}  {ablation.corpus}: rounded weights",
        caption=caption,
    )
    yield FittedTable(table)
    if of_maps:
        yield FittedTable(_rounded_maps(of_maps))


def _sensitivity_columns(of_layers: Sequence[TableRow]) -> list[ReportColumn]:
    """Return the columns of the table of layers. The first column of a format says how many bits its weights take.

    Args:
        of_layers: rows of the table of a `Sensitivity` that are of whole layers.
    """
    columns = [ReportColumn("layer", "layer")]
    for priority, (name, rows) in enumerate(grouped(of_layers, itemgetter("format")).items()):
        bits = sum(row["bits_per_weight"] * row["num_weights"] for row in rows)
        bits_per_weight = bits / sum(row["num_weights"] for row in rows)
        heading = f"{name}, {bits_per_weight:.3g} bits: "
        if rows[0]["increase"] is not None:
            columns.append(ReportColumn(f"{heading}increase", f"{name}: increase", priority=priority))
            heading = ""
        columns.append(ReportColumn(f"{heading}predicted", f"{name}: predicted", priority=priority))
    return columns


def _sensitivity_row(layer: int, rows: Sequence[TableRow]) -> ReportRow:
    """Return the row of a layer, given its effects in each number format."""
    effects: NewRow = {"layer": layer}
    for row in rows:
        for effect in ("increase", "predicted"):
            text = _with_error(row[effect], row[f"{effect}_stderr"], SENSITIVITY_DIGITS)
            effects[f"{row['format']}: {effect}"] = text
    return ReportRow(effects)


def _rounded_maps(of_maps: Sequence[TableRow]) -> ReportTable:
    """Return the table of linear maps, with the effects that are known of each map in each layer.

    Args:
        of_maps: rows of the table of a `Sensitivity` that are of single maps.
    """
    columns = [ReportColumn("linear map", "map", number=False)]
    for priority, (name, rows) in enumerate(grouped(of_maps, itemgetter("format")).items()):
        for effect in ("increase", "predicted"):
            if all(row[effect] is not None for row in rows):
                columns.append(
                    ReportColumn(f"{name}: {effect}", f"{name}: {effect}", "{:z.4f}".format, priority=priority)
                )
    by_path = grouped(of_maps, itemgetter("map"))
    return ReportTable(
        columns=columns,
        rows=[_rounded_map(path, rows) for path, rows in by_path.items()],
        title="By linear map",
        caption="Sums over all layers, in nats per token, of maps that are rounded one at a time.",
    )


def _rounded_map(path: str, rows: Sequence[TableRow]) -> ReportRow:
    """Return the row of a linear map: the sums of its effects over the layers, in each number format."""
    sums: NewRow = {"map": path}
    for row in rows:
        for effect in ("increase", "predicted"):
            if row[effect] is not None:
                key = f"{row['format']}: {effect}"
                sums[key] = sums.get(key, 0) + row[effect]
    return ReportRow(sums)


def estimate_table(estimate: Estimate) -> RenderableType:
    """Return a table of the memory that each partition takes and whether it fits, with another of ways to distill."""
    available = describe_bytes(estimate.host_bytes)
    weights = describe_bytes(estimate.weight_bytes)
    if estimate.device == "cuda":
        available = f"{describe_bytes(estimate.device_bytes)} on each GPU and {available} on the host"
    dtype = f"in {estimate.dtype}"
    if estimate.quantized:
        dtype = f"as stored, computing in {estimate.dtype}"
    partitions = ReportTable(
        title=estimate.model,
        columns=_PARTITION_COLUMNS,
        rows=[ReportRow(vars(row), is_marked=not row.fits) for row in estimate.rows],
        caption=f"{estimate.num_parameters:,} parameters in {estimate.num_layers} layers, "
        f"{weights} {dtype}.\nMemory is that of weights, activations of a batch, and "
        f"the interpreter, libraries and counters of each process. Here, or allowed: {available}.",
        mark="failed",
    )
    parts: list[RenderableType] = [FittedTable(partitions), Text(automatic(estimate), style="bold")]
    if estimate.distillation:
        ways = ReportTable(
            title=f"Distilling {estimate.model}",
            columns=_DISTILLATION_COLUMNS,
            rows=[_distillation_row(row) for row in estimate.distillation],
            caption="Memory at the peak of avss distill, with the teacher on each rank. Weights are trained in "
            "float32.",
            mark="failed",
        )
        parts.append(FittedTable(ways))
    if estimate.repair:
        parts.append(Text(_describe_repair(estimate.repair), style="bold"))
    return Group(*parts)


def _describe_repair(cost: RepairCost) -> str:
    """Return the text and the memory of the fit of a repair as a line."""
    return (
        f"Repair {cost.repair}: at least {cost.tokens:,} tokens of text, and up to {describe_bytes(cost.num_bytes)} "
        f"for the products of {cost.why}, beside the model."
    )


def _distillation_row(way: DistillRow) -> ReportRow:
    """Return the row of a way to distill a model."""
    row = dict(vars(way))
    row["sharding"] = way.sharding or "one process"
    return ReportRow(row, is_marked=not way.fits)


def automatic(estimate: Estimate) -> str:
    """Return the choice of ``auto`` as a line: ``auto takes single: 175 kB of weights ... fit into ...``"""
    if estimate.auto:
        return f"auto takes {estimate.auto}: {estimate.auto_why}."
    return f"auto: {estimate.auto_why}"


def plan_table(previews: Sequence[Preview], warehouse: str) -> RenderableType:
    """Return a table of the runs (model, text, status and amount of work) and a summary."""
    table = ReportTable(
        title=f"{count_of(len(previews), 'run')} into {warehouse}",
        columns=_PREVIEW_COLUMNS,
        rows=[_preview_row(preview) for preview in previews],
    )
    parts: list[RenderableType] = [FittedTable(table)]
    for preview in previews:
        if preview.error:
            parts.append(Text(f"{preview.model}: {preview.error}", style="red"))
    # Runs of one model on several texts have the same warning.
    warnings = dict.fromkeys(f"{preview.model}: {preview.warning}" for preview in previews if preview.warning)
    for warning in warnings:
        parts.append(Text(warning, style="yellow"))
    parts.append(Text(_describe_work(previews), style="bold"))
    return Group(*parts)


def _preview_row(preview: Preview) -> ReportRow:
    """Return the row of a run that is planned."""
    status = preview.status
    if status == "partial":
        status = f"{status} {preview.kept_shards}/{preview.num_shards}"
    return ReportRow(
        {
            "model": preview.model,
            "revision": preview.revision[:REVISION_LENGTH],
            "corpus": preview.corpus,
            "partition": preview.partition,
            "status": status,
            "weight_bytes": preview.weight_bytes or None,
            "num_tokens": preview.num_tokens or None,
            "seconds": preview.seconds,
        }
    )


def _describe_work(previews: Sequence[Preview]) -> str:
    """Return sentences on the number of runs of each status, and on the time that they take."""
    counts = Counter(preview.status for preview in previews)
    statuses = [f"{counts[status]} {status}" for status in STATUS_STYLES if counts[status]]
    text = f"{', '.join(statuses)}."
    seconds = sum(preview.seconds for preview in previews if preview.seconds)
    if seconds:
        text += f" About {describe_seconds(seconds)} of measuring, at the speed of earlier runs."
    unknown = 0
    for preview in previews:
        if preview.status in ("partial", "missing") and preview.seconds is None:
            unknown += 1
    if unknown:
        text += f" {count_of(unknown, 'run')} of unknown time: no finished run has the shape of the model."
    if counts["refused"]:
        text += " The refused ones will be recorded as failed; the others run."
    return text


def thresholds_table(plan: SparsityPlan) -> ReportTable:
    """Return a table of a plan: threshold or share and expected sparsity by layer and linear map, in shades."""
    columns = [ReportColumn("layer", "layer")]
    for priority, path in enumerate(dict.fromkeys(planned.map for planned in plan.projections)):
        name = path.rpartition(".")[2]
        columns.append(ReportColumn(name, path, _describe_sparsity, style=_shade, priority=priority))
    # A map that a layer lacks is missing in its row.
    missing = dict.fromkeys(column.key for column in columns)
    rows = []
    by_layer = grouped(plan.projections, attrgetter("layer"))
    for layer in sorted(by_layer):
        planned_maps = {planned.map: planned for planned in by_layer[layer]}
        rows.append(ReportRow({**missing, "layer": layer, **planned_maps}))
    return ReportTable(
        title=f"What becomes zero in {plan.model}: by {plan.projections[0].by}, and the sparsity that is expected",
        columns=columns,
        rows=rows,
    )


def _describe_sparsity(planned: MapPlan) -> str:
    """Return the threshold or share of a linear map, and the sparsity that is expected of it."""
    return f"{planned.value:z.3g} {planned.sparsity:4.0%}"


def _shade(planned: MapPlan) -> str:
    """Return the color of a linear map: from blue for none of its inputs to red for all."""
    red = round(255 * min(planned.sparsity, 1.0))
    return f"rgb({red},128,{255 - red})"
