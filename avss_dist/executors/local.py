"""The reference executor: one replica in this process."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from itertools import groupby

from avss_dist.errors import AvssError, ConfigError, as_failure
from avss_dist.executors.base import Outcome, RunShards, by_model
from avss_dist.measure.shard import analyze_shard
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.partition.base import Placement, Replica
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
                f"A replica of {placement.gpus} GPUs needs more than the {self.devices.count} that there are.",
                "Lower `gpus_per_replica`.",
            )
        return 1

    def run(self, runs: Iterator[RunShards]) -> Generator[Outcome, None, None]:
        """One run after the other: open the model, measure the shards in order, close it."""
        for spec, same in groupby(runs, key=lambda run: run.replica_spec):
            try:
                replica = spec.open()
            except Exception as error:
                yield from ((run, as_failure(error)) for run in same)
                continue
            try:
                for run in same:
                    yield from self._measure(run, replica)
            finally:
                replica.close()

    @staticmethod
    def _measure(run: RunShards, replica: Replica) -> Iterator[Outcome]:
        for shard in run.shards:
            if run.dropped:
                return
            try:
                result = analyze_shard(replica, shard, run.replica_spec.settings)
            except Exception as error:
                yield run, as_failure(error)
                return
            yield run, result

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
                    yield cell, self._measure_cell(model, cell)
            finally:
                model.close()

    @staticmethod
    def _measure_cell(model: LanguageModel, cell: Cell) -> CellResult | AvssError:
        try:
            return measure_cell(model, cell)
        except Exception as error:
            return as_failure(error)

    def close(self) -> None:
        """Nothing outlives `run`."""
