"""Open a replica: one place that knows every partition."""

from __future__ import annotations

from avss_dist.models.checkpoints import Checkpoint
from avss_dist.partition.base import Placement, Replica
from avss_dist.settings import Settings


def open_replica(checkpoint: Checkpoint, settings: Settings, placement: Placement) -> Replica:
    """Open a checkpoint as one replica, or, where it has several ranks, as this process's rank of it.

    Several ranks: every one of them calls this, inside one torch.distributed group (`partition.group.join`).

    Raises:
        ModelError: it cannot be opened or observed.
        ConfigError: it cannot be spread this way over what is here.
    """
    if placement.partition == "streaming":
        from avss_dist.partition.streaming.replica import StreamingReplica

        return StreamingReplica(checkpoint, settings, placement)
    if placement.partition == "device_map":
        from avss_dist.partition.device_map import DeviceMapReplica

        return DeviceMapReplica(checkpoint, settings, placement)
    if placement.partition == "zero3":
        from avss_dist.partition.zero3 import Zero3Replica

        return Zero3Replica(checkpoint, settings, placement)
    if placement.partition == "tensor_parallel":
        from avss_dist.partition.tensor_parallel import TensorParallelReplica

        return TensorParallelReplica(checkpoint, settings, placement)
    from avss_dist.partition.single import SingleReplica

    return SingleReplica(checkpoint, settings)
