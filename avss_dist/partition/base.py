"""What a model copy is to a worker, however it is spread over devices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from avss_dist.checkpoints import Checkpoint
from avss_dist.config import Settings
from avss_dist.corpus import Batch
from avss_dist.structure import Layer


class Replica(Protocol):
    """One model copy over one or more ranks.

    Attributes:
        layers: the transformer blocks, in order.
        model: what was opened, JSON-ready; goes into the run's row.
        data_rank, data_world: which part of the data this rank takes; 0 of 1 where one rank takes all.
        lockstep: ranks need equal forward counts (fill up with fully masked batches).
        reports_stats: whether this rank's statistics count.
    """

    layers: tuple[Layer, ...]
    model: Mapping[str, Any]
    device: torch.device
    data_rank: int
    data_world: int
    lockstep: bool
    reports_stats: bool

    def forward(self, batch: Batch) -> None:
        """Run the backbone over a batch; nothing is returned, hooks see it."""

    def close(self) -> None:
        """Free the devices."""


def open_replica(checkpoint: Checkpoint, settings: Settings) -> Replica:
    """Open a checkpoint as one replica on this process's device.

    Raises:
        ModelError: it cannot be opened or observed.
    """
    from avss_dist.partition.single import SingleReplica

    return SingleReplica(checkpoint, settings)
