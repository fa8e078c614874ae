"""The reference executor: one replica in this process."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from avss_dist.config import Settings
from avss_dist.corpus import Shard
from avss_dist.errors import ConfigError
from avss_dist.executors.base import Job
from avss_dist.partition.base import Placement, open_replica
from avss_dist.partition.devices import devices_here, pick_device
from avss_dist.stats import ShardResult
from avss_dist.worker import analyze_shard


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

    def run(self, job: Job, shards: Sequence[Shard]) -> Generator[ShardResult, None, None]:
        """Open the model, measure the shards in order, close it."""
        replica = open_replica(job.checkpoint, job.settings, job.placement)
        try:
            for shard in shards:
                yield analyze_shard(replica, shard, job.settings)
        finally:
            replica.close()

    def close(self) -> None:
        """Nothing outlives `run`."""
