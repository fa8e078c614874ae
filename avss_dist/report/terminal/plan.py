"""The plan of a job as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from avss_dist.core.text import count_of, describe_bytes, describe_count, describe_seconds
from avss_dist.report.section import ReportColumn, ReportTable
from avss_dist.report.terminal.tables import FittedTable

if TYPE_CHECKING:
    from avss_dist.estimation.preview import Preview

STYLES = {"done": "green", "partial": "yellow", "missing": "", "repeated": "dim", "refused": "bold red"}


def plan_table(previews: Sequence[Preview], warehouse: str) -> RenderableType:
    """Return a table of the runs (model, text, status and amount of work) and a summary."""
    table = ReportTable(
        title=f"{count_of(len(previews), 'run')} into {warehouse}",
        columns=[
            ReportColumn("model", [p.model for p in previews], number=False, wraps=True),
            ReportColumn("revision", [p.revision[:12] for p in previews], number=False, wraps=True, priority=3),
            ReportColumn("corpus", [p.corpus for p in previews], number=False, wraps=True),
            ReportColumn("partition", [p.partition for p in previews], number=False, priority=2),
            ReportColumn("status", list(previews), _status, style=lambda preview: STYLES[preview.status], number=False),
            ReportColumn("weights", [p.weight_bytes or None for p in previews], describe_bytes, priority=1),
            ReportColumn("tokens", [p.num_tokens or None for p in previews], describe_count),
            ReportColumn("time", [p.seconds for p in previews], describe_seconds),
        ],
    )
    errors = [Text(f"{p.model}: {p.error}", style="red") for p in previews if p.error]
    warnings = dict.fromkeys(f"{p.model}: {p.warning}" for p in previews if p.warning)
    return Group(
        FittedTable(table),
        *errors,
        *(Text(warning, style="yellow") for warning in warnings),
        Text(summary(previews), style="bold"),
    )


def _status(preview: Preview) -> str:
    measured = f" {preview.kept_shards}/{preview.num_shards}" if preview.status == "partial" else ""
    return f"{preview.status}{measured}"


def summary(previews: Sequence[Preview]) -> str:
    """Return a summary of the plan in a line or two."""
    count = {status: sum(p.status == status for p in previews) for status in STYLES}
    known = [p.seconds for p in previews if p.seconds]
    parts = [f"{number} {status}" for status, number in count.items() if number]
    text = f"{', '.join(parts)}."
    if known:
        text += f" About {describe_seconds(sum(known))} of measuring, at the speed of earlier runs."
    if unknown := sum(p.seconds is None for p in previews if p.status in ("partial", "missing")):
        text += f" {count_of(unknown, 'run')} of unknown time: no finished run has the shape of the model."
    if count["refused"]:
        text += " The refused ones will be recorded as failed; the others run."
    return text
