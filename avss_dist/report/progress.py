"""How the work goes, drawn on a terminal; nothing where the output is none."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from rich import progress as rich_progress
from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from avss_dist.partition.base import Placement
    from avss_dist.run import Run


class _Speed(rich_progress.ProgressColumn):
    def render(self, task: rich_progress.Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} tokens/s" if speed else "", style="cyan")


class Progress:
    """A `run.Reporter`: a bar for each run, with tokens/s and the time that is left."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._progress = rich_progress.Progress(
            rich_progress.TextColumn("{task.description}", markup=False),
            rich_progress.BarColumn(),
            rich_progress.TaskProgressColumn(),
            _Speed(),
            rich_progress.TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = rich_progress.TaskID(0)
        self._open = False

    def __enter__(self) -> Progress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def planning(self, model: str) -> None:
        """A new run: its text is read and its tokens are counted."""
        self._task = self._progress.add_task(f"{_short(model)}: reading", total=None)
        self._open = True

    def placed(self, model: str, placement: Placement) -> None:
        """How a replica is spread; said where it is not the plain way, or somebody looks."""
        if self._progress.console.is_terminal or placement.partition != "single":
            self._progress.console.print(f"{_short(model)}: {placement.partition}; {placement.why}.", markup=False)

    def started(self, model: str, num_tokens: int, done_tokens: int) -> None:
        """Shards are being measured; ``done_tokens`` were measured before."""
        self._progress.reset(self._task, total=num_tokens, completed=done_tokens, description=_short(model))

    def advanced(self, num_tokens: int) -> None:
        """A shard is done."""
        self._progress.advance(self._task, num_tokens)

    def finished(self, run: Run) -> None:
        """A run is over."""
        if self._open:
            self._progress.update(self._task, description=f"{_short(run.model)}: {run.status}")
            self._progress.stop_task(self._task)
        self._open = False


def _short(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2][:40]
