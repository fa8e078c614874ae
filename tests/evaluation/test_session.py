"""Sessions: what is measured, what is known before, what is told of failures, and intervals of retentions."""

from __future__ import annotations

import errno
import math
import textwrap
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.causal_lm import SMALL
from support.checkpoints import checkpoint_at
from support.documentation import DOCS, code_blocks, read

from avss_dist.analysis.verdict import judgement, lacks_interval
from avss_dist.core.errors import AvssError, BatchTooLarge, as_failure
from avss_dist.core.intervention import NO_INTERVENTION, InterventionKey
from avss_dist.core.settings import Settings
from avss_dist.evaluation.events import CellDone, CellsStarted, Event
from avss_dist.evaluation.placed import PlannedTask
from avss_dist.evaluation.planned_tasks import plan_text_task
from avss_dist.evaluation.session import EvaluationSession, failure, results_under
from avss_dist.partition.execution import Execution
from avss_dist.partition.replica import Replica
from avss_dist.runs import work
from avss_dist.runs.local import LocalExecutor
from avss_dist.runs.work import ReplicaSpec
from avss_dist.stats.intervals import jackknife_interval
from avss_dist.stats.layer_stats import Float64
from avss_dist.stats.metrics import LOSS
from avss_dist.tasks.results import Result, Retention
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
    events = Events() if events is None else events
    store = Store(folder)
    store.storage.create()
    return EvaluationSession(store, executor, Execution(**execution), events), events


def task_of(session: EvaluationSession, model: Path) -> PlannedTask:
    return plan_text_task(session.place(checkpoint_at(model), SETTINGS), TEXT)


def test_the_example_of_the_guide_measures_two_things_on_one_loaded_model(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second measurement goes by the first, and the model is opened once."""
    (example,) = code_blocks(read(DOCS / "guides" / "evaluate.md"), "python")
    (tmp_path / "heldout.txt").write_text(Path(textwrap.__file__).read_text())
    monkeypatch.chdir(tmp_path)
    opened = []

    class CountedSpec(ReplicaSpec):
        def open(self) -> Replica:
            opened.append(self)
            return super().open()

    monkeypatch.setattr(work, "ReplicaSpec", CountedSpec)
    exec(example.replace("org/name", str(tiny_llama)), {})
    removals = [line.partition(" loss ")[0] for line in capsys.readouterr().out.splitlines()]
    assert {"()", "(0,)", "(1,)", "(2,)"} < {*removals}
    assert len(removals) == len({*removals}) == 6, "the whole model, each of three layers, and two pairs"
    assert len(opened) == 1


def test_nothing_is_measured_twice(tiny_llama: Path, tmp_path: Path) -> None:
    """Neither what the session has measured, nor what the warehouse has; two parts, each its own cell."""
    with closing(LocalExecutor(SETTINGS)) as executor:
        session, events = session_of(tmp_path, executor)
        task = task_of(session, tiny_llama)
        first = session.measure({task: [NO_INTERVENTION, WITHOUT, WITHOUT]})[task]
        again = session.measure({task: [WITHOUT, NO_INTERVENTION]})[task]
        assert events.counts() == [(4, 0, 4), (4, 4, 0)]
        later, events = session_of(tmp_path, executor)
        task = task_of(later, tiny_llama)
        more = later.measure({task: [WITHOUT, NO_INTERVENTION.without(2)]})[task]
        assert events.counts() == [(4, 2, 2)]
    for intervention in (NO_INTERVENTION, WITHOUT):
        (measured,) = results_under(first, intervention.key)
        (of_session,) = results_under(again, intervention.key)
        (of_warehouse,) = results_under(more, intervention.key)
        assert of_session.samples.tolist() == measured.samples.tolist()
        assert of_warehouse.samples.tolist() == measured.samples.tolist()
        assert len(measured.samples) == 8
    assert len(more) == 3


@pytest.mark.nightly
def test_a_session_that_was_stopped_goes_on_and_what_is_lost_is_measured_again(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """After each of four cells: only the others are measured, and the results are those of a session of its own."""
    results = []
    interventions = [NO_INTERVENTION, WITHOUT]
    with closing(LocalExecutor(SETTINGS)) as executor:
        for number in (1, 2, 3, 4):
            stopped, _ = session_of(tmp_path / str(number), executor, Events(stop_after=number))
            task = task_of(stopped, tiny_llama)
            with pytest.raises(KeyboardInterrupt):
                stopped.measure({task: interventions})
            later, events = session_of(tmp_path / str(number), executor)
            results.append(later.measure({task: interventions})[task])
            assert events.counts() == [(4, number, 4 - number)]
        lost = min((tmp_path / "4").rglob("cells/**/*.parquet"))
        lost.unlink()
        later, events = session_of(tmp_path / "4", executor)
        results.append(later.measure({task: interventions})[task])
        assert events.counts() == [(4, 3, 1)]
    expected = samples_of(results[0])
    for measured in results[1:]:
        assert samples_of(measured) == expected


def samples_of(results: Iterable[Result]) -> list[list[float]]:
    return [result.samples.tolist() for result in results]


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])


def test_a_damaged_cell_is_measured_again(tiny_llama: Path, tmp_path: Path) -> None:
    with closing(LocalExecutor(SETTINGS)) as executor:
        session, _ = session_of(tmp_path, executor)
        task = task_of(session, tiny_llama)
        (before,) = session.measure({task: [NO_INTERVENTION]})[task]
        truncate(min(tmp_path.rglob("cells/**/*.parquet")))
        later, events = session_of(tmp_path, executor)
        task = task_of(later, tiny_llama)
        (after,) = later.measure({task: [NO_INTERVENTION]})[task]
    assert events.counts() == [(2, 1, 1)]
    assert after.samples.tolist() == before.samples.tolist()


def test_a_damaged_file_of_evaluations_is_written_again_from_its_cells(tiny_llama: Path, tmp_path: Path) -> None:
    with closing(LocalExecutor(SETTINGS)) as executor:
        session, _ = session_of(tmp_path, executor)
        session.measure({task_of(session, tiny_llama): [NO_INTERVENTION]})
        rows = Store(tmp_path).reader.table("evaluations", columns=["metric", "value"])
        truncate(min(tmp_path.rglob("evaluations.parquet")))
        later, events = session_of(tmp_path, executor)
        later.measure({task_of(later, tiny_llama): [NO_INTERVENTION]})
    assert events.counts() == [(2, 2, 0)]
    assert Store(tmp_path).reader.table("evaluations", columns=["metric", "value"]).equals(rows)


def test_a_fresh_session_measures_what_was_there_once(tiny_llama: Path, tmp_path: Path) -> None:
    with closing(LocalExecutor(SETTINGS)) as executor:
        session, _ = session_of(tmp_path, executor)
        session.measure({task_of(session, tiny_llama): [NO_INTERVENTION]})
        fresh, events = session_of(tmp_path, executor, fresh=True)
        task = task_of(fresh, tiny_llama)
        for _ in range(2):
            fresh.measure({task: [NO_INTERVENTION]})
        assert events.counts() == [(2, 0, 2), (2, 2, 0)]


def test_what_did_not_fail_is_kept(tiny_llama: Path, tmp_path: Path) -> None:
    """Results are committed, and the mistake is raised; rounds go on with the workers of before."""
    with closing(LocalExecutor(SETTINGS)) as executor:
        session, _ = session_of(tmp_path, executor)
        task = task_of(session, tiny_llama)
        with session.keeping_workers():
            with pytest.raises(AvssError, match=r"without layers 9: There is no layer 9: .* 1 more failed\."):
                session.measure({task: [WITHOUT, NO_INTERVENTION.without(9)]})
            session.measure({task: [NO_INTERVENTION]})
        stored = session.store.reader.table("evaluations").to_pylist()
    assert {tuple(row["drop"]) for row in stored} == {(), (1,)}


# Retentions and their intervals


def result(samples: Float64, metric: str = LOSS, weight: float = 1.0) -> Result:
    weights = np.full(len(samples), weight)
    return Result(metric, InterventionKey(), None, samples * weight, weights)


def losses(number: int) -> tuple[Float64, Float64]:
    rng = np.random.default_rng(number)
    before = rng.normal(3, 0.5, number)
    return before, before + rng.lognormal(-1, 0.5, number)


@pytest.mark.parametrize("number", [8, 50])
def test_what_is_kept_of_a_loss_has_the_interval_of_the_mean_of_paired_changes(number: int) -> None:
    before, after = losses(number)
    retention = Retention.of(result(before, weight=255), result(after, weight=255))
    change = before - after
    low, high = jackknife_interval(change.mean(), (change.sum() - change) / (number - 1))
    assert (retention.value, retention.low, retention.high) == pytest.approx((*np.exp([change.mean(), low, high]),))
    few = Retention.of(result(before[:7]), result(after[:7]))
    assert 0 < few.value < 1
    assert not few.has_interval


@pytest.mark.parametrize(("lost", "known"), [(0, False), (7, False), (8, True), (30, True)])
def test_an_accuracy_needs_eight_answers_that_change(lost: int, known: bool) -> None:
    before = np.ones(100)
    after = np.ones(100)
    before[80:] = 0
    after[80:] = 0
    after[:lost] = 0
    retention = Retention.of(result(before, "acc"), result(after, "acc"))
    assert retention.value == pytest.approx((80 - lost) / 80)
    assert retention.has_interval == known
    assert not known or retention.low < retention.value < retention.high < 1


@pytest.mark.parametrize("after", [np.zeros(40), np.full(40, np.nan), np.ones(39)], ids=["nothing", "NaN", "fewer"])
def test_what_has_no_logarithm_has_no_interval(after: Float64) -> None:
    assert not Retention.of(result(np.ones(40), "acc"), result(after, "acc")).has_interval


def test_without_an_interval_the_claim_is_undecided() -> None:
    none = {"score": "avss", "retention": 0.95, "retention_low": math.nan, "retention_high": math.nan}
    known = none | {"retention_low": 0.93, "retention_high": 0.97}
    assert "undecided" in judgement(none)
    assert "8 samples differ" in judgement(none)
    assert lacks_interval([none])
    assert judgement(known) == "the claim holds"
    assert not lacks_interval([known])
    assert "nothing is kept" in judgement(none | {"retention": 0.0})


# Failed cells


CELL: Any = SimpleNamespace(
    task="perplexity:text.txt", checkpoint=SimpleNamespace(name="model"), intervention=NO_INTERVENTION.without(7)
)


@pytest.mark.parametrize(
    "error", [IndexError("index 7 is out of range"), KeyError("layer"), TypeError("x"), OSError("y")]
)
def test_a_mistake_of_the_code_or_the_plan_stays_one(error: Exception) -> None:
    told = failure([(CELL, as_failure(error))])
    assert told.hint is None
    assert "perplexity:text.txt of model without layers 7" in told.message


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (ConnectionResetError("reset by peer"), "Run the same command again."),
        (TimeoutError("timed out"), "Run the same command again."),
        (MemoryError("no memory"), "Run the same command again."),
        (OSError(errno.ENOSPC, "No space left"), "Free some space and run the same command again."),
        (BatchTooLarge("It is too large.", "Lower `batch_size`."), "Lower `batch_size`."),
    ],
)
def test_a_failure_that_can_pass_is_tried_again(error: Exception, hint: str) -> None:
    assert failure([(CELL, as_failure(error))]).hint == hint
