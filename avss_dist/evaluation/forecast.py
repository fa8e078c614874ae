"""Forecast of what a command would do: evaluations, passes, tokens, memory and time, and what is stored already.

Nothing is measured or written. Times are those of the warehouse: of losses of the same checkpoint that it has, or else
of a finished run of a model of the same shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pyarrow as pa

from avss_dist.core.results import TabularResult
from avss_dist.core.settings import Settings
from avss_dist.corpus.shards import Shard
from avss_dist.evaluation.events import MemoryNeeded, OnEvent
from avss_dist.evaluation.memory import estimate_memory
from avss_dist.evaluation.pace import PastSpeed
from avss_dist.evaluation.placed import PlacedModel
from avss_dist.evaluation.session import EvaluationSession
from avss_dist.models.checkpoint.loading import text_config
from avss_dist.partition.execution import Execution
from avss_dist.tasks.backward import BackwardMeasure
from avss_dist.tasks.map_damage import RoundedLosses
from avss_dist.tasks.own_text import WriteTexts
from avss_dist.tasks.shapley import Shapley
from avss_dist.tasks.task import Cell, Measure
from avss_dist.tasks.text_loss import ContinuePrompt, LeaveOneOut

BACKWARD = 2
"""Forward passes that take as long as a backward pass."""


@dataclass(frozen=True, kw_only=True)
class ForecastStep:
    """A step of a command.

    Attributes:
        step: what is done, in words.
        evaluations: parts of the work that are measured and stored alone.
        stored: evaluations that are stored already.
        passes: forward passes of a batch that are missing, where a backward pass counts as two. None if unknown.
        tokens: tokens that these passes read. None if unknown.
        seconds: time of the missing work. None if no speed is known.
        reference: what the speed was measured by: an evaluation or a run.
    """

    step: str
    evaluations: int
    stored: int = 0
    passes: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    reference: str = ""


@dataclass(frozen=True, kw_only=True, repr=False)
class Forecast(TabularResult):
    """The work that a command would do, step by step.

    Attributes:
        steps: its steps, in order.
        memory: memory of each process; None if unknown, or if nothing is missing.
        notes: sentences for people.
    """

    steps: Sequence[ForecastStep]
    memory: MemoryNeeded | None = None
    notes: Sequence[str] = field(default=())

    @property
    def seconds(self) -> float | None:
        """Time of all steps; None if that of one with missing work is not known."""
        total = 0.0
        for step in self.steps:
            if step.stored == step.evaluations:
                continue
            if step.seconds is None:
                return None
            total += step.seconds
        return total

    def table(self) -> pa.Table:
        """Return a table with a row for each step, and the memory and the notes of the whole command in each."""
        rows = []
        memory = None if self.memory is None else self.memory.total
        for step in self.steps:
            rows.append({**asdict(step), "memory": memory, "notes": list(self.notes)})
        return pa.Table.from_pylist(rows)

    def summary(self) -> str:
        """Return the number of missing evaluations, in a line."""
        missing = sum(step.evaluations - step.stored for step in self.steps)
        return f"{missing:,} evaluations are missing"


@contextmanager
def forecasting(
    warehouse: str | Path, settings: Settings, execution: Execution, on_event: OnEvent | None
) -> Iterator[EvaluationSession]:
    """Open a session that plans, and neither creates the warehouse nor measures anything."""
    with EvaluationSession.open(warehouse, settings, execution, on_event, create=False) as session:
        yield session


def forecast_step(
    session: EvaluationSession,
    step: str,
    cells: Iterable[Cell],
    model: PlacedModel,
    speed: PastSpeed | None,
    *,
    stored: bool = True,
) -> ForecastStep:
    """Return what measuring cells of a model would take.

    Args:
        speed: see `past_speed`.
        stored: look up which cells are stored; otherwise all are missing.
    """
    distinct = {(cell.run_id, cell.cell_id): cell for cell in cells}
    missing = list(distinct.values())
    if stored:
        missing = [cell for cell in missing if not session.is_known(cell)]
    num_layers = getattr(text_config(model.checkpoint).get_text_config(), "num_hidden_layers", None) or 1
    work = _total_work(missing, num_layers, model.settings)
    stored_cells = len(distinct) - len(missing)
    if work is None:
        return ForecastStep(step=step, evaluations=len(distinct), stored=stored_cells)
    forecast = forecast_work(step, work, speed)
    if forecast.seconds is not None:
        forecast = replace(forecast, seconds=forecast.seconds / session.executor.replicas(model.placement))
    return replace(forecast, evaluations=len(distinct), stored=stored_cells)


@dataclass(frozen=True)
class Work:
    """Forward passes of a batch.

    Attributes:
        tokens: tokens that the passes read.
        computed_tokens: tokens that whole passes of the same time would read. Passes that resume take less.
    """

    passes: int
    tokens: int
    computed_tokens: float

    def __add__(self, other: Work) -> Work:
        """Return both together."""
        return Work(
            self.passes + other.passes, self.tokens + other.tokens, self.computed_tokens + other.computed_tokens
        )

    def times(self, number: int) -> Work:
        """Return the work of doing this so many times."""
        return Work(number * self.passes, number * self.tokens, number * self.computed_tokens)


def _total_work(cells: Iterable[Cell], num_layers: int, settings: Settings) -> Work | None:
    """Return the work of cells together. None if that of one is not known."""
    total = Work(0, 0, 0.0)
    for cell in cells:
        work = _work(cell.measure, num_layers, settings)
        if work is None:
            return None
        total += work
    return total


def _work(measure: Measure, num_layers: int, settings: Settings) -> Work | None:
    """Return the work of a measure, or None for one whose text is not known before it is read in a worker."""
    if isinstance(measure, ContinuePrompt):
        tokens = len(measure.prompt) + measure.tokens
        return Work(measure.tokens, tokens, tokens)
    if isinstance(measure, WriteTexts):  # Each text is taken to fill a row.
        tokens = measure.count * settings.sequence_length
        return Work(settings.sequence_length, tokens, tokens)
    shards = _shards(measure)
    if not shards:
        return None
    times = _passes_over_text(measure, num_layers)
    computed_times: float = times
    if isinstance(measure, LeaveOneOut | RoundedLosses):
        # The first pass is whole. The others resume at the layer that changes, in the middle on average.
        computed_times = 1 + (times - 1) / 2
    batches = sum(-(-shard.num_sequences // settings.batch_size) for shard in shards)
    tokens = sum(shard.num_tokens for shard in shards)
    return Work(times * batches, times * tokens, computed_times * tokens)


def _shards(measure: Measure) -> list[Shard]:
    """Return the text that a measure reads. Empty if it is not known."""
    shard = getattr(measure, "shard", None)
    if shard is not None:
        return [shard]
    return list(getattr(measure, "shards", ()))


def _passes_over_text(measure: Measure, num_layers: int) -> int:
    """Return how often a measure reads its text, at most."""
    if isinstance(measure, LeaveOneOut):
        removed = num_layers
        if measure.layers is not None:
            removed = len(measure.layers)
        elif measure.sublayers:
            removed = 2 * num_layers
        return 1 + removed
    if isinstance(measure, Shapley):
        return len(measure.seeds) * (num_layers + 1)
    if isinstance(measure, RoundedLosses):
        return 1 + num_layers
    if isinstance(measure, BackwardMeasure):
        return 1 + BACKWARD * (1 + measure.draws)
    return 1


def forecast_work(step: str, work: Work, speed: PastSpeed | None) -> ForecastStep:
    """Return a step of missing work, as one evaluation by one model.

    Args:
        speed: see `past_speed`.
    """
    forecast = ForecastStep(step=step, evaluations=1, passes=work.passes, tokens=work.tokens)
    if speed is None:
        return forecast
    seconds = work.computed_tokens / speed.tokens_per_second
    return replace(forecast, seconds=seconds, reference=speed.reference)


def repeated(step: ForecastStep, name: str, times: int) -> ForecastStep:
    """Return a step that does the missing work of another one so many times, under another name."""
    missing = step.evaluations - step.stored
    passes = None if step.passes is None else times * step.passes
    tokens = None if step.tokens is None else times * step.tokens
    seconds = None if step.seconds is None else times * step.seconds
    return replace(
        step, step=name, evaluations=times * missing, stored=0, passes=passes, tokens=tokens, seconds=seconds
    )


def forecast_memory(session: EvaluationSession, model: PlacedModel, cells: Iterable[Cell]) -> MemoryNeeded | None:
    """Return the memory that each process needs for the missing cells of a model. See `estimate_memory`."""
    missing = [cell.measure for cell in cells if not session.is_known(cell)]
    return estimate_memory(model, missing, session.executor.devices)


def larger(first: MemoryNeeded | None, second: MemoryNeeded | None) -> MemoryNeeded | None:
    """Return the larger of two needs of memory, of steps that follow each other."""
    if first is None or (second is not None and second.total > first.total):
        return second
    return first
