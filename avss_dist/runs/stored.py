"""The stored part of a planned run: whether it is done, and how many of its shards are there."""

from __future__ import annotations

from dataclasses import dataclass

from avss_dist.models.checkpoint.size import Footprint
from avss_dist.partition.choose import size_of
from avss_dist.runs.job_file import RunSpec
from avss_dist.runs.planned import PlannedRun
from avss_dist.runs.planner import Planner
from avss_dist.warehouse.store import Store


@dataclass(frozen=True, kw_only=True)
class StoredRun:
    """A planned run, and what is stored of it.

    Attributes:
        size: size of the model; None if unknown.
        is_done: whether the run is stored with its scores.
        num_kept: number of stored shards of a run that is not done.
    """

    planned: PlannedRun
    size: Footprint | None
    is_done: bool
    num_kept: int


def look_up_run(planner: Planner, store: Store, spec: RunSpec) -> StoredRun:
    """Plan a run, and look up what is stored of it.

    Raises:
        AvssError: it cannot be run.
    """
    planned = planner.prepare(spec)
    size = size_of(planned.replica_spec.checkpoint, planned.replica_spec.settings)
    run_row = store.reader.readable_run(planned.run_id)
    is_done = run_row is not None and run_row.get("status") == "done"
    num_kept = 0
    if not is_done:
        num_kept = sum(1 for _ in store.reader.each_shard(planned.run_id, planned.expected))
    return StoredRun(planned=planned, size=size, is_done=is_done, num_kept=num_kept)
