"""Memory of a replica with a partition, from the headers of a checkpoint, and its folder on disk.

`PartitionMemory` describes a whole model on one device. Other partitions have a subclass beside their replica.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory
from typing import ClassVar

from avss_dist.core.errors import ConfigError, explain_unwritable
from avss_dist.core.settings import Settings
from avss_dist.core.text import describe_bytes
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.size import Footprint, footprint
from avss_dist.system.devices import Devices

PROCESS_BYTES = 1 << 30  # interpreter, libraries and counters of a process, beside weights and activations


def batch_bytes(size: Footprint, settings: Settings, *, head: bool = False) -> int:
    """Return the bytes of the activations of one batch."""
    shape = settings.batch_size, settings.sequence_length
    return size.activation_bytes(*shape) + (size.logit_bytes(*shape) if head else 0)


def bytes_beside_weights(size: Footprint | None, settings: Settings, kind: str, *, head: bool = False) -> int:
    """Return the bytes of host memory of a process without weights. On a CPU, with the activations of one batch."""
    return PROCESS_BYTES + (batch_bytes(size, settings, head=head) if size and kind == "cpu" else 0)


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Memory that a replica takes with a partition.

    Attributes:
        device_bytes: bytes of each GPU or, on a CPU, of each process.
        host_bytes: bytes of a host, all its ranks together.
        why: largest parts of the numbers, for people.
    """

    device_bytes: int
    host_bytes: int
    why: str


class PartitionMemory:
    """Memory of a replica with one partition. This class is that of a whole model in the memory of each process.

    Args:
        partition: name of the partition.
        weights: checkpoint with the headers of the weights, or its hub id.
        size: size of the model. A partition that unpacks weights that would stay quantized has another one.
        settings: pinned settings, without ``auto``, and with the rows of a shard.
        ranks: processes of one replica.
        max_memory: limits in bytes, by device name.
        devices: devices that may be used.
    """

    unpacks: ClassVar[bool] = False
    """Whether the partition computes with unpacked weights alone."""

    def __init__(
        self,
        partition: str,
        weights: Checkpoint | str,
        size: Footprint,
        settings: Settings,
        ranks: int,
        max_memory: Mapping[str, int],
        devices: Devices,
    ) -> None:
        self.partition, self.weights, self.stored, self.size = partition, weights, size, size
        if self.unpacks and size.quantized:
            settings = replace(settings, dequantize=True)
            self.size = footprint(weights, settings)
        self.settings, self.ranks, self.max_memory, self.devices = settings, ranks, max_memory, devices
        self.on_gpu = devices.kind == "cuda"

    @staticmethod
    def minimum_host_weights(size: Footprint, kind: str, *, head: bool) -> int:
        """Return the bytes of weights that must be in host memory at once, on a device of this kind."""
        return size.weight_bytes if kind == "cpu" else 0

    @staticmethod
    def minimum_rank_weights(size: Footprint, ranks: int) -> int:
        """Return the bytes of weights that each rank must hold at once, where ranks gather them, or 0 otherwise."""
        return 0

    @staticmethod
    def require_ranks(partition: str, weights: Checkpoint | str, settings: Settings, ranks: int) -> None:
        """Refuse a model that so many ranks cannot hold together, by its configuration and headers.

        Raises:
            ConfigError: they cannot.
        """

    @property
    def obstacle(self) -> str | None:
        """Reason for which the partition does not run the model with these settings, or None if it does."""
        try:
            self.require_ranks(self.partition, self.weights, self.settings, self.ranks)
        except ConfigError as error:
            return error.message.removesuffix(".").replace("`", "")
        return None

    @property
    def gpus(self) -> int:
        """Number of GPUs of one replica."""
        return self.ranks if self.on_gpu else 0

    def usage(self) -> Usage:
        """Return the memory of a replica."""
        weights = self.size.weight_bytes
        return self.process_usage(weights, f"{describe_bytes(weights)} of weights stay in memory")

    def process_usage(self, weights: int, why: str, *, host_weights: int = 0) -> Usage:
        """Return the memory of processes with the activations of one batch each.

        Args:
            weights: bytes of weights on the device of each process.
            why: see `Usage`.
            host_weights: further bytes of weights in the host memory of each process.
        """
        held = weights + batch_bytes(self.size, self.settings)
        process = PROCESS_BYTES + host_weights
        if self.on_gpu:
            on_host = min(self.ranks, max(1, self.devices.count_of_largest_node))
            return Usage(device_bytes=held, host_bytes=on_host * process, why=why)
        return Usage(device_bytes=process + held, host_bytes=self.ranks * (process + held), why=why)


def offload_folder(needed: int) -> TemporaryDirectory[str]:
    """Make a temporary folder of a replica, for weights and hidden states that do not fit in memory.

    Args:
        needed: number of bytes that will be written.

    Raises:
        ConfigError: the folder cannot be written, or has too little free space.
    """
    parent, hint = tempfile.gettempdir(), "Set the variable TMPDIR to another."
    with explain_unwritable(f"The temporary folder '{parent}'", hint, ConfigError):
        folder = TemporaryDirectory(prefix="avss-offload-", ignore_cleanup_errors=True)
    free = shutil.disk_usage(folder.name).free
    if free < needed:
        folder.cleanup()
        raise ConfigError(
            f"The temporary folder '{parent}' needs {describe_bytes(needed)} and has {describe_bytes(free)} free: "
            f"{describe_bytes(needed - free)} of weights have no place.",
            "Set the variable TMPDIR to a larger one, or allow more `max_memory`.",
        )
    return folder
