"""Several runs: what a stop and the log tell, and the line of a mistake that every run of a job shares."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from avss_dist.core.errors import StorageFull
from avss_dist.executors.interface import RunShards
from avss_dist.runs import events
from avss_dist.runs.driver import Driver
from avss_dist.runs.job_file import JobError, read_job
from avss_dist.runs.run import Run


@pytest.mark.parametrize(
    ("specs", "note"),
    [(1, "4 of 48 shards are kept"), (5, "3 of 5 runs are done and 4 of 48 shards of the runs in progress are kept")],
)
def test_a_stop_counts_all_runs(specs: int, note: str) -> None:
    store: Any = SimpleNamespace(num_partials=lambda _: 4)
    executor: Any = SimpleNamespace()
    driver = Driver(store, executor, lambda _: None)
    for _ in range(3 if specs > 1 else 0):
        driver._end(*[SimpleNamespace(name="org/a")] * 2)  # type: ignore[arg-type]
    driver._in_progress["shards"] = (None, SimpleNamespace(run=SimpleNamespace(run_id="a", num_shards=48)))  # type: ignore
    stop = KeyboardInterrupt()
    driver._add_note(stop, specs)
    assert stop.__notes__ == [note]


def test_no_run_begins_where_storage_is_full_and_what_comes_late_of_a_failed_run_is_left() -> None:
    store: Any = SimpleNamespace(root="w", run=lambda _: None)
    nothing: Any = SimpleNamespace()
    driver, failure = Driver(store, nothing, lambda _: None), StorageFull("No space left on w.")
    shards = RunShards(run_id="a", replica_spec=nothing, shards=[])
    failing: Any = (SimpleNamespace(name="org/a"), SimpleNamespace(fail=lambda _: None))
    driver._in_progress[shards] = failing
    for outcome in (failure, None, failure):
        driver._attempt(shards, partial(driver._keep, outcome))
    driver._attempt(shards, driver._finish)
    run = Run(run_id="b", model="org/b", warehouse="w", status="failed")
    planner: Any = SimpleNamespace(prepare=lambda _: SimpleNamespace(run=run))
    driver._planner = planner
    following: Any = [SimpleNamespace(name="org/b")]
    assert list(driver._plan_runs(following)) == []
    (_, first), (_, second) = driver._ended
    assert first is failure and isinstance(second, StorageFull)
    assert (second.message, second.run_id) == ("Not begun: no space left on w.", "b")


def test_the_log_of_runs_has_a_line_for_each_step_and_one_in_half_a_minute(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock, run = SimpleNamespace(now=100.0), Run(run_id="r", model="m", warehouse="w", status="done")
    seen: list[events.RunEvent] = []
    monkeypatch.setattr(events, "time", SimpleNamespace(monotonic=lambda: clock.now))
    placement: Any = SimpleNamespace(partition="single", why="it fits")
    tell = events.both(seen.append, events.LogRuns())
    with caplog.at_level("INFO", "avss_dist"):
        for event in (events.RunReading("m"), events.RunRepeated("n", "m"), events.RunPlaced("m", placement)):
            tell(event)
        tell(events.RunStarted("m", 10, 1))
        for clock.now, tokens in ((129.0, 2), (130.0, 3), (159.0, 1), (160.0, 1)):
            tell(events.ShardMeasured("m", tokens))
        tell(events.RunEnded("n", run))
        tell(events.RunEnded("m", replace(run, status="failed", error="no memory")))
    lines = ["m: reading", "n: the same model, text and settings as m; measured once.", "m: single; it fits"]
    lines += ["m: 6 of 10 tokens", "m: 8 of 10 tokens", "n: done", "m: no memory"]
    assert [record.getMessage() for record in caplog.records] == lines and len(seen) == 10


def test_a_wrong_limit_is_reported_once_at_its_line(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("warehouse: w\nmodels:\n- org/a\n- model: org/b\n  dtype: float32\ncorpora: [builtin:pydoc]\n")
    job.write_text(f"{job.read_text()}execution:\n  executor: local\n  max_memory:\n    gpu0: 3GB\n")
    with pytest.raises(JobError) as told:
        read_job(job)
    assert told.value.message.startswith(f"{job}:10: max_memory") and "problems" not in told.value.message
