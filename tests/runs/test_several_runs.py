"""Jobs of several runs: what a stop tells, and the line of a mistake that every run shares."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from avss_dist.runs.driver import Driver
from avss_dist.runs.job_file import JobError, read_job


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


def test_a_wrong_limit_is_reported_once_at_its_line(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("warehouse: w\nmodels:\n- org/a\n- model: org/b\n  dtype: float32\ncorpora: [builtin:pydoc]\n")
    job.write_text(f"{job.read_text()}execution:\n  executor: local\n  max_memory:\n    gpu0: 3GB\n")
    with pytest.raises(JobError) as told:
        read_job(job)
    assert told.value.message.startswith(f"{job}:10: max_memory") and "problems" not in told.value.message
