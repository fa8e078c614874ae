"""One interface to whatever runs shards: give it works, take one pure result for each shard."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch

from avss_dist.checkpoints import Checkpoint
from avss_dist.config import GANGS, Execution, Settings
from avss_dist.corpus import Shard
from avss_dist.errors import AvssError, RunFailed
from avss_dist.partition.base import Placement
from avss_dist.partition.devices import Devices
from avss_dist.stats import ShardResult

if TYPE_CHECKING:
    from avss_dist.executors.cells import Cell, CellOutcome


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every worker needs to know: which model to open, how to measure it, how to spread it.

    Attributes:
        run_id: the run that its shards are of, which makes no other job of it.
    """

    checkpoint: Checkpoint
    settings: Settings
    placement: Placement
    run_id: str = field(default="", compare=False)


@dataclass(eq=False, kw_only=True)
class Work:
    """The shards of one run that are still to be measured.

    Attributes:
        dropped: set by the driver when it has no use for further results.
    """

    job: Job
    shards: Sequence[Shard]
    dropped: bool = False


Outcome = tuple[Work, ShardResult | AvssError]


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

    def run(self, works: Iterator[Work]) -> Generator[Outcome, None, None]:
        """Yield a result for every shard of every work, in any order; a shard may come twice, and is equal then.

        The next work may be taken, in another thread, while one is measured. An AvssError in place of a result ends
        its work alone: the model cannot be opened or observed, or a shard failed more often than it is retried.
        """

    def run_cells(self, cells: Sequence[Cell]) -> Generator[CellOutcome, None, None]:
        """Yield what every cell gives, in any order; an AvssError in its place is of that cell alone."""

    def close(self) -> None:
        """Stop workers and free devices."""


def as_failure(error: Exception) -> AvssError:
    """An error as a run's end: a model's own code can raise anything, and must not stop the other models."""
    if isinstance(error, AvssError):
        return error
    failure = RunFailed(f"{type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure


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
