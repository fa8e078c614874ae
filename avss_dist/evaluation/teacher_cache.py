"""A teacher's predictions of the texts of a distillation, measured once as cells and kept in a warehouse."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from avss_dist.core.errors import ConfigError, RunFailed
from avss_dist.core.intervention import NO_INTERVENTION
from avss_dist.core.names import LOSS, OTHERS, PERPLEXITY, PREDICTIONS
from avss_dist.core.settings import Settings
from avss_dist.core.text import describe_bytes
from avss_dist.corpus.shards import CorpusPlan
from avss_dist.distillation.events import OnEvent, Preparing, ignore
from avss_dist.distillation.loss import TextLoss as Sums
from avss_dist.distillation.pair import ModelPair
from avss_dist.distillation.texts import DistillText
from avss_dist.evaluation.events import CellDone, CellsStarted, Event
from avss_dist.evaluation.session import EvaluationSession, PlacedModel, PlannedTask
from avss_dist.models.size import footprint
from avss_dist.requests import DistillRequest
from avss_dist.stats.predictions import BYTES_OF_POSITION, BYTES_OF_TOKEN
from avss_dist.tasks.base import Task, TextLoss, combine
from avss_dist.tasks.cells import Cell
from avss_dist.tasks.predictions import TextPredictions
from avss_dist.warehouse.predictions import TABLE, StoredPredictions, is_readable

HELD_OUT_DRAWS = 32  # tokens that are drawn from the others at each held-out position, for the error of the cache


def measure_teacher(
    request: DistillRequest, models: ModelPair, texts: Sequence[DistillText], drawn: Sequence[NDArray[np.int64]]
) -> tuple[list[DistillText], list[Sums]]:
    """Return the texts with the teacher's predictions, and its loss on the held-out rows of each.

    A shard is measured if training reads one of its rows and the warehouse has no predictions of it.

    Args:
        drawn: rows that training reads, for each text to train on.

    Raises:
        ConfigError: there is too little space for the predictions.
        AvssError: the warehouse cannot be written, or the teacher cannot be measured.
    """
    settings = replace(models.teacher_settings, batch_size=Settings().batch_size)
    vocabulary = footprint(models.teacher, settings).vocabulary
    top = min(request.teacher_top or vocabulary, vocabulary)
    warehouse, progress = request.warehouse or f"{request.output}-warehouse", _Progress(request.on_event or ignore)
    with EvaluationSession.open(warehouse, settings, request.execution, progress) as session:
        model = session.place(models.teacher, settings)
        rows = [*drawn, *(np.zeros(0, np.int64) for _ in texts[len(drawn) :])]
        planned = [_plan(text, model, top, vocabulary, read) for text, read in zip(texts, rows, strict=True)]
        missing = [cell for text in planned for cell in text.missing(session)]
        _require_space(session, missing)
        progress.step = f"measuring the teacher, up to {describe_bytes(sum(map(_bytes, missing)))}"
        with session.keeping_workers():
            session.run(missing, again=True)
            watched = [(text.held_out, [NO_INTERVENTION]) for text in planned if text.trained is None]
            session.measure(watched)
        return [text.with_predictions(session) for text in planned], [text.loss(session) for text in planned]


@dataclass(frozen=True, kw_only=True)
class _PlannedText:
    """The tasks of a text.

    Attributes:
        held_out: task of the held-out rows: to predict them, or for a text that is only watched their loss.
        trained: task of predicting the rows to train on; None for a text that is only watched.
        parts: parts of ``trained`` that training reads.
    """

    text: DistillText
    held_out: PlannedTask
    trained: PlannedTask | None = None
    parts: Sequence[int] = ()

    def missing(self, session: EvaluationSession) -> Iterator[Cell]:
        """Yield the cells whose predictions are to be measured."""
        if self.trained is not None:
            cells, storage = self.trained.cells(), session.store.storage
            for cell in (*self.held_out.cells(), *(cells[part] for part in self.parts)):
                path = storage.path(TABLE, cell.run_id, cell.cell_id)
                stored = session.is_stored(cell) and is_readable(storage, path, _measure(cell).shard.num_sequences)
                if session.fresh or not stored:
                    yield cell

    def with_predictions(self, session: EvaluationSession) -> DistillText:
        """Return the text with the teacher's predictions."""
        if self.trained is None:
            return self.text
        trained, held_out = (_stored(session, planned) for planned in (self.trained, self.held_out))
        return replace(self.text, trained_predictions=trained, held_out_predictions=held_out)

    def loss(self, session: EvaluationSession) -> Sums:
        """Return the teacher's loss on the held-out rows.

        Raises:
            RunFailed: a cell is damaged.
        """
        planned = self.held_out
        results = {result.metric: result for result in combine(session.rows(planned.run_id()), len(planned.task.parts))}
        if LOSS not in results:
            raise RunFailed(
                f"The teacher's loss on {self.text.name} was measured, and cannot be read in {session.store.root}.",
                "Run the same command with `fresh`: it is measured again.",
            )
        others = results[OTHERS].samples.sum() if OTHERS in results else 0.0
        loss = results[LOSS]
        return Sums(surprise=float(loss.samples.sum()), tokens=int(loss.weights.sum()), others=float(others))


def _plan(text: DistillText, model: PlacedModel, top: int, vocabulary: int, rows: NDArray[np.int64]) -> _PlannedText:
    """Plan the tasks of a text.

    Args:
        top: number of tokens at each position.
        rows: rows to train on that training reads.
    """

    def plan(rows: CorpusPlan, draws: int) -> PlannedTask:
        parts = tuple(TextPredictions(shard=shard, top=top, draws=draws) for shard in rows.shards)
        return model.plan(Task(name=f"{PREDICTIONS}{text.name}", parts=parts))

    if text.trained is None:
        losses = tuple(TextLoss(shard) for shard in text.held_out.shards)
        return _PlannedText(text=text, held_out=model.plan(Task(name=f"{PERPLEXITY}{text.name}", parts=losses)))
    ends = np.cumsum([shard.num_sequences for shard in text.trained.shards])
    return _PlannedText(
        text=text,
        held_out=plan(text.held_out, HELD_OUT_DRAWS if top < vocabulary else 0),
        trained=plan(text.trained, 0),
        parts=np.unique(np.searchsorted(ends, rows, side="right")).tolist(),
    )


def _measure(cell: Cell) -> TextPredictions:
    assert isinstance(cell.measure, TextPredictions)
    return cell.measure


def _stored(session: EvaluationSession, planned: PlannedTask) -> StoredPredictions:
    """Return the predictions of a task's rows, in their order."""
    storage, cells = session.store.storage, planned.cells()
    return StoredPredictions(
        root=storage.address,
        paths=tuple(storage.path(TABLE, cell.run_id, cell.cell_id) for cell in cells),
        rows=tuple(_measure(cell).shard.num_sequences for cell in cells),
    )


def _bytes(cell: Cell) -> int:
    """Return the size of a cell's predictions before compression."""
    measure = _measure(cell)
    return measure.shard.num_tokens * (BYTES_OF_POSITION + BYTES_OF_TOKEN * (measure.top + measure.draws))


def _require_space(session: EvaluationSession, missing: Sequence[Cell]) -> None:
    """Raise ConfigError if the disk of a local warehouse has too little space for predictions.

    Raises:
        ConfigError: the message has the size, and the hint what lowers it.
    """
    storage = session.store.storage
    needed, tokens = sum(map(_bytes, missing)), sum(_measure(cell).shard.num_tokens for cell in missing)
    free = shutil.disk_usage(storage.base).free if storage.is_local else needed
    if needed > free:
        raise ConfigError(
            f"The teacher's predictions of {tokens:,} tokens take up to {describe_bytes(needed)} in {storage.root}, "
            f"{needed // tokens:,} bytes for each; there are {describe_bytes(free)}.",
            "Lower `teacher_top`, set `max_sequences`, or name a `warehouse` on another disk.",
        )


class _Progress:
    """Callback of a session that tells a distillation's callback how much of the predictions is measured."""

    def __init__(self, on_event: OnEvent) -> None:
        self._on_event = on_event
        self.step = "measuring the teacher"
        self._cells, self._done = 0, 0

    def __call__(self, event: Event) -> None:
        """Pass an event on."""
        if isinstance(event, CellsStarted):
            self._cells, self._done = len(event.cells), event.done
        elif isinstance(event, CellDone):
            self._done += 1
        else:
            return
        if self._cells:
            self._on_event(Preparing(self.step, self._done / self._cells))
