"""The interface of executors: they measure shards and cells, each of which gives one pure result."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, TypeVar

from avss_dist.core.errors import AvssError
from avss_dist.core.settings import Settings, fingerprint
from avss_dist.corpus.shards import Shard
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.partition.replica import Placement, Replica, open_replica
from avss_dist.stats.layer_stats import ShardResult
from avss_dist.system.devices import Devices
from avss_dist.tasks.cells import Cell, CellOutcome
from avss_dist.warehouse.store import Receipt, SharedWarehouse

S = TypeVar("S")
T = TypeVar("T")


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

    def open(self) -> Replica:
        """Open this process's rank of the replica.

        Raises:
            AvssError: the model cannot be opened or observed.
        """
        return open_replica(self.checkpoint, self.settings, self.placement, head=self.head)


def by_model(cells: Iterable[Cell]) -> list[tuple[ReplicaSpec, list[Cell]]]:
    """Group cells by the replica that measures them, in the order of first appearance."""
    models: dict[tuple[Any, ...], tuple[ReplicaSpec, list[Cell]]] = {}
    for cell in cells:
        checkpoint, settings, placement = cell.checkpoint, cell.settings, cell.placement
        spec = ReplicaSpec(checkpoint=checkpoint, settings=settings, placement=placement, head=True)
        models.setdefault((checkpoint, settings, fingerprint(**asdict(placement))), (spec, []))[1].append(cell)
    return [*models.values()]


@dataclass(eq=False, kw_only=True)
class RunShards:
    """The shards of one run that are still to be measured.

    Attributes:
        warehouse: where workers may write partials themselves.
        dropped: set by the driver when it has no use for further results.
        notes: what happened to the run while it was measured, such as lost nodes; the executor adds to it.
    """

    run_id: str
    replica_spec: ReplicaSpec
    shards: Sequence[Shard]
    warehouse: SharedWarehouse | None = None
    dropped: bool = False
    notes: list[str] = field(default_factory=list)


Underway = Callable[[Cell, str, float], None]
"""Progress callback: receives a cell, its current activity, and the share of the activity that is done (0 to 1)."""
Outcome = tuple[RunShards, ShardResult | Receipt | AvssError]


class Executor(Protocol):
    """Measures shards and cells."""

    @property
    def devices(self) -> Devices:
        """Devices and memory that are available."""

    def connect(self) -> None:
        """Connect to Ray once, until `close`. Other executors of this process share the connection.

        Raises:
            ConfigError: the cluster cannot be reached.
            RunFailed: workers cannot be started here.
        """

    def replicas(self, placement: Placement) -> int:
        """Return the number of model copies of this placement that run in parallel.

        Raises:
            ConfigError: there are too few devices.
        """

    def run(self, runs: Iterator[RunShards]) -> Generator[Outcome, None, None]:
        """Yield a result for every shard of every run, in any order. A shard may come twice, with equal results.

        The next run may be taken, in another thread, while one is measured. An AvssError in place of a result ends
        its run alone: the model cannot be opened or observed, or a shard failed more often than it is retried.
        """

    def run_cells(
        self, rounds: Iterator[Sequence[Cell]], underway: Underway | None = None
    ) -> Generator[CellOutcome, None, None]:
        """Yield the result of every cell, in any order. An AvssError in its place concerns that cell alone.

        The next round may be taken, in another thread, while one is measured, and may wait for its results. Models
        stay open from round to round.

        Args:
            underway: called now and then in the middle of a cell that takes long.
        """

    def apply(self, function: Callable[[S], T], items: Sequence[S]) -> Iterator[T]:
        """Yield the function's value for every item, in order, computed in parallel if there are several machines.

        Args:
            function, items: must be picklable.

        Raises:
            AvssError: the function raised it.
        """

    def close(self) -> None:
        """Stop workers and free devices."""
