"""An estimate as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from avss_dist.core.text import describe_bytes
from avss_dist.report.section import ReportColumn, ReportTable
from avss_dist.report.terminal.tables import FittedTable

if TYPE_CHECKING:
    from avss_dist.estimation.estimate import Estimate


def estimate_table(estimate: Estimate) -> RenderableType:
    """Return a table with a row for each partition: memory, and whether it fits."""
    rows = estimate.rows
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
        caption=_caption(estimate),
        marked=[not row.fits for row in rows],
        mark="failed",
    )
    shown: list[RenderableType] = [FittedTable(table), Text(automatic(estimate), style="bold")]
    if estimate.distillation:
        shown.append(FittedTable(_distillation_table(estimate)))
    return Group(*shown)


def _distillation_table(estimate: Estimate) -> ReportTable:
    """Return a table with a row for each way to distill the model."""
    rows = estimate.distillation
    return ReportTable(
        title=f"Distilling {estimate.model}",
        columns=[
            ReportColumn("train", [row.train for row in rows], number=False),
            ReportColumn("sharding", [row.sharding or "one process" for row in rows], number=False),
            ReportColumn("ranks", [row.ranks for row in rows], priority=1),
            ReportColumn("trained parameters", [row.trained for row in rows], "{:,}".format, priority=2),
            ReportColumn("memory of each device", [row.device_bytes for row in rows], describe_bytes),
            _fits([row.fits for row in rows]),
            ReportColumn("why", [row.why for row in rows], number=False, wraps=True, priority=3),
        ],
        caption="Memory at the peak of avss distill, with the teacher on each rank. Weights are trained in float32.",
        marked=[not row.fits for row in rows],
        mark="failed",
    )


def _fits(values: Sequence[bool]) -> ReportColumn:
    """Return the column that says what fits."""
    return ReportColumn(
        "fits", values, lambda fits: "yes" if fits else "no", style=lambda fits: "green" if fits else "bold red"
    )


def automatic(estimate: Estimate) -> str:
    """Return the choice of ``auto`` as a line: ``auto takes single: 175 kB of weights ... fit into ...``"""
    return f"auto takes {estimate.auto}: {estimate.auto_why}." if estimate.auto else f"auto: {estimate.auto_why}"


def _caption(estimate: Estimate) -> str:
    free = describe_bytes(estimate.host_bytes)
    if estimate.device == "cuda":
        free = f"{describe_bytes(estimate.device_bytes)} on each GPU and {free} on the host"
    held = f"as stored, computing in {estimate.dtype}" if estimate.quantized else f"in {estimate.dtype}"
    return (
        f"{estimate.num_parameters:,} parameters in {estimate.num_layers} layers, "
        f"{describe_bytes(estimate.weight_bytes)} {held}.\nMemory is that of weights, activations of a batch, and "
        f"the interpreter, libraries and counters of each process. Here, or allowed: {free}."
    )
