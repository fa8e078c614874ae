"""Catalog of partitions, of which each is one row here and one class of replicas, and of shardings of a training.

It imports nothing, so that the command line lists the names without loading anything else.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PartitionInfo:
    """A distribution of one replica (a model copy) over devices.

    Attributes:
        opens: ``module:class`` of the replica; the class takes (checkpoint, settings, placement, head=...).
            See `partition.replica.Replica`, which also tells its memory.
        summary: description in a few words.
        whole: one process has the whole model on one device. Such a replica can measure several shards at once, and
            copies of it can share a task. The first such partition is chosen if the model fits.
        layerwise: only running layers have their weights in memory. The first such partition is chosen if no other
            fits.
        gang: a replica is several processes, each a rank with one GPU, or on a CPU.
        several_gpus: one process uses several GPUs. The first such partition is chosen if the model fits on a host's.
        offloads: weights or hidden states may leave the devices: ``max_memory`` limits the memory on devices.
        splits_data: ranks take different shards; otherwise all take the same shard, and rank 0 reports.
        splits_matrices: no process ever has a whole weight, even while a layer runs. Sums have another order than on
            one device, so the number of ranks is fingerprinted. Weights of an open replica can be neither rounded nor
            changed, so that repairs cannot be fitted and evaluated in place.
    """

    opens: str
    summary: str
    whole: bool = False
    layerwise: bool = False
    gang: bool = False
    several_gpus: bool = False
    offloads: bool = False
    splits_data: bool = False
    splits_matrices: bool = False


PARTITIONS = {
    "single": PartitionInfo(
        opens="avss_dist.partition.replica:Replica",
        summary="the whole model on one device",
        whole=True,
    ),
    "device_map": PartitionInfo(
        opens="avss_dist.partition.device_map:DeviceMapReplica",
        summary="layers over the GPUs of one process, the rest in host memory and on disk",
        several_gpus=True,
        offloads=True,
    ),
    "streaming": PartitionInfo(
        opens="avss_dist.partition.streaming.replica:StreamingReplica",
        summary="one layer in memory at a time, read from the files once for each shard",
        layerwise=True,
        offloads=True,
    ),
    "fsdp": PartitionInfo(
        opens="avss_dist.partition.sharded:FsdpReplica",
        summary="each rank holds a part of every parameter, and takes its own data (PyTorch FSDP2)",
        gang=True,
        splits_data=True,
    ),
    "zero3": PartitionInfo(
        opens="avss_dist.partition.sharded:Zero3Replica",
        summary="each rank holds a part of every parameter, and takes its own data (DeepSpeed ZeRO-3)",
        gang=True,
        splits_data=True,
    ),
    "tensor_parallel": PartitionInfo(
        opens="avss_dist.partition.tensor_parallel:TensorParallelReplica",
        summary="each rank computes a part of every matrix product (transformers' plans, or DeepSpeed AutoTP)",
        gang=True,
        splits_matrices=True,
    ),
    "expert_parallel": PartitionInfo(
        opens="avss_dist.partition.tensor_parallel:ExpertParallelReplica",
        summary="each rank computes some of the routed experts of every layer, and a part of the other matrices",
        gang=True,
        splits_matrices=True,
    ),
}
"""Partitions by name, the simplest first."""
GANGS = tuple(name for name, info in PARTITIONS.items() if info.gang)
WHOLE = next(name for name, info in PARTITIONS.items() if info.whole)
"""The partition of a model that fits on one device."""
SEVERAL_GPUS = next(name for name, info in PARTITIONS.items() if info.several_gpus)
"""The partition of a model that fits on the GPUs of one host."""
LAYERWISE = next(name for name, info in PARTITIONS.items() if info.layerwise)
"""The partition of a model that fits nowhere else."""


@dataclass(frozen=True, kw_only=True)
class ShardingInfo:
    """A sharding of a training over ranks: each rank holds a part of what is divided, and all of what is not.

    Attributes:
        weights, gradients, moments: whether they are divided. Moments are those of the optimizer.
        zero_stage: stage of DeepSpeed ZeRO; 0 without DeepSpeed.
    """

    weights: bool = False
    gradients: bool = False
    moments: bool = False
    zero_stage: int = 0

    @property
    def is_fsdp(self) -> bool:
        """Whether PyTorch's FSDP divides it."""
        return self.weights and not self.zero_stage


SHARDINGS = {
    "ddp": ShardingInfo(),
    "zero1": ShardingInfo(moments=True, zero_stage=1),
    "zero2": ShardingInfo(moments=True, gradients=True, zero_stage=2),
    "zero3": ShardingInfo(moments=True, gradients=True, weights=True, zero_stage=3),
    "fsdp": ShardingInfo(moments=True, gradients=True, weights=True),
}
"""Shardings by name, the simplest first."""
