"""Sessions: what is measured, what is known before, and in which order events tell of it."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from support.causal_lm import SMALL

from avss_dist.core.errors import AvssError
from avss_dist.core.intervention import NO_INTERVENTION
from avss_dist.core.settings import Execution, Settings
from avss_dist.evaluation.events import CellDone, CellsStarted, Event
from avss_dist.evaluation.session import EvaluationSession, PlannedTask, results_under
from avss_dist.evaluation.tasks import text_task
from avss_dist.executors.local import LocalExecutor
from avss_dist.models.checkpoints import resolve
from avss_dist.warehouse.store import Store

TEXT = "builtin:pydoc"
SETTINGS = Settings(**SMALL | {"max_sequences": 8, "sequences_per_shard": 4})
WITHOUT = NO_INTERVENTION.without(1)


class Events(list[Event]):
    """Events of a session, in their order.

    Args:
        stop_after: number of measured cells after which the session is interrupted.
    """

    def __init__(self, stop_after: int | None = None) -> None:
        super().__init__()
        self._stop_after = stop_after

    def __call__(self, event: Event) -> None:
        self.append(event)
        if self._stop_after == sum(isinstance(event, CellDone) for event in self):
            raise KeyboardInterrupt

    def counts(self) -> list[tuple[int, int, int]]:
        """Cells, cells that were known, and cells that were measured, of each round."""
        rounds: list[tuple[int, int, int]] = []
        for event in self:
            if isinstance(event, CellsStarted):
                rounds.append((len(event.cells), event.done, 0))
            elif isinstance(event, CellDone):
                rounds[-1] = (*rounds[-1][:2], rounds[-1][2] + 1)
        return rounds


def session_of(
    folder: Path, executor: LocalExecutor, events: Events | None = None, **execution: Any
) -> tuple[EvaluationSession, Events]:
    events, store = Events() if events is None else events, Store(folder)
    store.create()
    return EvaluationSession(store, executor, Execution(**execution), events), events


def task_of(session: EvaluationSession, model: Path) -> PlannedTask:
    placed = session.place(resolve(str(model)), SETTINGS)
    return placed.plan(text_task(placed.checkpoint, TEXT, placed.settings))


def test_nothing_is_measured_twice(tiny_llama: Path, tmp_path: Path) -> None:
    """Neither what the session has measured, nor what the warehouse has; two parts, each its own cell."""
    with closing(LocalExecutor(SETTINGS)) as executor:
        session, events = session_of(tmp_path, executor)
        task = task_of(session, tiny_llama)
        first = session.measure([(task, [NO_INTERVENTION, WITHOUT, WITHOUT])])[task]
        again = session.measure([(task, [WITHOUT]), (task, [NO_INTERVENTION])])[task]
        assert events.counts() == [(4, 0, 4), (4, 4, 0)]
        later, events = session_of(tmp_path, executor)
        task = task_of(later, tiny_llama)
        more = later.measure([(task, [WITHOUT, NO_INTERVENTION.without(2)])])[task]
        assert events.counts() == [(4, 2, 2)]
    for intervention in (NO_INTERVENTION, WITHOUT):
        (one,), (two,), (three,) = (results_under(results, intervention.key) for results in (first, again, more))
        assert one.samples.tolist() == two.samples.tolist() == three.samples.tolist() and len(one.samples) == 8
    assert len(more) == 3


def test_a_session_that_was_stopped_goes_on_and_what_is_lost_is_measured_again(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """After each of four cells: only the others are measured, and the results are those of a session of its own."""
    results, interventions = [], [NO_INTERVENTION, WITHOUT]
    with closing(LocalExecutor(SETTINGS)) as executor:
        for number in (1, 2, 3, 4):
            stopped, _ = session_of(tmp_path / str(number), executor, Events(stop_after=number))
            task = task_of(stopped, tiny_llama)
            with pytest.raises(KeyboardInterrupt):
                stopped.measure([(task, interventions)])
            later, events = session_of(tmp_path / str(number), executor)
            results.append(later.measure([(task, interventions)])[task])
            assert events.counts() == [(4, number, 4 - number)]
        lost = min((tmp_path / "4").rglob("cells/**/*.parquet"))
        lost.unlink()
        later, events = session_of(tmp_path / "4", executor)
        results.append(later.measure([(task, interventions)])[task])
        assert events.counts() == [(4, 3, 1)]
    samples = [[result.samples.tolist() for result in found] for found in results]
    assert all(found == samples[0] for found in samples)


def test_a_fresh_session_measures_what_was_there_once(tiny_llama: Path, tmp_path: Path) -> None:
    with closing(LocalExecutor(SETTINGS)) as executor:
        session, _ = session_of(tmp_path, executor)
        session.measure([(task_of(session, tiny_llama), [NO_INTERVENTION])])
        fresh, events = session_of(tmp_path, executor, fresh=True)
        task = task_of(fresh, tiny_llama)
        for _ in range(2):
            fresh.measure([(task, [NO_INTERVENTION])])
        assert events.counts() == [(2, 0, 2), (2, 2, 0)]


def test_what_did_not_fail_is_kept(tiny_llama: Path, tmp_path: Path) -> None:
    """Results are committed, and the mistake is raised; rounds go on with the workers of before."""
    with closing(LocalExecutor(SETTINGS)) as executor:
        session, _ = session_of(tmp_path, executor)
        task = task_of(session, tiny_llama)
        with session.keeping_workers():
            with pytest.raises(AvssError, match=r"without layers 9: There is no layer 9: .* 1 more failed\."):
                session.measure([(task, [WITHOUT, NO_INTERVENTION.without(9)])])
            session.measure([(task, [NO_INTERVENTION])])
        stored = session.store.table("evaluations").to_pylist()
    assert {tuple(row["drop"]) for row in stored} == {(), (1,)}
