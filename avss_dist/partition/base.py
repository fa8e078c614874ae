"""Interface of a replica, a model copy that is spread over devices in any way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import torch

from avss_dist.corpus.shards import Batch
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.layers import Layer
from avss_dist.partition.cost import PartitionCost
from avss_dist.registry import PARTITIONS

T = TypeVar("T")
BatchContext = Callable[[Batch], AbstractContextManager[None]]
"""``with context(batch):`` is around everything that runs for a batch, in its thread or greenlet."""


def no_observation(_batch: Batch) -> AbstractContextManager[None]:
    """Return a `BatchContext` that does nothing."""
    return nullcontext()


def dummy_batch() -> Batch:
    """Return a batch of 1 x 2 tokens in which nothing counts, for a rank whose partners have more batches."""
    real = np.ones((1, 2), np.bool_)
    return Batch(input_ids=np.zeros((1, 2), np.int32), attention_mask=real, observed=~real)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The decided placement of one replica over devices; its partition is never ``auto``.

    Attributes:
        partition: a name of ``registry.PARTITIONS``.
        ranks: processes of the replica; see `copies`.
        gpus: GPUs of the replica, over all its ranks; 0 on a CPU.
        max_memory: bytes that weights and waiting hidden states may take, by device: ``cpu``, ``0``, ``1``, ... With
            ``streaming``, those of a GPU include activations.
        offload_folder: where weights and hidden states go that have no room; None is a temporary folder.
        why: the reason for the choice, for people.
    """

    partition: str = "single"
    ranks: int = 1
    gpus: int = 0
    max_memory: Mapping[str, int] = field(default_factory=dict)
    offload_folder: str | None = None
    why: str = "it was requested"

    @property
    def copies(self) -> int:
        """Number of whole copies of the model that share a task; 1 where ranks hold one together."""
        return 1 if PARTITIONS[self.partition].gang else self.ranks


def numbers_of(placement: Placement) -> dict[str, int]:
    """Return the part of a placement that can change a number, for a fingerprint: ranks that sum in another order."""
    differs = PARTITIONS[placement.partition].changes_numbers or placement.copies > 1
    return {placement.partition: placement.ranks} if differs else {}


@dataclass(frozen=True)
class RowSplit:
    """The rows of a batch that a rank counts, where several ranks see the same ones."""

    rank: int = 0
    ranks: int = 1

    def rows(self, number: int) -> slice:
        """Return this rank's rows of ``number`` rows."""
        return slice(number * self.rank // self.ranks, number * (self.rank + 1) // self.ranks)


class Replica(Protocol):
    """One rank of a model copy; the whole copy where it has one rank.

    Attributes:
        layers: the transformer blocks, in order.
        model: what was opened, JSON-ready; goes into the run's row.
        device: where this rank computes; of several, the first.
        split: the rows of a batch that this rank counts.
        reports_stats: whether this rank has the result; the others count for it.
        language_model: what predicts; there where the replica was opened with its head.
        cost: memory and time of a run with this partition, for estimates.
    """

    layers: tuple[Layer, ...]
    model: Mapping[str, Any]
    device: torch.device
    split: RowSplit
    reports_stats: bool
    language_model: LanguageModel | None
    cost: ClassVar[type[PartitionCost]]

    def forward(self, batches: Sequence[Batch], context: BatchContext) -> None:
        """Run the backbone over every batch. Nothing is returned: hooks see it.

        Args:
            batches: rows; each is one forward pass of every layer.
            context: is around all that runs for a batch.
        """

    def collect(self, counted: T) -> list[T]:
        """Return the counts of all ranks that split the rows, in their order; [] on a rank that does not report."""

    def close(self) -> None:
        """Free the devices."""
