"""Progress of scoring, evaluation and distillation: bars on a terminal, lines in a log, and the pace of the work."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from rich import progress as rich_progress
from rich.text import Text

from avss_dist.core.intervention import count_removed, describe_removed
from avss_dist.core.streams import console, say
from avss_dist.core.text import basename
from avss_dist.distillation.curve import CurvePoint, Preparing, TrainingAdvanced
from avss_dist.evaluation.events import CellDone, CellsStarted, CellUnderway, Event, MemoryNeeded, Remark, SearchStep
from avss_dist.partition.catalog import WHOLE
from avss_dist.runs.events import (
    LOG_SECONDS,
    LogRuns,
    Pace,
    RunEnded,
    RunReading,
    RunStarted,
    ShardMeasured,
    WatchNote,
    describe_repeated,
)
from avss_dist.warehouse.names import OWN_TEXT, REPAIR

if TYPE_CHECKING:
    from avss_dist.tasks.task import Cell


SHOWN_ENDED = 10  # bars of runs that are over
MAX_NAME = 60  # cells of a name beside a bar


class _Speed(rich_progress.ProgressColumn):
    def render(self, task: rich_progress.Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} tokens/s" if speed else "", style="cyan")


class TimeColumn(rich_progress.ProgressColumn):
    """A column with the elapsed time of a task, updated all the time, and the time that is left once it is known."""

    def __init__(self) -> None:
        super().__init__()
        self._paces: dict[rich_progress.TaskID, Pace] = {}

    def render(self, task: rich_progress.Task) -> Text:
        at = task.get_time()
        total = task.total or 0
        pace = self._paces.get(task.id)
        # The task begins, or begins again.
        if pace is None or total != pace.total or task.completed < pace.done:
            pace = Pace(total, task.completed, now=at)
            self._paces[task.id] = pace
        pace.reach(task.completed, at)
        elapsed = (task.finished_time if task.finished else task.elapsed) or 0
        text = str(timedelta(seconds=int(elapsed)))
        remaining = None
        if total and not task.finished:
            remaining = pace.seconds_left(at)
        if remaining is not None:
            text += f", {timedelta(seconds=int(remaining))} left"
        return Text(text, style="cyan")


class _Bars(rich_progress.Progress):
    """Progress on standard error, for terminals and notebooks: description, bar, ``columns``, time."""

    def __init__(self, *columns: rich_progress.ProgressColumn) -> None:
        terminal = console(stderr=True)
        super().__init__(
            rich_progress.TextColumn("{task.description}", markup=False),
            rich_progress.BarColumn(),
            *columns,
            TimeColumn(),
            console=terminal,
            disable=not (terminal.is_terminal or terminal.is_jupyter),
        )


def log(what: str) -> None:
    """Print a line with the time of day (UTC) to standard error."""
    say(f"{datetime.now(UTC):%H:%M:%S} {what}")


class Progress(_Bars):
    """Callback for the events of runs: a bar for each run, with tokens/s and the time that is left."""

    def __init__(self) -> None:
        super().__init__(rich_progress.TaskProgressColumn(), _Speed())
        self._runs: dict[str, rich_progress.TaskID] = {}

    def __call__(self, event: object) -> None:
        """Show an event. How a replica is spread is printed on a terminal, or if it is not a single whole model."""
        match event:
            case WatchNote(_, text):
                self.print(text, markup=False, highlight=False)
            case RunReading(name):
                self._runs[name] = self.add_task(f"{_short(name)}: reading", total=None)
            case RunStarted(name, total, done, placement):
                if self.console.is_terminal or placement.partition != WHOLE:
                    self.print(f"{_short(name)}: {placement.partition}; {placement.why}.", markup=False)
                self.reset(self._runs[name], start=False, total=total, completed=done, description=_short(name))
            case ShardMeasured(name, num_tokens):
                self.start_task(self._runs[name])
                self.advance(self._runs[name], num_tokens)
            case RunEnded(name, run, repeats):
                if repeats:
                    self.print(f"{_short(name)}: {describe_repeated(_short(repeats))}", markup=False)
                ended = self._runs.pop(name, None)
                if ended is not None:
                    self.update(ended, description=f"{_short(name)}: {run.status}")
                    self.stop_task(ended)
                self._hide_ended()

    def _hide_ended(self) -> None:
        """Hide the bars of runs that are over, but for the last ones."""
        over = [task for task in self.tasks if task.visible and task.stop_time is not None]
        for task in over[:-SHOWN_ENDED]:
            self.update(task.id, visible=False)


def run_progress(num_runs: int | None, *, ends: bool = True) -> AbstractContextManager[Progress | LogRuns]:
    """Return a callback for the events of runs: bars on a terminal, otherwise lines.

    Args:
        num_runs: number of runs; None if it is not known.
        ends: print a line at the end of each run, if there are no bars.
    """
    if console(stderr=True).is_terminal:
        return Progress()
    return nullcontext(LogRuns(log, num_runs, ends=ends))


class StepProgress(_Bars):
    """Callback for the events of `shrink` and `distill`: one bar over all steps. Without a terminal, lines."""

    def __init__(self, column: rich_progress.ProgressColumn | None = None) -> None:
        super().__init__(column or rich_progress.TaskProgressColumn())
        self._bar = self.add_task("reading", total=None)
        self._step = "reading"
        self._pace = Pace()
        self._training: Pace | None = None
        self._logged_at = time.monotonic()
        self._notes: set[str] = set()

    def __call__(self, event: Event) -> None:
        """Show an event."""
        match event:
            case RunStarted(_, num_tokens, done_tokens):
                self._begin("scoring layers", num_tokens, done_tokens, "tokens")
            case CellsStarted(cells, done) if cells:
                self._begin(_describe_step(cells[0]), len(cells), done, "evaluations")
            case ShardMeasured(_, num_tokens):
                self._advance(num_tokens, self._step)
            case CellUnderway(_, step, share):
                description = f"{step[0].lower()}{step[1:]}, {share:.0%}"
                self._show(f"{description}{self._pace.describe()}", description=description)
            case CellDone(cell, notes):
                self._print_notes(notes)
                self._advance(1, _describe_step(cell))
            case Remark(text):
                self._print_notes([text])
            case Preparing(step, share):
                if step != self._step:
                    self._begin(step, 1.0)
                self.update(self._bar, total=1.0, completed=share)
                self._pace.reach(share)
                if share:
                    self._show(f"{step}, {share:.0%}{self._pace.describe()}")
            case TrainingAdvanced(tokens=tokens, total=total, loss=loss):
                if self._training is None:
                    self._training = Pace(total, tokens, "tokens")
                self._training.reach(tokens)
                self._show(
                    f"{tokens:,} of {total:,} tokens: training, loss {loss:.3f}{self._training.describe()}",
                    description=f"training, loss {loss:.3f}",
                    total=total,
                    completed=tokens,
                )
            case CurvePoint(tokens=tokens, kept=kept):
                shares = [f"{text} {share:.1%}" for text, share in kept.items()]
                self._say(f"{tokens:,} tokens: kept {', '.join(shares)}")

    def _say(self, line: str) -> None:
        """Print a line above the bar, or in the log."""
        if self.disable:
            log(line)
        else:
            self.print(line, markup=False, highlight=False)

    def _begin(self, what: str, total: float, done: float = 0, unit: str = "", *, said: bool = True) -> None:
        """Begin a step of ``total`` units, of which ``done`` are done."""
        self.reset(self._bar, total=total, completed=done, description=what, visible=True)  # type: ignore[arg-type]
        self._step = what
        self._pace = Pace(total, done, unit)
        if said and self.disable and done != total:
            log(what)

    def _advance(self, amount: int, what: str) -> None:
        """Count finished units of a step."""
        self._pace.reach(self._pace.done + amount)
        share = self._pace.done / (self._pace.total or 1)
        self._show(f"{self._step}: {share:.0%}{self._pace.describe()}", advance=amount, description=what)

    def _show(self, line: str, **changes: Any) -> None:
        """Change the bar, or log a line where no bar is shown, one every `LOG_SECONDS` at most."""
        self.update(self._bar, **changes)
        if self.disable and time.monotonic() - self._logged_at > LOG_SECONDS:
            self._logged_at = time.monotonic()
            log(line)

    def _print_notes(self, notes: Sequence[str]) -> None:
        """Print each note on how cells were measured once."""
        for note in notes:
            if note not in self._notes:
                self._notes.add(note)
                self.print(f"Note: {note}", markup=False, highlight=False)


class CellProgress(StepProgress):
    """Callback for the events of an evaluation: one bar over all cells of a round, and a line for each search step."""

    def __init__(self) -> None:
        super().__init__(rich_progress.MofNCompleteColumn())
        self.update(self._bar, visible=False)  # until cells are known
        self._part = Pace()

    def __call__(self, event: Event) -> None:
        """Show an event.

        The time left of a long cell is that of its step, until that of all cells is known, and after that has passed.
        """
        match event:
            case Preparing(step, share):
                what = f"{step}, {share:.0%}" if share else step
                self._show(what, description=what, visible=True)
            case MemoryNeeded() if event.is_large:
                self._say(event.describe())
            case Remark(text):
                self._print_notes([text])
            case CellsStarted(cells, done):
                self._begin("evaluating", len(cells), done, "evaluations", said=False)
            case CellUnderway(cell, step, share):
                name = _short(cell.checkpoint.name)
                if step != self._step:
                    self._step = step
                    self._part = Pace(done=share)
                self._part.reach(share)
                pace = self._pace if self._pace.seconds_left() else self._part
                self._show(
                    f"{name}: {step}, {share:.0%}; {self._pace.done} of {self._pace.total} evaluated{pace.describe()}",
                    description=f"{name}{describe_without(cell)}: {step}, {share:.0%}",
                )
            case CellDone(cell, notes):
                self._print_notes(notes)
                name = _short(cell.checkpoint.name)
                self._step = ""
                self._pace.reach(self._pace.done + 1)
                self._show(
                    f"{name}: {self._pace.done} of {self._pace.total} evaluated{self._pace.describe()}",
                    advance=1,
                    description=f"{name}{describe_without(cell)}",
                )
            case SearchStep(best=best, sets=sets) if self.console.is_terminal:
                loss = f"loss {best.value:.4f} without {describe_removed(best.removed)}"
                self.print(f"{sets} sets: {loss}", markup=False, highlight=False)


def _describe_step(cell: Cell) -> str:
    """Return what is done with a cell, in words."""
    step = "evaluating"
    if cell.task.startswith(REPAIR):
        step = "fitting the repair"
    elif cell.task == OWN_TEXT:
        step = "writing text"
    return f"{step}{describe_without(cell)}"


def describe_without(cell: Cell) -> str:
    """Return `` without 3 layers`` for a cell that removes layers, and an empty text for others."""
    removed = cell.intervention.removed
    if not removed:
        return ""
    return f" without {count_removed(removed)}"


def _short(name: str) -> str:
    """Return the last parts of the paths of a model and of a corpus."""
    parts = [basename(path) for path in name.split(" on ")]
    return " on ".join(parts)[:MAX_NAME]
