"""Units of work for tests of scheduling: queues of shards and cells of models that nobody opens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from avss_dist.core.intervention import Intervention
from avss_dist.core.settings import Settings
from avss_dist.models.checkpoint.locate import Checkpoint
from avss_dist.partition.placement import Placement
from avss_dist.runs.ray.queue import CellQueue, ShardQueue
from avss_dist.runs.work import ReplicaSpec, RunShards
from avss_dist.tasks.task import Cell
from avss_dist.tasks.text_loss import TextLoss
from support.causal_lm import SMALL, random_shard

SETTINGS = Settings(**SMALL)
SHARDS = [replace(random_shard(1 + i % 5), shard_id=i) for i in range(100)]


def spec_of(model: str = "model", *, head: bool = False, **placement: Any) -> ReplicaSpec:
    """Return how a worker would open a model."""
    checkpoint = Checkpoint(name=model, source="folder", path=f"/{model}", revision="0")
    return ReplicaSpec(checkpoint=checkpoint, settings=SETTINGS, placement=Placement(**placement), head=head)


def shard_queue(
    number: int = 5, model: str = "model", run_id: str = "r", **placement: Any
) -> tuple[ShardQueue, RunShards]:
    """Return the queue of a run with a number of shards of 1 to 5 rows, and the run."""
    run = RunShards(run_id=run_id, replica_spec=spec_of(model, **placement), shards=SHARDS[:number])
    return ShardQueue(run), run


def cell_queue(
    tasks: Sequence[str], patch: Any = None, underway: Any = None, **placement: Any
) -> tuple[CellQueue, list[Cell]]:
    """Return the queue of one cell for each task, and the cells."""
    spec = spec_of(head=True, **placement)
    shared: dict[str, Any] = {"run_id": "e", "checkpoint": spec.checkpoint, "settings": SETTINGS}
    measure = TextLoss(random_shard())
    cells = [
        Cell(**shared, task=task, part=i, measure=measure, intervention=Intervention(patch=patch))
        for i, task in enumerate(tasks)
    ]
    return CellQueue(spec, cells, underway), cells
