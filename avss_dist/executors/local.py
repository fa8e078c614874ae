"""The reference executor: one replica in this process."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from avss_dist.config import Settings
from avss_dist.corpus import Shard
from avss_dist.executors.base import Job
from avss_dist.partition.base import open_replica
from avss_dist.partition.single import pick_device
from avss_dist.stats import ShardResult
from avss_dist.worker import analyze_shard


class LocalExecutor:
    """See `executors.base.Executor`."""

    replicas = 1

    def __init__(self, settings: Settings) -> None:
        self.device = pick_device(settings.device).type

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
