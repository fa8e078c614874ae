"""A planned run, as the planner gives it to the driver."""

from __future__ import annotations

from dataclasses import dataclass

from avss_dist.corpus.shards import CorpusPlan
from avss_dist.models.checkpoint.training import TrainingPoint
from avss_dist.models.checkpoint.written import FileState
from avss_dist.runs.result import Run
from avss_dist.runs.work import ReplicaSpec


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """A planned run, before a weight is loaded.

    Attributes:
        fingerprint: SHA-256 of all inputs that can change a number. The run id begins with the model and ends with it.
        result: what the caller of `score` gets if all of it is done before.
        replicas: model copies that work in parallel.
        training: point of a training at which the checkpoint was saved.
        files: states of the configuration and the weights in a local folder, from before its revision was computed.
    """

    replica_spec: ReplicaSpec
    corpus: CorpusPlan
    fingerprint: str
    result: Run
    replicas: int
    training: TrainingPoint
    files: tuple[FileState, ...] = ()

    @property
    def run_id(self) -> str:
        """Id of the run in the warehouse."""
        return self.result.run_id

    @property
    def expected(self) -> dict[int, str]:
        """Content hashes of the shards, by id."""
        return {shard.shard_id: shard.content_hash for shard in self.corpus.shards}
