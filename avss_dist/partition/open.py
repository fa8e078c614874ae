"""Opening of a replica of any partition, by the class in the registry."""

from __future__ import annotations

from importlib import import_module
from typing import Any, cast

from avss_dist.core.registry import PARTITIONS
from avss_dist.core.settings import Settings
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.partition.base import Placement, Replica
from avss_dist.system.devices import use_threads


def replica_class(partition: str) -> Any:
    """Return the class of a partition's replicas; see `partition.base.Replica`."""
    module, _, name = PARTITIONS[partition].opens.partition(":")
    return getattr(import_module(module), name)


def open_replica(checkpoint: Checkpoint, settings: Settings, placement: Placement, *, head: bool = False) -> Replica:
    """Open a checkpoint as one replica, or as this process's rank of a replica of several ranks.

    Every rank calls this, inside one torch.distributed group (`partition.group.join`).

    Args:
        head: open the head, too, so that the replica has a `language_model`.

    Raises:
        ModelError: the model cannot be opened or observed, or has no head that predicts the next token.
        ConfigError: the devices of this machine do not fit the placement.
    """
    use_threads(settings.threads)
    return cast(Replica, replica_class(placement.partition)(checkpoint, settings, placement, head=head))
