"""The reference executor: one replica in this process."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from itertools import groupby

from avss_dist.errors import AvssError, ConfigError, as_failure
from avss_dist.executors.base import Outcome, RunShards, by_model
from avss_dist.measure.shard import analyze_shard
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.partition.base import Placement, Replica
from avss_dist.partition.open import open_replica
from avss_dist.settings import Settings
from avss_dist.system.devices import devices_here, pick_device
from avss_dist.tasks.cells import Cell, CellOutcome, CellResult, measure_cell


class LocalExecutor:
    """See `executors.base.Executor`."""

    def __init__(self, settings: Settings) -> None:
        self.device = pick_device(settings.device).type
        self.devices = devices_here(self.device)

    def replicas(self, placement: Placement) -> int:
        """One."""
        if placement.gpus > self.devices.count:
            raise ConfigError(
                f"{placement.gpus} GPUs a replica were asked for, and there are {self.devices.count}.",
                "Lower --gpus-per-replica.",
            )
        return 1

    def run(self, works: Iterator[RunShards]) -> Generator[Outcome, None, None]:
        """One run after the other: open the model, measure the shards in order, close it."""
        for job, same in groupby(works, key=lambda work: work.replica_spec):
            try:
                replica = open_replica(job.checkpoint, job.settings, job.placement)
            except Exception as error:
                yield from ((work, as_failure(error)) for work in same)
                continue
            try:
                for work in same:
                    yield from self._measure(work, replica)
            finally:
                replica.close()

    @staticmethod
    def _measure(work: RunShards, replica: Replica) -> Iterator[Outcome]:
        for shard in work.shards:
            if work.dropped:
                return
            try:
                result = analyze_shard(replica, shard, work.replica_spec.settings)
            except Exception as error:
                yield work, as_failure(error)
                return
            yield work, result

    def run_cells(self, cells: Sequence[Cell]) -> Generator[CellOutcome, None, None]:
        """See `executors.base.Executor`."""
        for spec, of_model in by_model(cells, Placement()):
            try:
                model = spec.open()
            except Exception as error:
                yield from ((cell, as_failure(error)) for cell in of_model)
                continue
            try:
                for cell in of_model:
                    yield cell, self._ask(model, cell)
            finally:
                model.close()

    @staticmethod
    def _ask(model: LanguageModel, cell: Cell) -> CellResult | AvssError:
        try:
            return measure_cell(model, cell)
        except Exception as error:
            return as_failure(error)

    def close(self) -> None:
        """Nothing outlives `run`."""
