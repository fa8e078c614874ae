"""Memory that a replica will take, estimated before any weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from avss_dist.core.devices import Devices
from avss_dist.core.settings import Settings
from avss_dist.models.checkpoint.locate import Checkpoint
from avss_dist.models.checkpoint.size import Footprint

PROCESS_BYTES = 1 << 30  # interpreter, libraries and counters of a process, beside weights and activations


def batch_bytes(size: Footprint, settings: Settings, *, head: bool = False) -> int:
    """Return the bytes of the activations of one batch."""
    return size.activation_bytes(settings.batch_size, settings.sequence_length, head=head)


def bytes_beside_weights(size: Footprint | None, settings: Settings, kind: str, *, head: bool = False) -> int:
    """Return the bytes of host memory of a process without weights. On a CPU, with the activations of one batch."""
    if size is None or kind != "cpu":
        return PROCESS_BYTES
    return PROCESS_BYTES + batch_bytes(size, settings, head=head)


@dataclass(frozen=True, kw_only=True)
class PartitionEstimate:
    """Estimated memory of a replica with one partition.

    Attributes:
        partition: one of ``partition.catalog.PARTITIONS``.
        ranks: processes of the replica; by default as few as GPUs have room for, and 2 on a CPU.
        gpus: GPUs of the replica; 0 on a CPU.
        device_bytes: bytes of each GPU or, on a CPU, of each process.
        host_bytes: bytes of the host, all its ranks together.
        fits: whether this memory is here, and nothing else is in the way. `estimation.estimate` finds out.
        why: components of the numbers, or the missing memory.
    """

    partition: str
    ranks: int
    gpus: int
    device_bytes: int
    host_bytes: int
    fits: bool = True
    why: str


@dataclass(frozen=True, kw_only=True)
class MemoryQuery:
    """Question about the memory of a replica. See `Replica.usage`.

    Attributes:
        partition: name of the partition.
        checkpoint: checkpoint, whose weights may be on the hub.
        size: size of the model, with weights that stay quantized if the settings leave them so.
        settings: pinned settings, without ``auto``, and with the rows of a shard.
        ranks: processes of one replica.
        max_memory: limits in bytes, by device name.
        devices: devices that may be used.
    """

    partition: str
    checkpoint: Checkpoint
    size: Footprint
    settings: Settings
    ranks: int
    max_memory: Mapping[str, int]
    devices: Devices

    @property
    def on_gpu(self) -> bool:
        """Whether the devices are GPUs."""
        return self.devices.kind == "cuda"

    def usage(self, weights: int, why: str, *, host_weights: int = 0, gpus: int | None = None) -> PartitionEstimate:
        """Return the memory of processes with the activations of one batch each.

        Args:
            weights: bytes of weights on the device of each process.
            why: see `PartitionEstimate`.
            host_weights: further bytes of weights in the host memory of each process.
            gpus: number of GPUs, by default one for each rank.
        """
        on_device = weights + batch_bytes(self.size, self.settings)
        in_process = PROCESS_BYTES + host_weights
        if not self.on_gpu:
            both = in_process + on_device
            return self._estimate(gpus=0, device_bytes=both, host_bytes=self.ranks * both, why=why)
        # The processes of one node share the memory of its host.
        ranks_of_node = min(self.ranks, max(1, self.devices.count_of_largest_node))
        return self._estimate(
            gpus=gpus or self.ranks,
            device_bytes=on_device,
            host_bytes=ranks_of_node * in_process,
            why=why,
        )

    def _estimate(self, *, gpus: int, device_bytes: int, host_bytes: int, why: str) -> PartitionEstimate:
        return PartitionEstimate(
            partition=self.partition,
            ranks=self.ranks,
            gpus=gpus,
            device_bytes=device_bytes,
            host_bytes=host_bytes,
            why=why,
        )
