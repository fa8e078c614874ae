"""A driver and its threads, with a real pool on a simulated cluster, and the laws that hold whatever happens to runs.

1. Every run ends exactly once.
2. A repeat of a run in the same command ends as its first does.
3. The failure of one run ends no other, and each failure has an error object of its own.
4. An interrupt reads a consistent state: nothing counts that is not stored, and nothing is stored later.
5. What was measured before a failure or an interrupt is stored.

Each law has a driver that breaks it, which shows that the test of the law can fail.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from support.processes import threads_of_drivers
from support.simulated_runs import Driven, Fate, drive

from avss_dist.core.errors import AvssError, RunFailed, StorageFull
from avss_dist.runs.driver import Driver
from avss_dist.runs.events import RunEnded, RunEvent, ShardMeasured, WatchNote
from avss_dist.runs.result import Run
from avss_dist.runs.run_state import ENDED, NEXT_STATES, RunState, TrackedRun
from avss_dist.runs.threads import InterruptibleThread, Submissions
from avss_dist.runs.work import Receipt

STEPS = ["", "", "", "prepare", "begin", "measure", "store", "finish"]
GONE_SECONDS = 0.05  # after an interrupt, for what would still be stored to be stored


# The laws


def check_every_run_ends_once(driven: Driven) -> None:
    assert sorted(driven.fates.index(fate) for fate, _ in driven.endings) == [*range(len(driven.fates))]


def first_of(driven: Driven, fate: Fate) -> Fate:
    return next(other for other in driven.fates if other.run_id == fate.run_id)


def check_repeats_end_as_their_firsts(driven: Driven) -> None:
    for number, fate in enumerate(driven.fates):
        first = driven.ending(driven.fates.index(first_of(driven, fate)))
        ending = driven.ending(number)
        if isinstance(first, AvssError):
            assert isinstance(ending, AvssError), "a repeat of a failed run did not fail"
            assert ending.message == first.message
        else:
            assert isinstance(ending, Run), "a repeat of a run that is done failed"
            assert ending.run_id == first.run_id


def check_failures_are_their_own(driven: Driven) -> None:
    errors = [ending for _, ending in driven.endings if isinstance(ending, AvssError)]
    assert len({id(error) for error in errors}) == len(errors), "two runs have one error"
    for number, fate in enumerate(driven.fates):
        fails = first_of(driven, fate).fails_in and not first_of(driven, fate).was_done
        ending = driven.ending(number)
        assert isinstance(ending, AvssError) == bool(fails), "a run shares the fate of another"
        if isinstance(ending, AvssError):
            assert ending.message == fate.failure().message


def check_what_was_measured_is_stored(driven: Driven) -> None:
    for run_id, outcomes in driven.executor.outcomes.items():
        refused = driven.warehouse.refused[run_id]
        for outcome in outcomes:
            if not isinstance(outcome, Receipt) or outcome.shard_id in refused:
                break
            assert outcome.shard_id in driven.warehouse.shards[run_id], "a result is lost"


def check_an_interrupt_reads_what_is_stored(driven: Driven) -> None:
    assert isinstance(driven.raised, KeyboardInterrupt)
    (note,) = driven.raised.__notes__
    done, kept_shards = re.fullmatch(
        r"(\d+) of \d+ runs are done(?: and (\d+) of \d+ shards of the runs in progress are kept)?", note
    ).groups()  # type: ignore[union-attr]
    stored = driven.warehouse.state()
    ended = [run_id for run_id, rows in stored[1].items() if rows == ["done"]]
    before = [fate for fate in driven.fates if fate.was_done]
    assert int(done) <= len(ended) + len(before), "a run counts that is not stored"
    in_progress = sum(len(shards) for run_id, shards in stored[0].items() if not stored[1].get(run_id))
    assert int(kept_shards or 0) <= in_progress, "a shard counts that is not stored"
    time.sleep(GONE_SECONDS)
    assert driven.warehouse.state() == stored, "something is stored after the command has ended"


def interrupt_at(number: int) -> Callable[[Driven, RunEvent], None]:
    """Return what raises an interrupt at the event of this number."""

    def on_event(driven: Driven, event: RunEvent) -> None:
        if len(driven.events) == number:
            raise KeyboardInterrupt

    return on_event


def fates() -> Any:
    """Return runs with one fate each, some of which are repeated."""
    fate = st.builds(
        Fate,
        run_id=st.just(""),
        shards=st.integers(0, 9),
        fails_in=st.sampled_from(STEPS),
        fails_at=st.just(0),
        dies=st.booleans(),
        was_done=st.sampled_from([False, False, False, True]),
    )
    return st.lists(st.tuples(fate, st.integers(0, 9)), min_size=1, max_size=6).map(_numbered)


def _numbered(drawn: list[tuple[Fate, int]]) -> list[Fate]:
    """Name the runs, and insert repeats of those whose plans show that they are repeats."""
    named = []
    for number, (fate, at) in enumerate(drawn):
        fails_in = fate.fails_in
        if fails_in in ("measure", "store") and not fate.shards:
            fails_in = ""
        changes = {"run_id": f"run{number}", "fails_in": fails_in, "fails_at": at % max(1, fate.shards)}
        if fails_in == "prepare":
            changes["was_done"] = False
        named.append(Fate(**{**vars(fate), **changes}))
    return named + [fate for fate, (_, at) in zip(named, drawn, strict=True) if at % 3 == 0]


random_jobs = settings(max_examples=30, deadline=None, database=None, suppress_health_check=[*HealthCheck])


@seed(0)
@random_jobs
@given(job=fates(), plans_ahead=st.booleans())
def test_the_laws_hold_for_random_jobs(job: list[Fate], plans_ahead: bool) -> None:
    driven = drive(job, plans_ahead=plans_ahead)
    assert driven.raised is None
    check_every_run_ends_once(driven)
    check_repeats_end_as_their_firsts(driven)
    check_failures_are_their_own(driven)
    check_what_was_measured_is_stored(driven)
    assert threads_of_drivers() == []


@seed(0)
@random_jobs
@given(job=fates(), listed=st.integers(0, 2), plans_ahead=st.booleans())
def test_the_laws_hold_for_runs_of_a_watch(job: list[Fate], listed: int, plans_ahead: bool) -> None:
    """But for repeats: a run that comes again after its first has ended is tried again."""
    job = list({fate.run_id: fate for fate in job}.values())
    driven = drive(job, listed=listed, plans_ahead=plans_ahead)
    assert driven.raised is None
    check_every_run_ends_once(driven)
    check_failures_are_their_own(driven)
    check_what_was_measured_is_stored(driven)
    assert threads_of_drivers() == []


@seed(0)
@random_jobs
@given(job=fates(), number=st.integers(1, 30))
def test_the_laws_hold_for_random_interrupts(job: list[Fate], number: int) -> None:
    job = [*job, Fate("last", 3)]
    driven = drive(job, on_event=interrupt_at(number))
    if len(driven.events) < number:
        return  # The job has ended before.
    check_an_interrupt_reads_what_is_stored(driven)
    check_what_was_measured_is_stored(driven)
    assert threads_of_drivers() == []


# Drivers that break a law


class EndsTwice(Driver):
    """Ends each run twice."""

    def _end(self, run: TrackedRun, state: RunState) -> None:
        super()._end(run, state)
        self._just_ended.append(run)


class SkipsRepeats(Driver):
    """Ends every repeat as skipped."""

    def _end_repeats(self) -> None:
        for run in self._runs:
            if run.state is RunState.REPEATING:
                self._end(run, RunState.SKIPPED)


class SharesErrors(Driver):
    """Fails a repeat with the error of the first run."""

    def _end_repeats(self) -> None:
        for run in self._runs:
            if run.state is RunState.REPEATING and run.first and run.first.error:
                self._fail(run, run.first.error)


class FailsAll(Driver):
    """Ends every run that is under way when one fails."""

    def _fail(self, run: TrackedRun, error: AvssError) -> None:
        super()._fail(run, error)
        for other in self._active.copy():
            super()._fail(other, RunFailed(error.message))


class CountsMeasured(Driver):
    """Counts a run as done when its last result has come."""

    def _add_note(self, interrupt: KeyboardInterrupt) -> None:
        done = sum(run.state in (RunState.COMMITTING, *ENDED) for run in self._runs)
        interrupt.add_note(f"{done} of {len(self._runs)} runs are done")


class LeavesAtOnce(Driver):
    """Does not wait for its threads."""

    def _stop(self) -> None:
        self._submitted.close()
        self._planner.close()
        self._committer.close()


class ForgetsEvents(Driver):
    """Drops the events that have come before an interrupt."""

    def _handle_waiting(self) -> bool:
        return False


TWO_FAIL = [Fate("a", 3, fails_in="measure", fails_at=1), Fate("b", 9), Fate("a", 3, fails_in="measure", fails_at=1)]


@pytest.mark.parametrize(
    ("broken", "check"),
    [
        (EndsTwice, check_every_run_ends_once),
        (SkipsRepeats, check_repeats_end_as_their_firsts),
        (SharesErrors, check_failures_are_their_own),
        (FailsAll, check_failures_are_their_own),
    ],
)
def test_a_driver_that_breaks_a_law_is_seen(broken: type[Driver], check: Callable[[Driven], None]) -> None:
    check(drive(TWO_FAIL))
    with pytest.raises((AssertionError, ValueError)):
        check(drive(TWO_FAIL, driver=broken))


def interrupt_with_results_waiting(driven: Driven, event: RunEvent) -> None:
    """Raise an interrupt at the first stored shard, after the executor has sent others."""
    if isinstance(event, ShardMeasured):
        deadline = time.monotonic() + 60
        while sum(map(len, driven.executor.outcomes.values())) < 6 and time.monotonic() < deadline:
            time.sleep(0.001)
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("broken", "check"),
    [
        (CountsMeasured, check_an_interrupt_reads_what_is_stored),
        (LeavesAtOnce, check_an_interrupt_reads_what_is_stored),
        (ForgetsEvents, check_what_was_measured_is_stored),
    ],
)
def test_a_driver_that_breaks_a_law_of_interrupts_is_seen(
    broken: type[Driver], check: Callable[[Driven], None]
) -> None:
    job = [Fate("a", 9, fails_in="finish"), Fate("b", 1)]
    check(drive(job, on_event=interrupt_with_results_waiting))
    with pytest.raises(AssertionError):
        check(drive(job, driver=broken, on_event=interrupt_with_results_waiting))


# States


def test_a_run_takes_no_step_that_is_not_listed() -> None:
    run = TrackedRun(Fate("a"))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="a is WAITING, which DONE cannot follow"):
        run.become(RunState.DONE)


def test_every_state_but_an_end_leads_to_an_end() -> None:
    for state in RunState:
        reached = {state}
        for _ in RunState:
            for before in tuple(reached):
                reached |= set(NEXT_STATES[before])
        assert reached & {RunState.DONE, RunState.FAILED, RunState.SKIPPED}


def test_the_next_checkpoint_is_read_while_one_is_measured_here() -> None:
    driven = drive([Fate("a"), Fate("b", was_done=True), Fate("c")], plans_ahead=False)
    assert driven.planner.read == ["b"]


def test_no_checkpoint_is_read_ahead_where_the_next_run_is_planned_ahead() -> None:
    driven = drive([Fate("a"), Fate("b"), Fate("c")], plans_ahead=True)
    assert driven.planner.read == []


# Full storage, crashes of the executor, callbacks that raise


def test_no_run_begins_where_storage_is_full() -> None:
    driven = drive([Fate("a", 90, fails_in="fill"), Fate("b"), Fate("c")], plans_ahead=False)
    errors = [driven.ending(number) for number in range(3)]
    assert all(isinstance(error, StorageFull) for error in errors)
    assert [error.message for error in errors] == ["No space for a.", "Not begun.", "Not begun."]  # type: ignore


def test_a_crash_of_the_executor_fails_the_runs_in_progress_and_the_command() -> None:
    driven = drive([Fate("a", 9), Fate("b", 9), Fate("c", 9)], crash_after=3)
    assert isinstance(driven.raised, RunFailed)
    assert driven.raised.message == "OSError: the executor crashes"
    assert driven.warehouse.rows["a"] == ["failed"]
    assert driven.warehouse.rows["c"] == []
    check_what_was_measured_is_stored(driven)


def test_an_executor_that_ends_early_does_not_leave_the_command_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("support.simulated_runs.SimulatedExecutor.run", lambda self, runs: (run for run in ()))
    driven = drive([Fate("a", 9)])
    assert isinstance(driven.raised, RunFailed)
    assert "before every run was measured" in driven.raised.message


def test_a_callback_that_raises_ends_the_run_of_its_event() -> None:
    def raise_once(driven: Driven, event: RunEvent) -> None:
        if isinstance(event, ShardMeasured) and event.name == "a":
            raise ValueError("a bug of the callback")

    driven = drive([Fate("a"), Fate("b")], on_event=raise_once)
    first = driven.ending(0)
    assert isinstance(first, RunFailed)
    assert first.message == "ValueError: a bug of the callback"
    assert isinstance(driven.ending(1), Run)


def test_an_interrupt_ends_a_watch_that_waits() -> None:
    def interrupt_after_the_last(driven: Driven, event: RunEvent) -> None:
        if isinstance(event, RunEnded) and event.name == "b":
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()

    driven = drive([Fate("a"), Fate("b")], listed=1, watch_ends=False, on_event=interrupt_after_the_last)
    assert isinstance(driven.raised, KeyboardInterrupt)
    assert driven.raised.__notes__ == ["2 of 2 runs are done"]
    assert threads_of_drivers() == []


def test_a_run_that_comes_again_after_it_failed_is_tried_again() -> None:
    driven = drive([Fate("a", fails_in="measure"), Fate("a")], listed=0, plans_ahead=False)
    assert isinstance(driven.ending(0), RunFailed)
    assert driven.warehouse.rows["a"] == ["failed", "failed"]


def test_a_crash_of_the_executor_ends_a_watch_that_waits() -> None:
    driven = drive([Fate("a", 9)], listed=0, watch_ends=False, crash_after=3)
    assert isinstance(driven.raised, RunFailed)
    assert threads_of_drivers() == []


def test_a_watch_says_how_many_wait() -> None:
    driven = drive([Fate("a"), Fate("b")], listed=1)
    notes = [event for event in driven.events if isinstance(event, WatchNote)]
    assert notes == [WatchNote("b", "one waits")]


def test_all_events_come_in_the_thread_that_drives() -> None:
    seen: set[str] = set()
    drive(
        [Fate("a"), Fate("b"), Fate("a")],
        on_event=lambda driven, event: seen.add(threading.current_thread().name),
    )
    assert seen == {threading.current_thread().name}


def test_a_repeat_is_told_with_the_name_of_the_first_run() -> None:
    driven = drive([Fate("a"), Fate("a")])
    assert [event.repeats for event in driven.events if isinstance(event, RunEnded)] == ["", "a"]


@pytest.mark.parametrize(
    ("job", "note"),
    [
        ([Fate("a", 90)], r"[1-9]\d? of 90 shards are kept"),
        (
            [Fate("b", was_done=True), Fate("a", 90), Fate("c")],
            r"1 of 3 runs are done and [1-9]\d? of (90|93) shards of the runs in progress are kept",
        ),
    ],
)
def test_a_stop_counts_all_runs(job: list[Fate], note: str) -> None:
    driven = drive(job, on_event=interrupt_with_results_waiting)
    assert driven.raised is not None
    (said,) = driven.raised.__notes__
    assert re.fullmatch(note, said)


def test_an_interrupt_does_not_wait_for_a_plan_that_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A download is interrupted as it would be in the main thread. This plan never ends by itself."""

    def prepare(self: Any, fate: Fate) -> Any:
        while True:
            time.sleep(0.01)

    monkeypatch.setattr("support.simulated_runs.SimulatedPlanner.prepare", prepare)
    monkeypatch.setattr("avss_dist.runs.driver.STOP_SECONDS", 0.5)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    driven = drive([Fate("a")])
    assert isinstance(driven.raised, KeyboardInterrupt)
    assert threads_of_drivers() == []


@pytest.mark.parametrize(
    "step",
    [
        "SimulatedPlanner.prepare",
        "SimulatedPlanner.begin",
        "SimulatedProgress.store",
        "SimulatedExecutor._answer",
    ],
)
def test_an_interrupt_in_another_thread_ends_the_command(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"support.simulated_runs.{step}", stop)
    driven = drive([Fate("a"), Fate("b")])
    assert isinstance(driven.raised, KeyboardInterrupt)
    assert threads_of_drivers() == []


# Threads


def test_an_interrupted_thread_ends() -> None:
    def wait_forever() -> None:
        while True:
            time.sleep(0.01)

    thread = InterruptibleThread("waits", wait_forever)
    thread.interrupt()
    thread.join(60)
    assert not thread.is_alive


def test_submissions_are_taken_in_order_and_end() -> None:
    assert list(Submissions.of([1, 2, 3])) == [1, 2, 3]


def test_submissions_tell_whether_more_may_come() -> None:
    submissions: Submissions[int] = Submissions()
    assert submissions.take(wait=False) is None
    assert not submissions.exhausted
    submissions.close()
    assert submissions.take(wait=False) is None
    assert submissions.exhausted
