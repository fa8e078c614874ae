"""Progress of scoring and evaluation: bars on a terminal, lines in a log."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from rich import progress as rich_progress
from rich.text import Text

from avss_dist.core.intervention import count_removed, describe_removed
from avss_dist.core.registry import WHOLE
from avss_dist.core.text import basename, describe_seconds
from avss_dist.evaluation.events import CellDone, CellsStarted, CellUnderway, Event, SearchStep
from avss_dist.report.terminal.pace import Pace
from avss_dist.runs.events import (
    LOG_SECONDS,
    RunEnded,
    RunPlaced,
    RunReading,
    RunRepeated,
    RunStarted,
    ShardMeasured,
)
from avss_dist.system.streams import console, say

if TYPE_CHECKING:
    from avss_dist.runs.run import Run
    from avss_dist.tasks.cells import Cell


SHOWN_ENDED = 10  # bars of runs that are over


class _Speed(rich_progress.ProgressColumn):
    def render(self, task: rich_progress.Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} tokens/s" if speed else "", style="cyan")


class TimeColumn(rich_progress.ProgressColumn):
    """A column with the elapsed time of a task, updated all the time, and the time that is left once it is known."""

    def __init__(self) -> None:
        super().__init__()
        self._paces: dict[rich_progress.TaskID, tuple[Pace, float, float | None]] = {}

    def render(self, task: rich_progress.Task) -> Text:
        passed = task.finished_time if task.finished else task.elapsed
        remaining = self._seconds_left(task)
        text = str(timedelta(seconds=int(passed or 0)))
        return Text(text if remaining is None else f"{text}, {timedelta(seconds=int(remaining))} left", style="cyan")

    def _seconds_left(self, task: rich_progress.Task) -> float | None:
        """Return the seconds until a task is finished, by its pace so far, or None if that is unknown."""
        pace, completed, total = self._paces.get(task.id, (None, 0.0, None))
        now = task.get_time()
        if pace is None or task.total != total or task.completed < completed:  # it begins
            pace = Pace(now)
        elif task.completed > completed:
            pace.advance(task.completed - completed, now)
        self._paces[task.id] = pace, task.completed, task.total
        if task.finished or task.total is None:
            return None
        return pace.seconds_left(task.total - task.completed, now)


def bars(*columns: rich_progress.ProgressColumn) -> rich_progress.Progress:
    """Return a progress display on standard error, for terminals and notebooks: description, bar, ``columns``, time."""
    terminal = console(stderr=True)
    return rich_progress.Progress(
        rich_progress.TextColumn("{task.description}", markup=False),
        rich_progress.BarColumn(),
        *columns,
        TimeColumn(),
        console=terminal,
        disable=not (terminal.is_terminal or terminal.is_jupyter),
    )


def log(what: str, file: TextIO | None = None) -> None:
    """Print a line with the time of day (UTC) to standard error or a file like it."""
    say(f"{datetime.now(UTC):%H:%M:%S} {what}", file)


def describe_pace(pace: Pace, remaining: float, unit: str = "") -> str:
    """Return the rate and the time that is left, after a comma each; empty while the pace is not steady.

    Args:
        remaining: amount of work that is left.
        unit: what is counted, a plural; the rate is left out without it.
    """
    rate, seconds = pace.rate(), pace.seconds_left(remaining)
    if not rate or seconds is None:
        return ""
    speed = f", {rate:,.0f} {unit}/s" if rate >= 1 else f", {60 * rate:.2g} {unit}/min"
    return f"{speed if unit else ''}, {describe_seconds(seconds)} left"


class LogLines:
    """Log lines where no bar is shown, one every `LOG_SECONDS` at most.

    Args:
        progress: display of the bar. Nothing is logged unless it is disabled.
    """

    def __init__(self, progress: rich_progress.Progress) -> None:
        self._progress, self._logged_at = progress, time.monotonic()

    def __call__(self, what: str) -> None:
        """Log a line if the last one is long ago."""
        if self._progress.disable and time.monotonic() - self._logged_at > LOG_SECONDS:
            self._logged_at = time.monotonic()
            log(what)


class StepPace:
    """Pace of a step, and its work so far.

    Args:
        total, done: amount of its work, and of what was done before.
        unit: see `describe_pace`.
    """

    def __init__(self, total: float = 1.0, done: float = 0.0, unit: str = "") -> None:
        self._pace, self._total, self._done, self._unit = Pace(), total, done, unit

    def reach(self, done: float) -> None:
        """Count the work up to ``done``."""
        if done > self._done:
            self._pace.advance(done - self._done)
            self._done = done

    def describe(self) -> str:
        """Return the result of `describe_pace`."""
        return describe_pace(self._pace, self._total - self._done, self._unit)


class Progress:
    """Callback for the events of runs: a bar for each run, with tokens/s and the time that is left."""

    def __init__(self) -> None:
        self._progress = bars(rich_progress.TaskProgressColumn(), _Speed())
        self._tasks: dict[str, rich_progress.TaskID] = {}
        self._ended: deque[rich_progress.TaskID] = deque()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, event: object) -> None:
        """Show an event. How a replica is spread is printed on a terminal, or if it is not a single whole model."""
        match event:
            case RunReading(name):
                self._tasks[name] = self._progress.add_task(f"{_short(name)}: reading", total=None)
            case RunRepeated(name, first):
                self._print(f"{_short(name)}: {event.describe(_short(first))}")
            case RunPlaced(name, placement) if self._progress.console.is_terminal or placement.partition != WHOLE:
                self._print(f"{_short(name)}: {placement.partition}; {placement.why}.")
            case RunStarted(name, total, done):
                task = self._tasks[name]
                self._progress.reset(task, start=False, total=total, completed=done, description=_short(name))
            case ShardMeasured(name, num_tokens):
                self._progress.start_task(self._tasks[name])
                self._progress.advance(self._tasks[name], num_tokens)
            case RunEnded(name, run):
                self._end(name, run)

    def _print(self, text: str) -> None:
        self._progress.console.print(text, markup=False)

    def _end(self, name: str, run: Run) -> None:
        if (task := self._tasks.pop(name, None)) is not None:
            self._progress.update(task, description=f"{_short(name)}: {run.status}")
            self._progress.stop_task(task)
            self._ended.append(task)
            if len(self._ended) > SHOWN_ENDED:
                self._progress.update(self._ended.popleft(), visible=False)


def run_progress(num_runs: int, *, ends: bool = True) -> Progress | ProgressLines:
    """Return a callback for the events of runs: bars on a terminal, otherwise lines.

    Args:
        ends: print a line at the end of each run, if there are no bars.
    """
    return Progress() if console(stderr=True).is_terminal else ProgressLines(num_runs, ends=ends)


class CellProgress:
    """Callback for the events of an evaluation: one bar over all cells of a round, and a line for each search step."""

    def __init__(self) -> None:
        self._progress = bars(rich_progress.MofNCompleteColumn())
        self._task: rich_progress.TaskID | None = None
        self._log = LogLines(self._progress)
        self._done, self._cells, self._step = 0, 0, ""
        self._pace = self._step_pace = StepPace()
        self._notes: set[str] = set()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        """Show an event."""
        match event:
            case CellsStarted(cells, done):
                self._begin(len(cells), done)
            case CellUnderway(cell, step, share):
                assert self._task is not None
                self._progress.update(self._task, description=f"{describe_cell(cell)}: {step}, {share:.0%}")
                self._log_step(cell, step, share)
            case CellDone(cell, notes):
                assert self._task is not None
                self._print_notes(notes)
                self._progress.update(self._task, advance=1, description=describe_cell(cell))
                self._done += 1
                self._step = ""
                self._pace.reach(self._done)
                self._log(self._describe(cell))
            case SearchStep(best=best, sets=sets) if self._progress.console.is_terminal:
                loss = f"loss {best.value:.4f} without {describe_removed(best.removed)}"
                self._progress.console.print(f"{sets} sets: {loss}", markup=False, highlight=False)

    def _print_notes(self, notes: Sequence[str]) -> None:
        """Print each note on how cells were measured once."""
        for note in notes:
            if note not in self._notes:
                self._notes.add(note)
                self._progress.console.print(f"Note: {note}", markup=False, highlight=False)

    def _begin(self, cells: int, done: int) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task("evaluating", total=cells, completed=done)
        self._done, self._cells = done, cells
        self._pace = StepPace(cells, done, "evaluations")

    def _describe(self, cell: Cell) -> str:
        """Return how many cells are evaluated, with the pace."""
        return f"{_short(cell.checkpoint.name)}: {self._done} of {self._cells} evaluated{self._pace.describe()}"

    def _log_step(self, cell: Cell, step: str, share: float) -> None:
        """Log the progress of a long cell. The time left is that of its step, until that of all cells is known."""
        if step != self._step:
            self._step, self._step_pace = step, StepPace()
        self._step_pace.reach(share)
        pace = self._pace.describe() or self._step_pace.describe()
        name, cells = _short(cell.checkpoint.name), f"{self._done} of {self._cells} evaluated"
        self._log(f"{name}: {step}, {share:.0%}; {cells}{pace}")


def describe_cell(cell: Cell) -> str:
    """Return a short description of a cell: ``model without 3 layers``."""
    return f"{_short(cell.checkpoint.name)}{describe_without(cell)}"


def describe_without(cell: Cell) -> str:
    """Return `` without 3 layers`` for a cell that removes layers, and an empty text for others."""
    removed = cell.intervention.removed
    return f" without {count_removed(removed)}" if removed else ""


class ProgressLines:
    """Callback for the events of runs in a file or a job's log: a line at the end of each, and lines at intervals.

    Args:
        num_runs: number of runs.
        seconds: minimum time between two lines of progress.
        ends: print a line at the end of each run.
    """

    def __init__(
        self, num_runs: int, *, seconds: float = LOG_SECONDS, ends: bool = True, file: TextIO | None = None
    ) -> None:
        self._num_runs, self._seconds, self._file = num_runs, seconds, file
        self._ends, self._ended = ends, 0
        self._logged_at = time.monotonic()
        self._tokens: dict[str, tuple[int, int]] = {}  # tokens that are measured, and in all, by run
        self._paces: dict[str, Pace] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def __call__(self, event: object) -> None:
        """Show an event. How a replica is spread is printed if it is not a single whole model."""
        match event:
            case RunRepeated(name):
                self._print(f"{name}: {event.describe()}")
            case RunPlaced(name, placement) if placement.partition != WHOLE:
                self._print(f"{name}: {placement.partition}; {placement.why}.")
            case RunStarted(name, num_tokens, done_tokens):
                with self._lock:
                    self._tokens[name] = done_tokens, num_tokens
                    self._paces[name] = Pace()
            case ShardMeasured(name, num_tokens):
                self._advance(name, num_tokens)
            case RunEnded(name, run):
                self._end(name, run)

    def _advance(self, name: str, num_tokens: int) -> None:
        """Count a measured shard, and print a line if the last one is long ago."""
        with self._lock:
            done, total = self._tokens[name]
            done += num_tokens
            self._tokens[name] = done, total
            pace = self._paces[name]
            pace.advance(num_tokens)
            if time.monotonic() - self._logged_at < self._seconds:
                return
            self._logged_at = time.monotonic()
        self._print(f"{name}: {done / total:.0%} of {total:,} tokens{describe_pace(pace, total - done, 'tokens')}")

    def _end(self, name: str, run: Run) -> None:
        with self._lock:
            self._tokens.pop(name, None)
            self._paces.pop(name, None)
            self._ended += 1
        if not self._ends:
            return
        error = f": {run.error.splitlines()[0]}" if run.error else ""
        self._print(f"{self._ended} of {self._num_runs} runs: {name} {run.status}{error}")

    def _print(self, what: str) -> None:
        log(what, self._file)


def _short(name: str) -> str:
    """Return the last parts of the paths of a model and of a corpus."""
    return " on ".join(basename(path) for path in name.split(" on "))[:60]
