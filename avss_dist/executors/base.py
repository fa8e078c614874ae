"""The interface of executors: they measure shards and cells, each of which gives one pure result."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from avss_dist.corpus.shards import Shard
from avss_dist.errors import AvssError
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.partition.base import Placement
from avss_dist.partition.open import open_replica
from avss_dist.settings import Settings
from avss_dist.stats.layer_stats import ShardResult
from avss_dist.system.devices import Devices
from avss_dist.tasks.cells import Cell, CellOutcome


@dataclass(frozen=True, kw_only=True)
class ReplicaSpec:
    """What a worker needs to know to open its rank of a replica: which model, computed how, spread how."""

    checkpoint: Checkpoint
    settings: Settings
    placement: Placement

    def open(self) -> Any:
        """This process's rank, a `partition.base.Replica`.

        Raises:
            AvssError: it cannot be opened or observed.
        """
        return open_replica(self.checkpoint, self.settings, self.placement)


class LanguageModelSpec(ReplicaSpec):
    """The same for the cells of evaluations: a causal language model with its head, whole on one device."""

    def open(self) -> LanguageModel:
        """See `ReplicaSpec.open`."""
        return LanguageModel(self.checkpoint, self.settings)


def by_model(cells: Iterable[Cell], placement: Placement) -> list[tuple[LanguageModelSpec, list[Cell]]]:
    """Cells, those of one model together; models in the order in which they come first."""
    models: dict[tuple[Checkpoint, Settings], list[Cell]] = {}
    for cell in cells:
        models.setdefault((cell.checkpoint, cell.settings), []).append(cell)
    return [
        (LanguageModelSpec(checkpoint=checkpoint, settings=settings, placement=placement), of_model)
        for (checkpoint, settings), of_model in models.items()
    ]


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
    """Measures shards and cells."""

    @property
    def devices(self) -> Devices:
        """What there is to work with."""

    @property
    def device(self) -> str:
        """``cpu`` or ``cuda``, where models compute."""

    def replicas(self, placement: Placement) -> int:
        """How many model copies of this placement run in parallel.

        Raises:
            ConfigError: there are too few devices.
        """

    def run(self, runs: Iterator[RunShards]) -> Generator[Outcome, None, None]:
        """Yield a result for every shard of every run, in any order; a shard may come twice, and is equal then.

        The next run may be taken, in another thread, while one is measured. An AvssError in place of a result ends
        its run alone: the model cannot be opened or observed, or a shard failed more often than it is retried.
        """

    def run_cells(self, cells: Sequence[Cell]) -> Generator[CellOutcome, None, None]:
        """Yield the result of every cell, in any order; an AvssError in its place is of that cell alone."""

    def close(self) -> None:
        """Stop workers and free devices."""
