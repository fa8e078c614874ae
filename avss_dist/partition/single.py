"""Partition ``single``: a whole model on one device, or several copies that share the text of a task.

`BatchwiseReplica` is the base of other partitions, too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

from avss_dist.core.registry import PARTITIONS
from avss_dist.core.settings import Settings
from avss_dist.corpus.shards import Batch
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.layers import Layer
from avss_dist.models.loading import Backbone, forward_function, load, quiet
from avss_dist.partition.group import DividedLanguageModel, require_group, reraise_lost_ranks
from avss_dist.partition.memory import PartitionMemory
from avss_dist.partition.replica import BatchContext, Placement, RowSplit, describe, run_batch
from avss_dist.system.devices import free_device, pick_device
from avss_dist.system.memory import keep_freed_memory

T = TypeVar("T")
ONE_DEVICE = Placement()
MAX_COPIES = 8  # the loss of one stops all


def with_copies(placement: Placement, copies: int) -> Placement:
    """Return a placement of whole copies, each a rank of one gang, or the same one if ranks hold a model together."""
    copies = min(copies, MAX_COPIES)
    if not PARTITIONS[placement.partition].whole or copies < 2:
        return placement
    return replace(placement, ranks=copies, gpus=placement.gpus * copies)


class BatchwiseReplica(ABC):
    """Replica that runs batches one after the other through the whole backbone. See `partition.replica.Replica`.

    Raises:
        ConfigError: there is no group of as many ranks, or the partition does not fit the checkpoint or the device.
        ModelError: the model cannot be opened or observed.
    """

    split = RowSplit()
    reports_stats = True
    memory: ClassVar[type[PartitionMemory]] = PartitionMemory
    language_model_type: type[LanguageModel] = LanguageModel
    no_gradients: tuple[str, str] | None = None

    def __init__(
        self, checkpoint: Checkpoint, settings: Settings, placement: Placement = ONE_DEVICE, *, head: bool = False
    ) -> None:
        self.device = pick_device(settings.device)
        keep_freed_memory()
        self.language_model: LanguageModel | None = None
        with quiet(), reraise_lost_ranks():
            self._backbone = self._open(checkpoint, settings, placement, head=head)
            if head:
                self.language_model = self.language_model_type(checkpoint, settings, self._backbone, self.device)
                self.language_model.no_gradients = self.no_gradients
        self._run = forward_function(self._backbone.module)
        self.layers: tuple[Layer, ...] = self._backbone.structure.layers
        self.model: Mapping[str, Any] = describe(self._backbone, placement.partition)

    @abstractmethod
    def _open(self, checkpoint: Checkpoint, settings: Settings, placement: Placement, *, head: bool) -> Backbone:
        """Open the model, or this rank's part of it."""

    def forward(self, batches: Sequence[Batch], context: BatchContext) -> None:
        """Run the backbone over every batch, each inside its context.

        All ranks must run equally many batches.
        """
        for batch in batches:
            with context(batch):
                run_batch(self._run, batch, self.device)

    def collect(self, counted: T) -> list[T]:
        """Return the counts of this process alone."""
        return [counted]

    def close(self) -> None:
        """Drop the weights, or this rank's part of them."""
        self.language_model = None
        del self._backbone, self._run, self.layers
        free_device(self.device)


class SingleReplica(BatchwiseReplica):
    """Whole model on one device. See `partition.replica.Replica`."""

    def _open(self, checkpoint: Checkpoint, settings: Settings, placement: Placement, *, head: bool) -> Backbone:
        if head and placement.copies > 1:
            require_group(placement)
            self.language_model_type = DividedLanguageModel
        return load(checkpoint, settings, self.device, head=head)
