"""The driver: plan runs, skip what is done, execute the rest with one pool of workers, commit in the background."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from avss_dist.errors import AvssError, StorageFull, as_failure
from avss_dist.executors.base import Executor, RunShards
from avss_dist.models.checkpoints import slug
from avss_dist.runs.job_file import RunSpec
from avss_dist.runs.planner import Planner
from avss_dist.runs.reporter import Reporter
from avss_dist.runs.run import Run, RunInProgress
from avss_dist.settings import fingerprint
from avss_dist.warehouse.reader import Warehouse

UNCOMMITTED = 8  # results that may wait for the storage before the workers do

Ending = tuple[RunSpec, Run | AvssError]


class Driver:
    """Runs checkpoints with one executor into one warehouse.

    While shards are measured, the next run is planned (in a thread of the executor's) and results are committed (in a
    thread of the driver's, in the order in which they came).
    """

    def __init__(self, store: Warehouse, executor: Executor, reporter: Reporter, *, fresh: bool = False) -> None:
        self._store, self._executor, self._reporter, self._fresh = store, executor, reporter, fresh
        self._planner = Planner(executor, store)
        self._attempts: dict[RunShards, tuple[RunSpec, RunInProgress]] = {}
        self._run_ids: set[str] = set()
        self._ended: deque[Ending] = deque()
        self._full = False
        self._room = threading.BoundedSemaphore(UNCOMMITTED)

    def run(self, specs: Sequence[RunSpec]) -> Iterator[Ending]:
        """Yield each run as it ends, done, skipped, or as the error that ended it; the others go on.

        Raises:
            AvssError: the executor itself failed.
        """
        with ThreadPoolExecutor(1, "commit") as self._committer:
            try:
                with closing(self._executor.run(self._works(specs))) as outcomes:
                    for work, outcome in outcomes:
                        self._take(work, outcome)
                        yield from self._endings()
            except Exception as error:  # of the executor itself: what it was on has failed
                for work in list(self._attempts):
                    self._take(work, as_failure(error))
                raise as_failure(error) from error
        yield from self._endings()

    def _endings(self) -> Iterator[Ending]:
        while self._ended:
            yield self._ended.popleft()

    def _works(self, specs: Sequence[RunSpec]) -> Iterator[RunShards]:
        """What there is to measure, one run after the other; without space for results, no run is begun."""
        for spec in specs:
            try:
                self._reporter.planning(spec.name)
                planned = self._planner.prepare(spec)
                run = planned.run
                if run.run_id in self._run_ids or self._is_done(run):
                    self._end(spec, run)
                    continue
                if self._full:
                    self._ended.append((spec, self._not_begun(run)))
                    continue
                self._run_ids.add(run.run_id)
                self._reporter.placed(spec.name, planned.replica_spec.placement)
                attempt = RunInProgress(planned, self._store, fresh=self._fresh)
            except Exception as error:
                self._ended.append((spec, as_failure(error)))
                continue
            self._reporter.started(spec.name, run.num_tokens, attempt.done_tokens)
            self._attempts[attempt.work] = spec, attempt
            if attempt.left:
                yield attempt.work
            else:
                self._commit(partial(self._finish, attempt.work))

    def _not_begun(self, run: Run) -> StorageFull:
        error = StorageFull(
            f"Not begun: no space left on {self._store.root}.", "Free some and run the same command again."
        )
        error.run_id = run.run_id
        return error

    def _is_done(self, run: Run) -> bool:
        return not self._fresh and (self._store.run(run.run_id) or {}).get("status") == "done"

    def _take(self, work: RunShards, outcome: Any) -> None:
        """A result or the end of a work; what follows from it is done by the committer."""
        _, attempt = self._attempts.get(work, (None, None))
        if attempt is None:
            return
        if isinstance(outcome, AvssError):
            self._commit(partial(self._fail, work, outcome))
        elif attempt.counts(outcome):
            self._commit(partial(self._keep, work, outcome))
            if not attempt.left:
                self._commit(partial(self._finish, work))

    def _commit(self, step: Callable[[], None]) -> None:
        self._room.acquire()
        self._committer.submit(step).add_done_callback(lambda _: self._room.release())

    def _keep(self, work: RunShards, result: Any) -> None:
        if work not in self._attempts:
            return  # it has failed
        spec, attempt = self._attempts[work]
        try:
            attempt.keep(result)
        except Exception as error:
            self._fail(work, as_failure(error))
        else:
            self._reporter.advanced(spec.name, result.num_tokens)

    def _finish(self, work: RunShards) -> None:
        if work not in self._attempts:
            return
        spec, attempt = self._attempts[work]
        try:
            run = attempt.finish()
        except Exception as error:
            self._fail(work, as_failure(error))
        else:
            del self._attempts[work]
            self._end(spec, run)

    def _fail(self, work: RunShards, error: AvssError) -> None:
        if work not in self._attempts:
            return
        spec, attempt = self._attempts.pop(work)
        self._full |= isinstance(error, StorageFull)
        with suppress(AvssError):  # storage that fails; the first error says why
            attempt.fail(error)
        self._ended.append((spec, error))

    def _end(self, spec: RunSpec, run: Run) -> None:
        self._reporter.finished(spec.name, run)
        self._ended.append((spec, run))


def record_failure(store: Warehouse, spec: RunSpec, error: AvssError) -> Run:
    """A run that failed, as its row; one that got as far as a fingerprint is recorded already."""
    settings = spec.settings.as_dict()
    print_ = fingerprint(model=spec.model, corpus=spec.corpus, settings=settings)
    run_id = error.run_id or f"{slug(Path(spec.model).name)}-{print_[:10]}"
    if not error.run_id:
        row = {
            "run_id": run_id,
            "fingerprint": print_,
            "status": "failed",
            "error": str(error),
            "created_at": datetime.now(UTC),
            "model": spec.model,
            "corpus": spec.corpus,
            "settings": json.dumps(settings),
        }
        with suppress(StorageFull):  # the error is told all the same
            store.write_run(row)
    return Run(run_id=run_id, model=spec.model, warehouse=store.root, status="failed", error=str(error))
