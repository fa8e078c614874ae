"""Tables of what will be done: estimates of memory, plans of jobs, and sparsity plans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from avss_dist.core.text import count_of, describe_bytes, describe_count, describe_seconds
from avss_dist.map_plans.plans import SparsityPlan
from avss_dist.reports.section import ReportColumn, ReportTable
from avss_dist.reports.terminal.tables import FittedTable

if TYPE_CHECKING:
    from avss_dist.estimation import Estimate, Preview

STYLES = {"done": "green", "partial": "yellow", "missing": "", "repeated": "dim", "refused": "bold red"}


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
    line = Text(automatic(estimate), style="bold")
    return Group(FittedTable(table), line, *([FittedTable(distillation)] if ways else []))


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
            ReportColumn("status", statuses, style=lambda status: STYLES[status.split()[0]], number=False),
            ReportColumn("weights", [p.weight_bytes or None for p in previews], describe_bytes, priority=1),
            ReportColumn("tokens", [p.num_tokens or None for p in previews], describe_count),
            ReportColumn("time", [p.seconds for p in previews], describe_seconds),
        ],
    )
    errors = [Text(f"{p.model}: {p.error}", style="red") for p in previews if p.error]
    warnings = dict.fromkeys(f"{p.model}: {p.warning}" for p in previews if p.warning)
    count = {status: sum(p.status == status for p in previews) for status in STYLES}
    text = f"{', '.join(f'{number} {status}' for status, number in count.items() if number)}."
    if seconds := [p.seconds for p in previews if p.seconds]:
        text += f" About {describe_seconds(sum(seconds))} of measuring, at the speed of earlier runs."
    if unknown := sum(p.seconds is None for p in previews if p.status in ("partial", "missing")):
        text += f" {count_of(unknown, 'run')} of unknown time: no finished run has the shape of the model."
    if count["refused"]:
        text += " The refused ones will be recorded as failed; the others run."
    return Group(
        FittedTable(table),
        *errors,
        *(Text(warning, style="yellow") for warning in warnings),
        Text(text, style="bold"),
    )


def thresholds_table(plan: SparsityPlan) -> ReportTable:
    """Return a table of a plan: threshold or share and expected sparsity by layer and linear map, in shades."""

    def shade(point: Any) -> str:
        if point is None:
            return ""
        red = round(255 * min(point.sparsity, 1.0))
        return f"rgb({red},128,{255 - red})"

    maps = list(dict.fromkeys(one.map for one in plan.projections))
    by_place = {(one.layer, one.map): one for one in plan.projections}
    layers = sorted({one.layer for one in plan.projections})
    return ReportTable(
        title=f"What becomes zero in {plan.model}: by {plan.projections[0].by}, and the sparsity that is expected",
        columns=[
            ReportColumn("layer", layers),
            *(
                ReportColumn(
                    name.rpartition(".")[2],
                    [by_place.get((layer, name)) for layer in layers],
                    lambda one: f"{one.value:z.3g} {one.sparsity:4.0%}",
                    style=shade,
                    priority=number,
                )
                for number, name in enumerate(maps)
            ),
        ],
    )
