"""What a job will do, as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from avss_dist.report.terminal.estimate import describe_seconds
from avss_dist.text import count_of, describe_bytes

if TYPE_CHECKING:
    from avss_dist.estimation.preview import Preview

STYLES = {"done": "green", "partial": "yellow", "missing": "", "repeated": "dim", "refused": "bold red"}


def plan_table(previews: Sequence[Preview], warehouse: str) -> RenderableType:
    """One row a run: what it is, where it stands, what it will take."""
    table = Table(title=Text(f"{count_of(len(previews), 'run')} into {warehouse}"), title_style="bold")
    for name in ("model", "revision", "corpus"):
        table.add_column(name, overflow="fold")
    for name in ("partition", "status"):
        table.add_column(name)
    for name in ("weights", "tokens", "time"):
        table.add_column(name, justify="right")
    for preview in previews:
        kept = f" {preview.kept_shards}/{preview.num_shards}" if preview.status == "partial" else ""
        table.add_row(
            *(Text(text) for text in (preview.model, preview.revision[:12], preview.corpus)),
            preview.partition,
            Text(preview.status + kept, style=STYLES[preview.status]),
            describe_bytes(preview.weight_bytes) if preview.weight_bytes else "-",
            f"{preview.num_tokens:,}" if preview.num_tokens else "-",
            describe_seconds(preview.seconds) if preview.seconds is not None else "-",
        )
    errors = [Text(f"{p.model}: {p.error}", style="red") for p in previews if p.error]
    warnings = dict.fromkeys(f"{p.model}: {p.warning}" for p in previews if p.warning)
    return Group(
        table, *errors, *(Text(warning, style="yellow") for warning in warnings), Text(summary(previews), style="bold")
    )


def summary(previews: Sequence[Preview]) -> str:
    """The plan in a line or two."""
    count = {status: sum(p.status == status for p in previews) for status in STYLES}
    known = [p.seconds for p in previews if p.seconds]
    parts = [f"{number} {status}" for status, number in count.items() if number]
    text = f"{', '.join(parts)}."
    if known:
        guessed = any(p.seconds and not p.reference_run for p in previews)
        how = "a rough estimate from the number of operations; avss estimate measures" if guessed else "as earlier runs"
        text += f" About {describe_seconds(sum(known))} of measuring ({how})."
    if count["refused"]:
        text += " The refused ones will be recorded as failed; the others run."
    return text
