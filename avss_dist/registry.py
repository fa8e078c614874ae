"""The partitions: the class that opens each, and what each can do. A new one is a line here, and a file of its own."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PartitionInfo:
    """A way to spread one replica (a model copy) over devices.

    Attributes:
        opens: ``module:class``; the class takes (checkpoint, settings, placement). See `partition.base.Replica`.
        summary: what it does, in a few words.
        gang: it is several processes, each a rank with one GPU, or on a CPU.
        several_gpus: one process uses several GPUs.
        offloads: weights or hidden states may leave the devices: ``max_memory`` says how much stays, and
            ``offload_folder`` where the rest goes.
        splits_data: its ranks take different shards; otherwise all take the same, and rank 0 reports.
        changes_numbers: it adds up in another order than one device does, so the number of ranks is fingerprinted.
        backward: it has gradients too.
        changes_weights: a weight of an open replica can be changed, so that repairs are fitted and evaluated in place.
    """

    opens: str
    summary: str
    gang: bool = False
    several_gpus: bool = False
    offloads: bool = False
    splits_data: bool = False
    changes_numbers: bool = False
    backward: bool = True
    changes_weights: bool = False


PARTITIONS = {
    "single": PartitionInfo(
        opens="avss_dist.partition.single:SingleReplica",
        summary="the whole model on one device",
        changes_weights=True,
    ),
    "device_map": PartitionInfo(
        opens="avss_dist.partition.device_map:DeviceMapReplica",
        summary="layers over the GPUs of one process, the rest in host memory and on disk",
        several_gpus=True,
        offloads=True,
        changes_weights=True,
    ),
    "streaming": PartitionInfo(
        opens="avss_dist.partition.streaming.replica:StreamingReplica",
        summary="one layer in memory at a time, read from the files once for each shard",
        offloads=True,
        changes_weights=True,
    ),
    "zero3": PartitionInfo(
        opens="avss_dist.partition.zero3:Zero3Replica",
        summary="each rank holds a part of every parameter, and takes its own data (DeepSpeed ZeRO-3)",
        gang=True,
        splits_data=True,
    ),
    "tensor_parallel": PartitionInfo(
        opens="avss_dist.partition.tensor_parallel:TensorParallelReplica",
        summary="each rank computes a part of every matrix product (DeepSpeed AutoTP)",
        gang=True,
        changes_numbers=True,
        backward=False,
    ),
}
GANGS = tuple(name for name, info in PARTITIONS.items() if info.gang)
