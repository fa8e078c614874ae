"""Progress of a distillation, and its table: perplexity and what is kept of the teacher's, by tokens and text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Self

from rich import progress as rich_progress

from avss_dist.core.text import describe_bytes, describe_seconds
from avss_dist.distillation.events import Event, HeldOutMeasured, Preparing, TrainingAdvanced
from avss_dist.report.section import ReportColumn, ReportTable, percent, significant
from avss_dist.report.terminal.pace import Pace
from avss_dist.report.terminal.progress import LogLines, StepPace, bars, log

if TYPE_CHECKING:
    from avss_dist.distillation.distill import Distilled


class DistillProgress:
    """Callback for the events of `distill`: a bar with tokens/s, loss and the time left; without a terminal, lines.

    Args:
        progress, bar: display and its bar to show events in; by default a display of their own.
    """

    def __init__(self, progress: rich_progress.Progress | None = None, bar: rich_progress.TaskID | None = None) -> None:
        self._progress = progress or bars(rich_progress.TaskProgressColumn())
        self._bar = self._progress.add_task("reading", total=None) if bar is None else bar
        self._pace: Pace | None = None
        self._log, self._step_pace = LogLines(self._progress), StepPace()
        self._tokens, self._step = 0, ""

    def __enter__(self) -> Self:
        self._progress.__enter__()
        return self

    def __exit__(self, *stop: Any) -> None:
        self._progress.__exit__(*stop)

    def __call__(self, event: Event) -> None:
        """Show an event."""
        match event:
            case Preparing(step, share):
                self._begin(step)
                self._progress.update(self._bar, total=1.0, completed=share)
                self._step_pace.reach(share)
                if share:
                    self._log(f"{step}, {share:.0%}{self._step_pace.describe()}")
            case TrainingAdvanced():
                self._advance(event)
            case HeldOutMeasured(tokens=tokens, kept=kept):
                shares = ", ".join(f"{text} {share:.1%}" for text, share in kept.items())
                self._print(f"{tokens:,} tokens: kept {shares}")

    def _begin(self, step: str) -> None:
        if step != self._step:
            self._step, self._step_pace = step, StepPace()
            self._progress.reset(self._bar, total=None, description=step)
            if self._progress.disable:
                log(step)

    def _advance(self, event: TrainingAdvanced) -> None:
        """Show a training step."""
        if self._pace is None:
            self._pace = Pace()
        else:
            self._pace.advance(event.tokens - self._tokens)
        self._tokens = event.tokens
        speed, left = self._pace.rate(), self._pace.seconds_left(event.total - event.tokens)
        what = f"training, loss {event.loss:.3f}" + (f", {speed:,.0f} tokens/s" if speed else "")
        self._progress.update(self._bar, description=what, total=event.total, completed=event.tokens)
        ending = f", {describe_seconds(left)} left" if left is not None else ""
        self._log(f"{event.tokens:,} of {event.total:,} tokens: {what}{ending}")

    def _print(self, line: str) -> None:
        if self._progress.disable:
            log(line)
        else:
            self._progress.console.print(line, markup=False, highlight=False)


def distilled_table(done: Distilled) -> ReportTable:
    """Return a table with a row for each evaluation: loss, and what is kept of each text."""
    record = done.record
    columns = [
        ReportColumn("tokens", [f"{point.tokens:,}" for point in record.curve], number=False),
        ReportColumn("divergence", [point.loss for point in record.curve], significant(3)),
    ]
    for text in record.texts:
        group = text.label if text.trained_rows else f"{text.label}, watched"
        kept = [point.kept[text.label] for point in record.curve]
        perplexity = [point.perplexity[text.label] for point in record.curve]
        columns.append(ReportColumn("kept", kept, percent(1), group=group))
        columns.append(ReportColumn("perplexity", perplexity, significant(4), group=group, priority=1))
    caption = "On rows that are not trained on; kept: the teacher's perplexity over the student's; divergence: from "
    caption += "the teacher, in nats per token of trained texts. The last row is the written checkpoint."
    title = f"{record.student}, distilled from {record.teacher}"
    return ReportTable(columns=columns, title=title, caption=caption)


def distilled_lines(done: Distilled) -> Iterator[str]:
    """Yield lines on the written checkpoint."""
    yield f"{done.folder}: {describe_bytes(done.bytes)} of weights."
    yield from done.record.describe()
    yield from done.notes


def distilled_values(done: Distilled) -> dict[str, Any]:
    """Return the result as plain values, for programs."""
    return {"output": done.folder, "bytes": done.bytes, "notes": [*done.notes], **asdict(done.record)}
