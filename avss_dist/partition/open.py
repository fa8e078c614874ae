"""Open a replica of any partition, by the class that the registry names."""

from __future__ import annotations

from importlib import import_module
from typing import Any, cast

from avss_dist.models.checkpoints import Checkpoint
from avss_dist.partition.base import Placement, Replica
from avss_dist.registry import PARTITIONS
from avss_dist.settings import Settings
from avss_dist.system.cores import use_threads


def replica_class(partition: str) -> Any:
    """Return the class of a partition's replicas; see `partition.base.Replica`."""
    module, _, name = PARTITIONS[partition].opens.partition(":")
    return getattr(import_module(module), name)


def open_replica(checkpoint: Checkpoint, settings: Settings, placement: Placement, *, head: bool = False) -> Replica:
    """Open a checkpoint as one replica, or, where it has several ranks, as this process's rank of it.

    Several ranks: every one of them calls this, inside one torch.distributed group (`partition.group.join`).

    Args:
        head: its head too, so that it has a `language_model`.

    Raises:
        ModelError: it cannot be opened or observed, or has no head that predicts the next token.
        ConfigError: it cannot be spread this way over the devices of this machine.
    """
    use_threads(settings.threads)
    return cast(Replica, replica_class(placement.partition)(checkpoint, settings, placement, head=head))
