"""One interface to whatever runs shards: give it works, take one pure result for each shard."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from avss_dist.corpus.shards import Shard
from avss_dist.errors import AvssError
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.partition.base import Placement
from avss_dist.settings import Settings
from avss_dist.stats.layer_stats import ShardResult
from avss_dist.system.devices import Devices

if TYPE_CHECKING:
    from avss_dist.tasks.cells import Cell, CellOutcome


@dataclass(frozen=True, kw_only=True)
class ReplicaSpec:
    """What a worker needs to know to open its rank of a replica: which model, computed how, spread how."""

    checkpoint: Checkpoint
    settings: Settings
    placement: Placement


@dataclass(eq=False, kw_only=True)
class RunShards:
    """The shards of one run that are still to be measured.

    Attributes:
        dropped: set by the driver when it has no use for further results.
    """

    run_id: str
    replica_spec: ReplicaSpec
    shards: Sequence[Shard]
    dropped: bool = False


Outcome = tuple[RunShards, ShardResult | AvssError]


class Executor(Protocol):
    """Runs shards.

    Attributes:
        devices: what there is to work with.
        device: ``cpu`` or ``cuda``, where they work.
    """

    devices: Devices
    device: str

    def replicas(self, placement: Placement) -> int:
        """How many model copies of this placement work in parallel.

        Raises:
            ConfigError: there are too few devices.
        """

    def run(self, works: Iterator[RunShards]) -> Generator[Outcome, None, None]:
        """Yield a result for every shard of every work, in any order; a shard may come twice, and is equal then.

        The next work may be taken, in another thread, while one is measured. An AvssError in place of a result ends
        its work alone: the model cannot be opened or observed, or a shard failed more often than it is retried.
        """

    def run_cells(self, cells: Sequence[Cell]) -> Generator[CellOutcome, None, None]:
        """Yield what every cell gives, in any order; an AvssError in its place is of that cell alone."""

    def close(self) -> None:
        """Stop workers and free devices."""
