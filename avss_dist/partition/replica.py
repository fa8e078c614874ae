"""Replicas: model copies on one or more devices, their placement, their memory, and their opening by the registry."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from importlib import import_module
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
import torch

from avss_dist.core.devices import Devices, pick_device, to_device
from avss_dist.core.errors import ConfigError, explain_unwritable
from avss_dist.core.memory import free_cached_memory, keep_freed_memory
from avss_dist.core.settings import Settings
from avss_dist.core.text import describe_bytes
from avss_dist.corpus.shards import Batch
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.checkpoint.loading import Backbone, Forward, forward_function, load, quiet
from avss_dist.models.checkpoint.locate import Checkpoint
from avss_dist.models.checkpoint.quantization import describe_computing
from avss_dist.models.checkpoint.size import Footprint, sharing_skeletons
from avss_dist.models.structure.layers import Layer
from avss_dist.partition.catalog import PARTITIONS
from avss_dist.partition.group import RankedLanguageModel, RowSplit, require_group, reraise_lost_ranks

T = TypeVar("T")
PROCESS_BYTES = 1 << 30  # interpreter, libraries and counters of a process, beside weights and activations
MAX_COPIES = 8  # the loss of one stops all
BatchContext = Callable[[Batch], AbstractContextManager[object]]
"""Context manager around everything that runs for a batch, in its thread or greenlet: ``with context(batch):``."""
no_observation: BatchContext = nullcontext


def dummy_batch() -> Batch:
    """Return a batch of 1 x 2 tokens in which nothing counts, for a rank whose partners have more batches."""
    real = np.ones((1, 2), np.bool_)
    return Batch(input_ids=np.zeros((1, 2), np.int32), attention_mask=real, observed=~real)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Placement of one replica on devices. Its partition is never ``auto``.

    Attributes:
        partition: a name of ``partition.catalog.PARTITIONS``.
        ranks: processes of the replica; see `copies`.
        gpus: GPUs of the replica, over all its ranks; 0 on a CPU.
        max_memory: bytes that weights and waiting hidden states may take, by device: ``cpu``, ``0``, ``1``, ... With
            ``streaming``, those of a GPU include activations.
        why: the reason for the choice, for people.
    """

    partition: str = "single"
    ranks: int = 1
    gpus: int = 0
    max_memory: Mapping[str, int] = field(default_factory=dict)
    why: str = "it was requested"

    @property
    def copies(self) -> int:
        """Number of whole copies of the model that share a task, or 1 where ranks hold one together."""
        return 1 if PARTITIONS[self.partition].gang else self.ranks


def fingerprint_part(placement: Placement) -> dict[str, int]:
    """Return the part of a placement that can change a number, for a fingerprint: ranks that sum in another order."""
    differs = PARTITIONS[placement.partition].splits_matrices or placement.copies > 1
    return {placement.partition: placement.ranks} if differs else {}


def with_copies(placement: Placement, copies: int) -> Placement:
    """Return a placement of whole copies, each a rank of one gang, or the same one if ranks hold a model together."""
    copies = min(copies, MAX_COPIES)
    if not PARTITIONS[placement.partition].whole or copies < 2:
        return placement
    return replace(placement, ranks=copies, gpus=placement.gpus * copies)


def batch_bytes(size: Footprint, settings: Settings, *, head: bool = False) -> int:
    """Return the bytes of the activations of one batch."""
    return size.activation_bytes(settings.batch_size, settings.sequence_length, head=head)


def bytes_beside_weights(size: Footprint | None, settings: Settings, kind: str, *, head: bool = False) -> int:
    """Return the bytes of host memory of a process without weights. On a CPU, with the activations of one batch."""
    return PROCESS_BYTES + (batch_bytes(size, settings, head=head) if size and kind == "cpu" else 0)


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
        held, process = weights + batch_bytes(self.size, self.settings), PROCESS_BYTES + host_weights
        if self.on_gpu:
            gpus = gpus or self.ranks
            host = min(self.ranks, max(1, self.devices.count_of_largest_node)) * process
        else:
            gpus, held = 0, process + held
            host = self.ranks * held
        return PartitionEstimate(
            partition=self.partition, ranks=self.ranks, gpus=gpus, device_bytes=held, host_bytes=host, why=why
        )


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


class Replica:
    """One rank of a model copy, or the whole copy if it has one rank. Its class tells how much memory it will take.

    This class is that of the partition ``single``: the whole model on one device, or several copies that share the text
    of a task. Other partitions have subclasses.

    Attributes:
        layers: transformer blocks, in order.
        model: columns of the run's row that describe the opened model, JSON-ready.
        device: device of this rank's token ids; the first one of several.
        split: rows of a batch that this rank counts.
        language_model: model with its head; None unless the replica was opened with the head.
        language_model_type: class of ``language_model``.
        no_gradients: see `causal_lm.LanguageModel`.

    Raises:
        ConfigError: there is no group of as many ranks, or the partition does not fit the checkpoint or the device.
        ModelError: the model cannot be opened or observed.
    """

    split = RowSplit()
    language_model_type: type[LanguageModel] = LanguageModel
    no_gradients: tuple[str, str] | None = None

    def __init__(
        self, checkpoint: Checkpoint, settings: Settings, placement: Placement = Placement(), *, head: bool = False
    ) -> None:
        self.device = pick_device(settings.device)
        keep_freed_memory()
        self.language_model: LanguageModel | None = None
        info, ranks = PARTITIONS[placement.partition], placement.ranks
        with quiet(), reraise_lost_ranks(), sharing_skeletons():
            if info.gang or (head and placement.copies > 1):
                group = require_group(placement.partition, ranks)
                self.split = group if info.splits_matrices else self.split
            self.require_ranks(placement.partition, checkpoint, settings, ranks)
            self._backbone = self._open(checkpoint, settings, placement, head=head)
            if head:
                self.language_model = self.language_model_type(checkpoint, settings, self._backbone, self.device)
                self.language_model.no_gradients = self.no_gradients
                self.language_model.whole_weights = not info.splits_matrices
        self._run = forward_function(self._backbone.module)
        self.layers: tuple[Layer, ...] = self._backbone.layers
        self.model: Mapping[str, Any] = {
            **self._backbone.columns,
            "quantized_modules": describe_computing(self._backbone.model),
            "partition": placement.partition,
            "threads": torch.get_num_threads(),
        }

    @property
    def reports_stats(self) -> bool:
        """Whether this rank returns the statistics, which the other ranks send to it."""
        return self.split.rank == 0

    @staticmethod
    def minimum_host_weights(size: Footprint, kind: str, *, head: bool) -> int:
        """Return the bytes of weights that must be in host memory at once, on a device of this kind."""
        return size.weight_bytes if kind == "cpu" else 0

    @staticmethod
    def minimum_rank_weights(size: Footprint, ranks: int) -> int:
        """Return the bytes of weights that each rank must hold at once, where ranks gather them, or 0 otherwise."""
        return 0

    @staticmethod
    def require_ranks(partition: str, checkpoint: Checkpoint, settings: Settings, ranks: int) -> None:
        """Refuse a model that so many ranks cannot hold together, by its configuration and headers.

        Raises:
            ConfigError: they cannot.
        """

    @classmethod
    def obstacle(cls, query: MemoryQuery) -> str | None:
        """Return why the partition does not run the model with these settings, or None if it does."""
        try:
            cls.require_ranks(query.partition, query.checkpoint, query.settings, query.ranks)
        except ConfigError as error:
            return error.message.removesuffix(".").replace("`", "")
        return None

    @classmethod
    def usage(cls, query: MemoryQuery) -> PartitionEstimate:
        """Return the memory of a replica."""
        weights = query.size.weight_bytes
        return query.usage(weights, f"{describe_bytes(weights)} of weights stay in memory")

    def _open(self, checkpoint: Checkpoint, settings: Settings, placement: Placement, *, head: bool) -> Backbone:
        """Open the model, or this rank's part of it."""
        if head and placement.copies > 1:
            self.language_model_type = RankedLanguageModel
        return load(checkpoint, settings, self.device, head=head)

    def forward(self, batches: Sequence[Batch], context: BatchContext) -> None:
        """Run the backbone over every batch, for hooks that observe it. All ranks must run equally many batches.

        Args:
            batches: batches of rows, each of which is one forward pass.
            context: context around everything that runs for a batch.
        """
        for batch in batches:
            with context(batch):
                run_batch(self._run, batch, self.device)

    def collect(self, counted: T) -> list[T]:
        """Return the counts of the ranks that split the rows of a shard, in order, or [] on one that does not report.

        Where ranks measure different shards, the counts of this rank alone.
        """
        return [counted]

    def close(self) -> None:
        """Drop the weights, or this rank's part of them."""
        self.language_model = None
        del self._backbone, self._run, self.layers
        free_cached_memory()


def replica_class(partition: str) -> Any:
    """Return the class of a partition's replicas. See `partition.replica.Replica`."""
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
    torch.set_num_threads(settings.threads)
    return replica_class(placement.partition)(checkpoint, settings, placement, head=head)


def run_batch(run: Forward, batch: Batch, device: torch.device) -> None:
    """Run a backbone over a batch, with an attention mask only if rows are padded."""
    input_ids = to_device(batch.input_ids, device, torch.int64)
    mask = None if batch.attention_mask.all() else to_device(batch.attention_mask, device, torch.int64)
    with torch.no_grad():
        run(input_ids, mask)
