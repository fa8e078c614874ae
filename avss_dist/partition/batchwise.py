"""Base class of replicas that run one batch after the other through the whole backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import torch

from avss_dist.corpus.shards import Batch
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.loading import Backbone, Forward
from avss_dist.models.quantization import describe_computing
from avss_dist.partition.base import BatchContext, RowSplit
from avss_dist.partition.memory import PartitionMemory
from avss_dist.system.devices import to_device

T = TypeVar("T")


class BatchwiseReplica:
    """Replica that runs batches one after the other; see `partition.base.Replica`."""

    device: torch.device
    split = RowSplit()
    reports_stats = True
    language_model: LanguageModel | None = None
    memory: ClassVar[type[PartitionMemory]] = PartitionMemory
    _run: Forward

    def forward(self, batches: Sequence[Batch], context: BatchContext) -> None:
        """See `partition.base.Replica`. All ranks must run equally many batches."""
        for batch in batches:
            with context(batch):
                run_batch(self._run, batch, self.device)

    def collect(self, counted: T) -> list[T]:
        """See `partition.base.Replica`."""
        return [counted]


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
