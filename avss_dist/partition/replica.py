"""Replicas: model copies on one or more devices, their placement, and their opening by the registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, ClassVar, Protocol, TypeVar, cast

import numpy as np
import torch

from avss_dist.core.registry import PARTITIONS
from avss_dist.core.settings import Settings
from avss_dist.corpus.shards import Batch
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.layers import Layer
from avss_dist.models.loading import Backbone, Forward
from avss_dist.models.quantization import describe_computing
from avss_dist.partition.memory import PartitionMemory
from avss_dist.system.devices import to_device, use_threads

T = TypeVar("T")
BatchContext = Callable[[Batch], AbstractContextManager[None]]
"""Context manager around everything that runs for a batch, in its thread or greenlet: ``with context(batch):``."""


def no_observation(_batch: Batch) -> AbstractContextManager[None]:
    """Return a `BatchContext` that does nothing."""
    return nullcontext()


def dummy_batch() -> Batch:
    """Return a batch of 1 x 2 tokens in which nothing counts, for a rank whose partners have more batches."""
    real = np.ones((1, 2), np.bool_)
    return Batch(input_ids=np.zeros((1, 2), np.int32), attention_mask=real, observed=~real)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Placement of one replica on devices. Its partition is never ``auto``.

    Attributes:
        partition: a name of ``registry.PARTITIONS``.
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
    differs = PARTITIONS[placement.partition].changes_numbers or placement.copies > 1
    return {placement.partition: placement.ranks} if differs else {}


@dataclass(frozen=True)
class RowSplit:
    """Share of a batch's rows that a rank counts, if several ranks see the same batch."""

    rank: int = 0
    ranks: int = 1

    def rows(self, number: int) -> slice:
        """Return the slice of this rank's rows of ``number`` rows."""
        return slice(number * self.rank // self.ranks, number * (self.rank + 1) // self.ranks)


class Replica(Protocol):
    """One rank of a model copy, or the whole copy if it has one rank.

    Attributes:
        layers: transformer blocks, in order.
        model: columns of the run's row that describe the opened model, JSON-ready.
        device: device of this rank's token ids; the first one of several.
        split: rows of a batch that this rank counts.
        reports_stats: whether this rank returns the statistics, which the other ranks send to it.
        language_model: model with its head; None unless the replica was opened with the head.
        memory: memory of a replica with this partition, for its choice and for estimates.
    """

    layers: tuple[Layer, ...]
    model: Mapping[str, Any]
    device: torch.device
    split: RowSplit
    reports_stats: bool
    language_model: LanguageModel | None
    memory: ClassVar[type[PartitionMemory]]

    def forward(self, batches: Sequence[Batch], context: BatchContext) -> None:
        """Run the backbone over every batch, for hooks that observe it.

        Args:
            batches: batches of rows, each of which is one forward pass.
            context: context around everything that runs for a batch.
        """

    def collect(self, counted: T) -> list[T]:
        """Return the counts of the ranks that split the rows of a shard, in order, or [] on one that does not report.

        Where ranks measure different shards, the counts of this rank alone.
        """

    def close(self) -> None:
        """Free the devices."""


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
    use_threads(settings.threads)
    return cast(Replica, replica_class(placement.partition)(checkpoint, settings, placement, head=head))


def run_batch(run: Forward, batch: Batch, device: torch.device) -> None:
    """Run a backbone over a batch, with an attention mask only if rows are padded."""
    input_ids = to_device(batch.input_ids, device, torch.int64)
    mask = None if batch.attention_mask.all() else to_device(batch.attention_mask, device, torch.int64)
    with torch.no_grad():
        run(input_ids, mask)


def describe(backbone: Backbone, partition: str) -> dict[str, Any]:
    """Return the columns of the run's row that describe an opened model."""
    return {
        "family": backbone.family,
        "architecture": backbone.architecture,
        "hidden_size": backbone.hidden_size,
        "num_parameters": backbone.num_parameters,
        "dtype": backbone.dtype,
        "quantized_modules": describe_computing(backbone.model),
        "attention_implementation": backbone.attention_implementation,
        "partition": partition,
        "threads": torch.get_num_threads(),
        "notes": list(backbone.structure.notes),
    }
