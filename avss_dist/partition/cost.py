"""Memory and time of a run with a partition, from headers and a benchmark of a few layers.

`PartitionCost` describes a whole model on one device. Other partitions have a subclass beside their replica.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from avss_dist.core.errors import ConfigError
from avss_dist.core.hardware import Hardware
from avss_dist.core.registry import PARTITIONS, WHOLE
from avss_dist.core.settings import Settings
from avss_dist.core.text import describe_bytes
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.size import Footprint, footprint
from avss_dist.system.devices import Devices, available_memory, devices_here

DEEPSPEED_BYTES = 150 << 20  # that loading DeepSpeed adds to a process
LINK_SHARE = 0.25  # rate of exchange between ranks on one host, relative to a copy in memory


@dataclass(frozen=True)
class Machine:
    """Devices and memory that may be used.

    Attributes:
        device: ``cpu`` or ``cuda``.
        gpus: number of GPUs of all nodes.
        device_free: free or allowed bytes, if fewer, of the fullest GPU, or of the host without GPUs.
        host_free: free or allowed bytes, if fewer, of the host of each node.
        nodes: number of nodes, with equally many GPUs each.
    """

    device: str
    gpus: int
    device_free: int
    host_free: int
    nodes: int = 1

    @property
    def gpus_per_node(self) -> int:
        """Number of GPUs of each node."""
        return self.gpus // self.nodes

    @classmethod
    def look(cls, device: str, max_memory: Mapping[str, int]) -> Machine:
        """Return this machine, within memory limits by device name."""
        devices, free = devices_here(device), available_memory()
        host = min(free, max_memory.get("cpu", free))
        if device == "cpu":
            return cls(device, 0, host, host)
        gpus = {str(gpu): torch.cuda.mem_get_info(gpu)[0] for gpu in range(devices.count)}
        return cls(device, devices.count, min(min(free, max_memory.get(gpu, free)) for gpu, free in gpus.items()), host)

    @classmethod
    def of_hardware(cls, hardware: Hardware, max_memory: Mapping[str, int]) -> Machine:
        """Return nodes that are not at hand, with all their memory free, within memory limits by device name."""
        gpu = hardware.gpu
        limits = [limit for name, limit in max_memory.items() if name != "cpu"]
        return cls(
            "cuda",
            hardware.nodes * hardware.gpus_per_node,
            min([gpu.memory, *limits]),
            min(gpu.host_memory, max_memory.get("cpu", gpu.host_memory)),
            hardware.nodes,
        )

    def devices(self) -> Devices:
        """Return the devices among which `partition.choose.choose` chooses, as a run on this machine sees them."""
        if self.nodes == 1 and not self.gpus:
            return devices_here(self.device)
        return Devices(
            kind=self.device,
            count=self.gpus,
            count_of_largest_node=self.gpus_per_node,
            device_bytes=self.device_free,
            host_bytes=self.host_free,
            cpus=self.gpus,
            cpus_of_largest_node=self.gpus_per_node,
        )


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds of a shard: for each layer, and for everything outside of the layers."""

    layer: float
    other: float

    def seconds(self, layers: int) -> float:
        """Return the seconds for a shard through a model of this many layers."""
        return self.other + self.layer * layers


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Throughput and memory of a machine with a model and its corpus: measured here, or computed for other hardware.

    Attributes:
        num_sequences, num_tokens, num_shards, num_batches: size of the tokenized corpus; a batch is a forward pass.
        rows_per_shard: rows of every shard but the last.
        num_strata: maximum number of strata of a shard.
        share: rows of the corpus, in multiples of the timed shard.
        costs: costs by partition.
        library_bytes: resident memory of a process with its libraries.
        planned_bytes: resident memory of a process after planning.
        plan_peak_bytes: peak memory of planning.
        working_bytes: memory that opening a model and measuring a shard add to a process after planning, beside
            weights and counters: activations and lazily loaded libraries.
        device_working_bytes: GPU memory that they add; 0 on a CPU.
        copy_bytes_per_second: rate of a copy in memory, or to a GPU.
        link_bytes_per_second: rate at which a GPU receives from others of its node.
        network_bytes_per_second: rate at which a GPU receives from other nodes; 0 if there are none.
        unpacked_bytes_per_second: rate at which quantized weights are unpacked, in bytes of the compute dtype; 0 if
            there are none.
        touched_bytes: bytes of a mapped table of token embeddings that the corpus's tokens read.
        sublayer_share: share of a shard's time in attention and MLP, which tensor parallel ranks divide among them.
        sum_seconds: time in which two ranks on one host sum the hidden states of a batch; 0 on a GPU, where exchanges
            are modelled.
        gather_bytes_per_second: rate at which two ranks gather a parameter; 0 on a GPU.
    """

    num_sequences: int
    num_tokens: int
    num_shards: int
    num_batches: int
    rows_per_shard: int
    num_strata: int
    share: float
    costs: Mapping[str, Cost]
    library_bytes: int
    planned_bytes: int
    plan_peak_bytes: int
    working_bytes: int
    device_working_bytes: int
    copy_bytes_per_second: float
    touched_bytes: int
    sublayer_share: float
    sum_seconds: float
    gather_bytes_per_second: float
    link_bytes_per_second: float
    network_bytes_per_second: float
    unpacked_bytes_per_second: float

    def batches_per_shard(self, batch_size: int) -> int:
        """Return the number of forward passes over a shard."""
        return -(-self.rows_per_shard // batch_size)


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Memory and time that a run takes with a partition.

    Attributes:
        device_bytes: peak memory of each GPU or, on a CPU, of each process.
        host_bytes: peak memory of the host, all its ranks together.
        exchanged_bytes: bytes that a rank receives for a layer while a shard is measured, from other ranks, other
            devices, host memory or files; the mean over layers.
        seconds: time to measure all shards, without start-up, opening the model and writing tables.
        why: largest parts of the numbers, for people.
    """

    device_bytes: int
    host_bytes: int
    seconds: float
    why: str
    exchanged_bytes: int = 0


def refusal(check: Callable[..., object], *args: Any) -> str | None:
    """Return the reason for which a check of a replica raises ConfigError, for people; None if it passes."""
    try:
        check(*args)
    except ConfigError as error:
        return error.message.removesuffix(".").replace("`", "")
    return None


class PartitionCost:
    """Memory and time of a run with one partition. This class is that of a whole model in the memory of each process.

    Args:
        partition: name of the partition.
        weights: checkpoint with the headers of the weights, or its hub id.
        size: size of the model. A partition that unpacks weights that would stay quantized has another one.
        settings: pinned settings, without ``auto``.
        requested_ranks: processes of one replica, for gangs; by default one for each GPU of a node, or 2.
        max_memory: limits in bytes, by device name.
        machine: devices and memory that may be used.
    """

    unpacks: ClassVar[bool] = False
    """Whether the partition computes with unpacked weights alone."""
    timed_limits: ClassVar[Mapping[str, int]] = {}
    """Memory limits while a few layers are timed."""

    def __init__(
        self,
        partition: str,
        weights: Checkpoint | str,
        size: Footprint,
        settings: Settings,
        requested_ranks: int | None,
        max_memory: Mapping[str, int],
        machine: Machine,
    ) -> None:
        self.partition, self.weights, self.stored, self.size = partition, weights, size, size
        if self.unpacks and size.quantized:
            settings = replace(settings, dequantize=True)
            self.size = footprint(weights, settings)
        self.settings = settings
        self.requested_ranks, self.max_memory, self.machine = requested_ranks, max_memory, machine

    @staticmethod
    def minimum_host_weights(size: Footprint, kind: str, *, head: bool) -> int:
        """Return the bytes of weights that must be in host memory at once, on a device of this kind."""
        return size.weight_bytes if kind == "cpu" else 0

    @staticmethod
    def minimum_rank_weights(size: Footprint, ranks: int) -> int:
        """Return the bytes of weights that each rank must hold at once, where ranks gather them; otherwise 0."""
        return 0

    @staticmethod
    def require_ranks(weights: Checkpoint | str, settings: Settings, ranks: int) -> None:
        """Refuse a model that so many ranks cannot divide, by its configuration.

        Raises:
            ConfigError: they cannot.
        """

    @property
    def obstacle(self) -> str | None:
        """Reason for which the partition does not run the model with these settings; None if it does."""
        return None

    @property
    def ranks(self) -> int:
        """Number of processes of one replica."""
        if not PARTITIONS[self.partition].gang:
            return 1
        return self.requested_ranks or max(2, self.machine.gpus_per_node)

    @property
    def gpus(self) -> int:
        """Number of GPUs of one replica."""
        return self.ranks if self.on_gpu else 0

    @property
    def ranks_on_host(self) -> int:
        """Maximum number of processes of one replica on one host."""
        return self.ranks if self.machine.nodes == 1 else min(self.ranks, self.machine.gpus_per_node)

    @property
    def on_gpu(self) -> bool:
        """Whether the devices are GPUs."""
        return self.machine.device == "cuda"

    def is_timed(self) -> bool:
        """Return whether `usage` needs the partition's own seconds in ``Calibration.costs``; a gang has none."""
        return not PARTITIONS[self.partition].gang

    def usage(self, measured: Calibration, counters: int) -> Usage:
        """Return the memory and time of a run.

        Args:
            counters: bytes of one process's statistics.
        """
        device, host = self.memory(measured, counters, self.resident(measured, self.size.weight_bytes))
        return Usage(
            device_bytes=device,
            host_bytes=host,
            seconds=self.seconds(measured, measured.costs.get(self.partition, measured.costs[WHOLE])),
            why=f"{describe_bytes(self.size.weight_bytes)} of weights stay in memory",
        )

    def seconds(self, measured: Calibration, cost: Cost, layers: int | None = None) -> float:
        """Return the seconds of all shards through all layers of the model, or through this many."""
        return measured.share * cost.seconds(self.size.num_layers if layers is None else layers)

    def link(self, measured: Calibration) -> float:
        """Return the bytes per second that a GPU receives from the others of its gang.

        NCCL sends the parts of a tensor in several rings, so that the GPUs of a node share its network cards.
        """
        inside, node = measured.link_bytes_per_second, self.machine.gpus_per_node
        if self.machine.nodes == 1 or self.ranks <= node:
            return inside
        return min(inside, node * measured.network_bytes_per_second)

    def memory(
        self, measured: Calibration, counters: int, weights: int, *, host_weights: int = 0, more: int = 0
    ) -> tuple[int, int]:
        """Return the bytes (of each device, of the host).

        Args:
            weights: bytes of weights on each device.
            host_weights: further bytes of weights in the host memory of each process.
            more: other bytes on each device.
        """
        ranks = self.ranks
        start = measured.planned_bytes if ranks == 1 else measured.library_bytes + DEEPSPEED_BYTES
        process = start + measured.working_bytes + host_weights
        if self.on_gpu:
            device = weights + more + counters + measured.device_working_bytes
            return device, self.ranks_on_host * max(process, measured.plan_peak_bytes)
        process = max(process + weights + more + counters, measured.plan_peak_bytes if ranks == 1 else 0)
        return process, ranks * process

    def resident(self, measured: Calibration, weights: int, *, table: bool = True) -> int:
        """Return the bytes of weights that come into memory; a memory-mapped file counts only the pages that are read.

        Args:
            weights: bytes of the weights in the file.
            table: whether the token embeddings are among them.
        """
        if self.on_gpu or not self.size.zero_copy or not table:
            return weights
        unread = max(0, self.size.embedding_bytes - measured.touched_bytes)
        return min(weights, sum(self.size.layer_bytes) + self.size.other_bytes) - unread
