"""Work of executors: shards and cells, each of which gives one pure result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol, TypeAlias, TypeVar

import pyarrow as pa

from avss_dist.core.errors import AvssError
from avss_dist.core.fingerprint import fingerprint
from avss_dist.core.settings import Settings
from avss_dist.corpus.shards import Shard
from avss_dist.models.checkpoint.locate import Checkpoint
from avss_dist.models.checkpoint.reloading import ReloadableModel
from avss_dist.partition.placement import Placement
from avss_dist.partition.replica import Replica, open_replica
from avss_dist.stats.layer_stats import ShardResult
from avss_dist.tasks.task import Cell, Heartbeat
from avss_dist.warehouse.shared import OpenShared

Event = TypeVar("Event", covariant=True)
Result = TypeVar("Result", covariant=True)


@dataclass(frozen=True, kw_only=True)
class ReplicaSpec:
    """Specification by which a worker opens its rank of a replica: model, settings and placement.

    Attributes:
        head: whether to open the language model head, which the cells of evaluations need.
    """

    checkpoint: Checkpoint
    settings: Settings
    placement: Placement
    head: bool = False

    def open(self, reloadable: ReloadableModel | None = None) -> Replica:
        """Open this process's rank of the replica.

        Args:
            reloadable: see `partition.replica.Replica`.

        Raises:
            AvssError: the model cannot be opened or observed.
        """
        return open_replica(self.checkpoint, self.settings, self.placement, head=self.head, reloadable=reloadable)


class ReplicaSlot:
    """Place of the replica that a worker has open. The next one may take over its module, see `reloading`."""

    def __init__(self) -> None:
        self._replica: Replica | None = None

    def open(self, spec: ReplicaSpec) -> Replica:
        """Open a replica in place of the last one.

        Raises:
            AvssError: the model cannot be opened or observed. Then none is open.
        """
        replica = self._replica
        self._replica = None
        reloadable = None
        if replica is not None:
            reloadable = replica.release()
            del replica
        self._replica = spec.open(reloadable)
        return self._replica

    def close(self) -> None:
        """Close the replica, if one is open."""
        if self._replica is not None:
            self._replica.close()
            self._replica = None


def by_model(cells: Iterable[Cell]) -> list[tuple[ReplicaSpec, list[Cell]]]:
    """Group cells by the replica that measures them, in the order of first appearance."""
    models: dict[tuple[object, ...], tuple[ReplicaSpec, list[Cell]]] = {}
    for cell in cells:
        key = (cell.checkpoint, cell.settings, fingerprint(**asdict(cell.placement)))
        if key not in models:
            spec = ReplicaSpec(checkpoint=cell.checkpoint, settings=cell.settings, placement=cell.placement, head=True)
            models[key] = (spec, [])
        _, group = models[key]
        group.append(cell)
    return [*models.values()]


class RankTask(Protocol[Event, Result]):
    """A task that ranks do together. It is pickled."""

    @property
    def device(self) -> str:
        """Kind of device, ``cpu`` or ``cuda``."""

    def run(self, heartbeat: Heartbeat, on_event: Callable[[Event], None]) -> Result:
        """Do the part of this process's rank, and return its result.

        Args:
            heartbeat: to be called whenever a layer begins.
            on_event: sends an event to the driver.
        """


@dataclass(eq=False, kw_only=True)
class RunShards:
    """The shards of one run that are still to be measured.

    Attributes:
        warehouse: where workers may write partials themselves.
        dropped: set by the driver, and only by it, when it has no use for further results.
    """

    run_id: str
    replica_spec: ReplicaSpec
    shards: Sequence[Shard]
    warehouse: OpenShared | None = None
    dropped: bool = False


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """A worker's message that it has measured a shard. It is short, as one driver serves many workers.

    Attributes:
        shard_id, num_tokens, seconds: see `ShardResult`.
        files: result of `encode_shard`, if the worker does not reach the warehouse, or the run has ended. Else it has
            written them.
    """

    shard_id: int
    num_tokens: int
    seconds: float
    files: Mapping[str, pa.Buffer]


@dataclass(frozen=True)
class Note:
    """Note on a run for its row, such as the loss of a node while it was measured."""

    text: str


Underway = Callable[[Cell, str, float], None]
"""Progress callback: receives a cell, its current activity, and the share of the activity that is done (0 to 1)."""
RunOutcome: TypeAlias = ShardResult | Receipt | Note | AvssError
"""Outcome of a run that an executor yields: the result of a shard, a note, or the error that ends the run."""
Outcome = tuple[RunShards, RunOutcome]
