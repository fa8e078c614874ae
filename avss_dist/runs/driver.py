"""The driver of a command's runs: one thread that owns the state of every run, and three that send events to it.

The planner plans runs. The executor's thread measures them. The committer stores results, merges and scores, in the
order of its jobs. Each of them says what it has done by an event in one queue, and changes the state of no run.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress
from queue import Empty, SimpleQueue
from threading import Semaphore

from avss_dist.core.errors import AvssError, StorageFull, as_failure, own_copy
from avss_dist.runs.driver_events import (
    Arrived,
    DriverEvent,
    FailureRecorded,
    Finished,
    JobFailed,
    JobInterrupted,
    LookedUp,
    Measured,
    MeasuringEnded,
    Planned,
    RunProgress,
    Stored,
    Taken,
)
from avss_dist.runs.events import OnRunEvent, RunEnded, RunReading, RunStarted, ShardMeasured, WatchNote
from avss_dist.runs.folder_watch import Arrival, FolderWatch
from avss_dist.runs.in_progress import RunInProgress
from avss_dist.runs.job_file import RunSpec
from avss_dist.runs.local import Executor
from avss_dist.runs.planned import PlannedRun
from avss_dist.runs.planner import Planner
from avss_dist.runs.result import Run
from avss_dist.runs.run_state import NOT_TAKEN, UNMEASURED, RunState, TrackedRun
from avss_dist.runs.threads import LOOK_SECONDS, InterruptibleThread, JobThread, Submissions
from avss_dist.runs.work import Note, Receipt, RunOutcome, RunShards
from avss_dist.stats.layer_stats import ShardResult
from avss_dist.warehouse.store import Store

UNCOMMITTED = 8  # results that may wait for storage before the executor waits, too
STOP_SECONDS = 5.0  # for the executor to end by itself after an interrupt, at a layer or at its next look at workers
INTERRUPT_SECONDS = 10.0  # for a thread to end after its interrupt, before it is left alone: a download may ignore it


class Driver:
    """Runs checkpoints with one executor into one warehouse.

    The thread that calls `run` owns every field but the queue of events and the room for results. It also calls
    ``on_event``.

    Args:
        fresh: measure every run again, whatever is stored.
        planner: plans the runs in another thread; a planner for the executor and the warehouse if left out.
        watch: gives further runs, one checkpoint after the other, when no run waits. The planner's thread asks it.
    """

    def __init__(
        self,
        store: Store,
        executor: Executor,
        on_event: OnRunEvent,
        *,
        fresh: bool = False,
        planner: Planner | None = None,
        watch: FolderWatch | None = None,
    ) -> None:
        self._store = store
        self._executor = executor
        self._on_event = on_event
        self._fresh = fresh
        self._planning = planner or Planner(executor, store)
        self._watch = watch
        self._more_may_arrive = watch is not None
        self._awaits_arrival = False  # whether the watch was asked, and has not answered
        self._events: SimpleQueue[DriverEvent] = SimpleQueue()
        self._submitted: Submissions[RunShards] = Submissions(lambda shards: self._events.put(Taken(shards)))
        self._room = Semaphore(UNCOMMITTED)  # taken by the executor's thread for each result, and given back here
        self._runs: list[TrackedRun] = []
        self._waiting: deque[TrackedRun] = deque()
        self._states_before_next = UNMEASURED  # The next run is planned when no run is in one of them.
        if executor.plans_ahead:
            self._states_before_next = NOT_TAKEN
        self._active: list[TrackedRun] = []  # those that are planned, measured or committed: a few of many
        self._first_runs: dict[str, TrackedRun] = {}  # by run id
        self._runs_of_shards: dict[RunShards, TrackedRun] = {}
        self._just_ended: deque[TrackedRun] = deque()
        self._storage_is_full = False
        self._is_stopping = False  # nothing more is planned or begun
        self._is_measuring = True
        self._failure: AvssError | None = None  # of the executor itself

    def run(self, specs: Sequence[RunSpec]) -> Generator[tuple[RunSpec, Run | AvssError], None, None]:
        """Yield each run as it ends: done, skipped, or the error that ended it. Other runs continue.

        Runs that a watch gives come after these.

        Raises:
            AvssError: the executor itself failed.
        """
        self._runs = [TrackedRun(spec) for spec in specs]
        self._waiting.extend(self._runs)
        try:
            self._planner = JobThread("planner")
            self._committer = JobThread("committer")
            self._measuring = InterruptibleThread("executor", self._measure)
            try:
                self._plan_next()
                while self._is_measuring or any(tracked.is_in_progress for tracked in self._active):
                    self._handle(self._events.get())
                    while self._just_ended and self._failure is None:
                        yield self._take_ended()
                if self._failure is not None:
                    raise self._failure
                self._end_repeats()
                while self._just_ended:
                    yield self._take_ended()
            finally:
                self._stop()
        except KeyboardInterrupt as interrupt:
            self._add_note(interrupt)
            raise

    def _take_ended(self) -> tuple[RunSpec, Run | AvssError]:
        tracked = self._just_ended.popleft()
        return tracked.spec, tracked.ending

    # What the other threads do. They change nothing here, and send events.

    def _measure(self) -> None:
        """Measure the submitted runs in the executor's thread."""
        error: BaseException | None = None
        try:
            with closing(self._executor.run(self._submitted)) as outcomes:
                for shards, outcome in outcomes:
                    arrived = time.perf_counter()
                    self._room.acquire()
                    self._events.put(Measured(shards, outcome, arrived))
        except BaseException as raised:
            error = raised
        self._events.put(MeasuringEnded(error))

    def _submit(self, thread: JobThread, tracked: TrackedRun, job: Callable[[], RunProgress]) -> None:
        """Have a thread do a job of a run, which returns the event to send."""

        def attempt() -> None:
            event: DriverEvent
            try:
                event = job()
            except (Exception, SystemExit) as error:
                event = JobFailed(tracked, as_failure(error))
            except BaseException as interrupt:
                event = JobInterrupted(interrupt)
            self._events.put(event)

        thread.submit(attempt)

    # The state of runs

    def _handle(self, event: DriverEvent) -> None:
        """Do what follows from an event. An exception on the way ends the run of the event."""
        match event:
            case MeasuringEnded(error):
                self._on_measuring_ended(error)
                return
            case JobInterrupted(interrupt):
                if not self._is_stopping:
                    raise interrupt
                return
            case Arrived(arrival):
                self._on_arrived(arrival)
                return
            case Taken(shards) | Measured(shards):
                tracked = self._runs_of_shards.get(shards)
            case _:
                tracked = event.tracked
        if tracked is None:  # It has ended, and the executor has not noticed yet.
            if isinstance(event, Measured):
                self._room.release()
            return
        try:
            self._advance(tracked, event)
        except Exception as error:
            if tracked.has_ended:
                raise
            self._fail(tracked, as_failure(error))
        self._plan_next()

    def _advance(self, tracked: TrackedRun, event: RunProgress | Taken | Measured) -> None:
        """Bring a run to the state that follows from its event. Callbacks come last: they may raise an interrupt."""
        match event:
            case Planned(_, planned):
                self._look_up(tracked, planned)
            case LookedUp(_, progress):
                if progress is None:
                    self._end(tracked, RunState.SKIPPED)
                else:
                    self._begin(tracked, progress)
            case Taken() if tracked.state is RunState.PLANNED:
                tracked.become(RunState.MEASURING)
            case Measured(_, outcome, arrived):
                self._take_outcome(tracked, outcome, arrived)
            case Stored(_, num_tokens):
                tracked.writing -= 1
                self._finish_if_stored(tracked)
                self._on_event(ShardMeasured(tracked.spec.name, num_tokens))
            case Finished(_, result):
                if tracked.error is None:
                    tracked.result = result
                    self._end(tracked, RunState.DONE)
            case FailureRecorded():
                self._end(tracked, RunState.FAILED)
            case JobFailed(_, error):
                self._fail(tracked, error)

    def _plan_next(self) -> None:
        """Have the next run planned as soon as none waits for the executor. After the last one, submissions end."""
        while self._waiting and self._may_plan():
            self._plan(self._waiting.popleft())
        if self._waiting or self._submitted.is_closed or not self._may_plan():
            return
        if not self._more_may_arrive:
            self._submitted.close()
        elif not self._awaits_arrival:
            self._awaits_arrival = True
            self._planner.submit(self._await_arrival)

    def _await_arrival(self) -> None:
        """Wait for the next checkpoint of the watch, in the planner's thread."""
        assert self._watch is not None
        event: DriverEvent
        try:
            event = Arrived(self._watch.take())
        except BaseException as error:
            event = JobInterrupted(error)
        self._events.put(event)

    def _on_arrived(self, arrival: Arrival) -> None:
        """Have the runs of a checkpoint planned. Without any, the watch has ended."""
        if self._is_stopping:
            return
        self._awaits_arrival = False
        self._more_may_arrive = bool(arrival.specs)
        arrived = [TrackedRun(spec) for spec in arrival.specs]
        self._runs += arrived
        self._waiting.extend(arrived)
        self._plan_next()
        if arrival.note:
            self._on_event(WatchNote(arrived[0].spec.name, arrival.note))

    def _may_plan(self) -> bool:
        if self._is_stopping:
            return False
        return not any(tracked.state in self._states_before_next for tracked in self._active)

    def _plan(self, tracked: TrackedRun) -> None:
        tracked.become(RunState.PLANNING)
        self._active.append(tracked)
        try:
            self._on_event(RunReading(tracked.spec.name))
        except Exception as error:
            self._fail(tracked, as_failure(error))
        else:
            self._submit(self._planner, tracked, lambda: Planned(tracked, self._planning.prepare(tracked.spec)))

    def _look_up(self, tracked: TrackedRun, planned: PlannedRun) -> None:
        """Look up what is stored of a run, unless it is an earlier one of this command."""
        if self._is_stopping:
            return
        tracked.result = planned.result
        first = self._first_runs.get(planned.run_id)
        if first is None or self._is_over(first):
            self._first_runs[planned.run_id] = tracked
        else:
            tracked.first = first
            tracked.become(RunState.REPEATING)
            self._active.remove(tracked)
            return
        storage_is_full = self._storage_is_full

        def look_up() -> LookedUp:
            progress = self._planning.begin(planned, fresh=self._fresh, storage_is_full=storage_is_full)
            return LookedUp(tracked, progress)

        self._submit(self._planner, tracked, look_up)

    def _is_over(self, first: TrackedRun) -> bool:
        """Whether a run with the id of an earlier one is no repeat of it, but another attempt.

        So it is in a watch: a checkpoint that was deleted may be written again with the same files.
        """
        if self._watch is None:
            return False
        return first.has_ended or first.error is not None

    def _begin(self, tracked: TrackedRun, progress: RunInProgress) -> None:
        """Have the missing shards of a run measured. Without any, it is merged."""
        if self._is_stopping:
            return
        tracked.result = progress.result
        tracked.progress = progress
        tracked.awaited = {shard.shard_id for shard in progress.shards.shards}
        if tracked.awaited:
            tracked.become(RunState.PLANNED)
            self._runs_of_shards[progress.shards] = tracked
            self._measure_shards(progress.shards)
        else:
            tracked.become(RunState.COMMITTING)
            self._finish_if_stored(tracked)
        num_tokens = progress.result.num_tokens
        self._on_event(RunStarted(tracked.spec.name, num_tokens, progress.done_tokens, progress.placement))

    def _measure_shards(self, shards: RunShards) -> None:
        try:
            # Here, and not where shards are measured: Ray sets signal handlers, which only the main thread can.
            self._executor.connect()
        except Exception as error:
            self._fail_executor(error)
        else:
            self._submitted.submit(shards)
            if self._waiting and not self._executor.plans_ahead:
                spec = self._waiting[0].spec
                self._planner.submit(lambda: self._planning.read_ahead(spec))

    def _take_outcome(self, tracked: TrackedRun, outcome: RunOutcome, arrived: float) -> None:
        """Have the first result of a shard stored. After the last one, or an error, the run needs no other."""
        match outcome:
            case Note(text):
                tracked.notes.append(text)
            case AvssError() if tracked.state is RunState.MEASURING:
                self._fail(tracked, outcome)
            case ShardResult() | Receipt() if tracked.awaits(outcome.shard_id):
                self._store_result(tracked, outcome, arrived)
                return
        self._room.release()

    def _store_result(self, tracked: TrackedRun, result: ShardResult | Receipt, arrived: float) -> None:
        progress = tracked.progress
        assert progress is not None

        def store() -> Stored:
            try:
                progress.store(result)
            finally:
                self._room.release()
            return Stored(tracked, result.num_tokens)

        tracked.writing += 1
        self._submit(self._committer, tracked, store)
        tracked.awaited.discard(result.shard_id)
        if tracked.begun is None:
            tracked.begun = arrived - result.seconds
        if not tracked.awaited:
            tracked.become(RunState.COMMITTING)

    def _finish_if_stored(self, tracked: TrackedRun) -> None:
        """Have a run merged and scored after its last shard was stored."""
        if not tracked.is_stored:
            return
        progress = tracked.progress
        assert progress is not None
        self._submit(
            self._committer,
            tracked,
            lambda: Finished(tracked, progress.finish(self._executor.apply, begun=tracked.begun, notes=tracked.notes)),
        )

    def _fail(self, tracked: TrackedRun, error: AvssError) -> None:
        """End a run with its first error, after that was recorded if the run has begun. Later errors do not count."""
        if tracked.error is not None:
            return
        if self._watch is not None:
            error = self._watch.explain(tracked.spec, error)
        tracked.error = error
        progress = tracked.progress
        if progress is None:
            self._end(tracked, RunState.FAILED)
            return
        error.run_id = progress.run_id
        progress.shards.dropped = True
        if isinstance(error, StorageFull):
            self._storage_is_full = True
        if tracked.state is not RunState.COMMITTING:
            tracked.become(RunState.COMMITTING)

        def record() -> FailureRecorded:
            with suppress(Exception):  # The first error says why, and the run must end.
                progress.record_failure(error)
            return FailureRecorded(tracked)

        self._submit(self._committer, tracked, record)

    def _end(self, tracked: TrackedRun, state: RunState) -> None:
        tracked.become(state)
        if tracked in self._active:
            self._active.remove(tracked)
        if tracked.progress is not None:
            self._runs_of_shards.pop(tracked.progress.shards, None)
            tracked.progress = None  # its tokens may be large
        self._just_ended.append(tracked)
        if state is not RunState.FAILED:
            assert tracked.result is not None
            repeated = tracked.first.spec.name if tracked.first is not None else ""
            self._on_event(RunEnded(tracked.spec.name, tracked.result, repeated))

    def _end_repeats(self) -> None:
        """End the runs that repeat earlier ones: as failed with the same error, or as skipped."""
        for tracked in self._runs:
            if tracked.state is not RunState.REPEATING:
                continue
            assert tracked.first is not None
            if tracked.first.error is not None:
                self._fail(tracked, own_copy(tracked.first.error))
            else:
                self._end(tracked, RunState.SKIPPED)

    def _on_measuring_ended(self, error: BaseException | None) -> None:
        self._is_measuring = False
        if self._is_stopping:
            return
        if isinstance(error, Exception):
            self._fail_executor(error)
        elif error is not None:
            raise error
        elif self._waiting or any(tracked.state in UNMEASURED for tracked in self._active):
            self._fail_executor(RuntimeError("the executor ended before every run was measured"))

    def _fail_executor(self, error: Exception) -> None:
        """End all runs that are planned or measured, as the executor itself has failed. No other run begins."""
        failure = as_failure(error)
        self._failure = failure
        self._is_stopping = True
        self._submitted.close()
        for tracked in self._active.copy():
            if tracked.state in UNMEASURED and tracked.progress is not None:
                self._fail(tracked, own_copy(failure))

    # The end

    def _stop(self) -> None:
        """End the other threads. What has been measured is stored. An interrupt meanwhile is raised after that."""
        self._is_stopping = True
        deadline = time.monotonic() + STOP_SECONDS
        interrupt: KeyboardInterrupt | None = None
        while True:
            try:
                self._end_threads(deadline)
                break
            except KeyboardInterrupt as again:
                interrupt = again
        if interrupt is not None:
            raise interrupt

    def _end_threads(self, deadline: float) -> None:
        """End the other threads: those that measure and plan by an interrupt, if they have not ended by a time."""
        for tracked in self._active:
            if tracked.progress is not None:
                tracked.progress.shards.dropped = True
        self._submitted.close()
        self._planner.close()
        if self._watch is not None:
            self._watch.close()
        for thread in (self._measuring, self._planner):
            self._handle_until_ended(thread, deadline)
            if thread.is_alive:
                thread.interrupt()
                self._handle_until_ended(thread, deadline + INTERRUPT_SECONDS)
        self._committer.wait_until_idle()
        while self._handle_waiting():
            self._committer.wait_until_idle()
        self._committer.close()
        self._committer.join()

    def _handle_until_ended(self, thread: InterruptibleThread, deadline: float) -> None:
        while thread.is_alive and time.monotonic() < deadline:
            self._handle_waiting()
            thread.join(LOOK_SECONDS)

    def _handle_waiting(self) -> bool:
        """Handle the events that have come. Returns whether there were any."""
        any_came = False
        while True:
            try:
                event = self._events.get_nowait()
            except Empty:
                return any_came
            any_came = True
            self._handle(event)

    def _add_note(self, interrupt: KeyboardInterrupt) -> None:
        """Add a note to an interrupt: how many of several runs are done, and how many shards of others are stored."""
        has_several = len(self._runs) > 1
        notes = []
        if has_several:
            done = sum(tracked.state in (RunState.DONE, RunState.SKIPPED) for tracked in self._runs)
            notes.append(f"{done} of {len(self._runs)} runs are done")
        in_progress = [tracked.progress.result for tracked in self._active if tracked.progress is not None]
        total = sum(result.num_shards for result in in_progress)
        if total:
            with suppress(AvssError):
                stored = sum(self._store.reader.num_partials(result.run_id) for result in in_progress)
                which = "of the runs in progress " if has_several else ""
                notes.append(f"{stored} of {total} shards {which}are kept")
        if notes:
            interrupt.add_note(" and ".join(notes))
