"""Replicas: model copies on one or more devices, and their opening by the catalog of partitions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import TypeVar

import numpy as np
import torch

from avss_dist.core.devices import pick_device, to_device
from avss_dist.core.errors import ConfigError
from avss_dist.core.memory import free_cached_memory, keep_freed_memory
from avss_dist.core.settings import Settings
from avss_dist.core.text import describe_bytes
from avss_dist.core.values import TableRow
from avss_dist.corpus.shards import Batch
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.checkpoint.loading import Backbone, Forward, forward_function, load, open_module, quiet
from avss_dist.models.checkpoint.locate import Checkpoint
from avss_dist.models.checkpoint.quantization import describe_computing
from avss_dist.models.checkpoint.reloading import ReloadableModel
from avss_dist.models.checkpoint.size import Footprint, sharing_skeletons
from avss_dist.models.structure.layers import Layer
from avss_dist.partition.catalog import PARTITIONS
from avss_dist.partition.estimate import MemoryQuery, PartitionEstimate
from avss_dist.partition.group import RankedLanguageModel, RowSplit, require_group, reraise_lost_ranks
from avss_dist.partition.placement import SINGLE, Placement

T = TypeVar("T")
BatchContext = Callable[[Batch], AbstractContextManager[object]]
"""Context manager around everything that runs for a batch, in its thread or greenlet: ``with context(batch):``."""
no_observation: BatchContext = nullcontext


def dummy_batch() -> Batch:
    """Return a batch of 1 x 2 tokens in which nothing counts, for a rank whose partners have more batches."""
    real = np.ones((1, 2), np.bool_)
    return Batch(input_ids=np.zeros((1, 2), np.int32), attention_mask=real, observed=~real)


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

    Args:
        reloadable: model of a closed replica, whose module is used again if it can take the weights. It is dropped
            otherwise.

    Raises:
        ConfigError: there is no group of as many ranks, or the partition does not fit the checkpoint or the device.
        ModelError: the model cannot be opened or observed.
    """

    split = RowSplit()
    language_model_type: type[LanguageModel] = LanguageModel
    no_gradients: tuple[str, str] | None = None

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: Settings,
        placement: Placement = SINGLE,
        *,
        head: bool = False,
        reloadable: ReloadableModel | None = None,
    ) -> None:
        self.device = pick_device(settings.device)
        keep_freed_memory()
        self._reloadable = reloadable
        self.language_model: LanguageModel | None = None
        info = PARTITIONS[placement.partition]
        with quiet(), reraise_lost_ranks(), sharing_skeletons():
            if info.gang or (head and placement.copies > 1):
                group = require_group(placement.partition, placement.ranks)
                if info.splits_matrices:
                    self.split = group
            self.require_ranks(placement.partition, checkpoint, settings, placement.ranks)
            self._backbone = self._open(checkpoint, settings, placement, head=head)
            if head:
                self.language_model = self.language_model_type(checkpoint, settings, self._backbone, self.device)
                self.language_model.no_gradients = self.no_gradients
                self.language_model.whole_weights = not info.splits_matrices
        self._run = forward_function(self._backbone.module)
        self.layers: tuple[Layer, ...] = self._backbone.layers
        self.model: TableRow = {
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
        if head:
            if placement.copies > 1:
                self.language_model_type = RankedLanguageModel
            return load(checkpoint, settings, self.device, head=True)
        if self._reloadable is not None:
            if self._reloadable.reload(checkpoint, settings, self.device):
                model = self._reloadable.model
                assert model is not None
                return open_module(model, layers=settings.layers, device=self.device)
            free_cached_memory()
        backbone = load(checkpoint, settings, self.device)
        self._reloadable = ReloadableModel(checkpoint, settings, self.device, backbone.model)
        return backbone

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

    def release(self) -> ReloadableModel | None:
        """Close the replica, but for its model, which the next replica may use. None if only others can be opened."""
        reloadable = self._reloadable
        self._reloadable = None
        if reloadable is None:
            self.close()
        else:
            del self._backbone, self._run, self.layers
        return reloadable

    def close(self) -> None:
        """Drop the weights, or this rank's part of them."""
        self.language_model = None
        self._reloadable = None
        del self._backbone, self._run, self.layers
        free_cached_memory()


def replica_class(partition: str) -> type[Replica]:
    """Return the class of a partition's replicas. See `partition.replica.Replica`."""
    module, _, name = PARTITIONS[partition].opens.partition(":")
    replica: type[Replica] = getattr(import_module(module), name)
    return replica


def open_replica(
    checkpoint: Checkpoint,
    settings: Settings,
    placement: Placement,
    *,
    head: bool = False,
    reloadable: ReloadableModel | None = None,
) -> Replica:
    """Open a checkpoint as one replica, or as this process's rank of a replica of several ranks.

    Every rank calls this, inside one torch.distributed group (`partition.group.join`).

    Args:
        head: open the head, too, so that the replica has a `language_model`.
        reloadable: see `Replica`. Only the partition `single` without a head has a use for it.

    Raises:
        ModelError: the model cannot be opened or observed, or has no head that predicts the next token.
        ConfigError: the devices of this machine do not fit the placement.
    """
    torch.set_num_threads(settings.threads)
    opened = replica_class(placement.partition)
    if reloadable is not None:
        if opened is Replica and not head:
            return Replica(checkpoint, settings, placement, reloadable=reloadable)
        reloadable.drop()
        free_cached_memory()
    return opened(checkpoint, settings, placement, head=head)


def run_batch(run: Forward, batch: Batch, device: torch.device) -> None:
    """Run a backbone over a batch, with an attention mask only if rows are padded."""
    input_ids = to_device(batch.input_ids, device, torch.int64)
    mask = None
    if not batch.attention_mask.all():
        mask = to_device(batch.attention_mask, device, torch.int64)
    with torch.no_grad():
        run(input_ids, mask)
