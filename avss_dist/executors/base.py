"""One interface to whatever runs shards: give it a job and shards, take one pure result for each."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from avss_dist.checkpoints import Checkpoint
from avss_dist.config import GANGS, Execution, Settings
from avss_dist.corpus import Shard
from avss_dist.partition.base import Placement
from avss_dist.partition.devices import Devices
from avss_dist.stats import ShardResult


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every worker needs to know: which model to open, how to measure it, how to spread it."""

    checkpoint: Checkpoint
    settings: Settings
    placement: Placement


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

    def run(self, job: Job, shards: Sequence[Shard]) -> Generator[ShardResult, None, None]:
        """Yield a result for every shard, in any order; a shard may come twice, and is equal then.

        Raises:
            AvssError: the model cannot be opened or observed, or a shard failed more often than it is retried.
        """

    def close(self) -> None:
        """Stop workers and free devices."""


def open_executor(execution: Execution, settings: Settings) -> Executor:
    """The executor that was asked for; ``auto`` is Ray where there is more than one process to run, or a cluster."""
    from avss_dist.executors.local import LocalExecutor

    gpus = torch.cuda.device_count() if settings.device != "cpu" else 0
    wide = execution.address or os.environ.get("RAY_ADDRESS") or (execution.replicas or gpus or 1) > 1
    wide = wide or execution.partition in GANGS
    if execution.executor == "local" or (execution.executor == "auto" and not wide):
        return LocalExecutor(settings)
    from avss_dist.executors.ray import RayExecutor

    return RayExecutor(execution, settings)
