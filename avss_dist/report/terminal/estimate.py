"""An estimate as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from avss_dist.core.text import describe_bytes
from avss_dist.report.table import ReportColumn, ReportTable
from avss_dist.report.terminal.tables import FittedTable

if TYPE_CHECKING:
    from avss_dist.estimation.estimate import Estimate, Row


def estimate_table(estimate: Estimate) -> RenderableType:
    """Return a table with a row for each partition: memory, whether it fits, time."""
    table = ReportTable(
        title=f"{estimate.model} on {' on '.join(filter(None, (estimate.corpus, estimate.hardware)))}",
        columns=_columns_on_paper(estimate.rows) if estimate.hardware else _columns(estimate.rows),
        caption=_caption(estimate),
        marked=[not row.fits for row in estimate.rows],
        mark="failed",
    )
    shown: list[RenderableType] = [FittedTable(table), Text(summary(estimate), style="bold"), Text(automatic(estimate))]
    if estimate.hardware:
        shown += [Text(f"{row.partition}: {row.why}.") for row in estimate.rows if not row.fits]
    if estimate.distillation:
        shown.append(FittedTable(_distillation_table(estimate)))
    return Group(*shown)


def _columns(rows: Sequence[Row]) -> list[ReportColumn]:
    """Return the columns of an estimate for this machine."""
    return [
        ReportColumn("partition", [row.partition for row in rows], number=False),
        ReportColumn("ranks", [row.ranks for row in rows], priority=2),
        ReportColumn("memory of each device", [row.device_bytes for row in rows], describe_bytes),
        ReportColumn("memory of the host", [row.host_bytes for row in rows], describe_bytes, priority=1),
        _fits([row.fits for row in rows]),
        ReportColumn("time", [row.seconds for row in rows], describe_seconds),
        ReportColumn("why", [row.why for row in rows], number=False, wraps=True),
    ]


def _columns_on_paper(rows: Sequence[Row]) -> list[ReportColumn]:
    """Return the columns of an estimate for hardware that is not at hand. Reasons follow the table."""
    return [
        ReportColumn("partition", [row.partition for row in rows], number=False),
        ReportColumn("GPUs", [row.gpus for row in rows]),
        ReportColumn("replicas", [row.replicas for row in rows], priority=1),
        ReportColumn("GPU memory", [row.device_bytes for row in rows], describe_bytes),
        ReportColumn("host memory", [row.host_bytes for row in rows], describe_bytes, priority=2),
        ReportColumn("received", [row.exchanged_bytes or None for row in rows], describe_bytes),
        _fits([row.fits for row in rows]),
        ReportColumn("a shard", [row.shard_seconds for row in rows], describe_seconds),
        ReportColumn("all shards", [row.seconds / row.replicas for row in rows], describe_seconds),
    ]


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


def summary(estimate: Estimate) -> str:
    """Return an estimate as a line: ``single fits: about 12 s and 950 MB for 8,192 tokens.``"""
    best = estimate.best
    if best is None:
        return f"{estimate.model} fits no partition {f'of {estimate.hardware}' if estimate.hardware else 'here'}."
    copies = f" with {best.replicas} replicas" if best.replicas > 1 else ""
    return (
        f"{best.partition} fits: about {describe_seconds(best.seconds / best.replicas)} and "
        f"{describe_bytes(best.device_bytes)} for {estimate.num_tokens:,} tokens{copies}."
    )


def automatic(estimate: Estimate) -> str:
    """Return the choice of ``auto`` as a line: ``auto takes single: 175 kB of weights ... fit into ...``"""
    return f"auto takes {estimate.auto}: {estimate.auto_why}." if estimate.auto else f"auto: {estimate.auto_why}"


def describe_seconds(seconds: float) -> str:
    """Return a duration as text: ``12 s``, ``3 min 20 s`` or ``5 h 10 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(whole / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def _caption(estimate: Estimate) -> str:
    free = describe_bytes(estimate.host_free_bytes)
    if estimate.device == "cuda":
        free = f"{describe_bytes(estimate.device_free_bytes)} on each GPU and {free} on the host"
    held = f"as stored, computing in {estimate.dtype}" if estimate.quantized else f"in {estimate.dtype}"
    return (
        f"{estimate.num_parameters:,} parameters in {estimate.num_layers} layers, "
        f"{describe_bytes(estimate.weight_bytes)} {held}; {estimate.num_tokens:,} tokens in {estimate.num_shards} "
        f"shards of {estimate.rows_per_shard} rows: {estimate.flops / 1e12:,.3g} TFLOP.\n"
        "Memory is all that a process holds: interpreter, libraries, weights, activations. Free here, or allowed: "
        f"{free}. {_about_time(estimate)}; starting and opening the model come on top."
    )


def _about_time(estimate: Estimate) -> str:
    """Return a sentence, without its full stop, about the origin of the times."""
    if not estimate.hardware:
        return "Time is that of measuring, on an idle machine"
    from avss_dist.core.hardware import ASSUMED_EFFICIENCY, parse_hardware

    return (
        f"Time is computed, not measured: {ASSUMED_EFFICIENCY:.0%} of the published peaks of arithmetic, memory and "
        f"links is assumed ({parse_hardware(estimate.hardware).gpu.source}). A shard is measured by one replica, and "
        "all shards by as many replicas as there is room for. Received: bytes that come to a rank for a layer and a "
        "shard, from other GPUs or from host memory; each layer counts as the mean"
    )
