"""A whole model on one device."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from avss_dist.corpus.shards import Batch
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.layers import Layer
from avss_dist.models.loading import Backbone, Forward, forward_function, load
from avss_dist.partition.base import Watch
from avss_dist.settings import Settings
from avss_dist.system.devices import pick_device as pick_device
from avss_dist.system.memory import keep_freed_memory


class SingleReplica:
    """See `partition.base.Replica`."""

    data_rank = 0
    data_world = 1
    lockstep = False
    reports_stats = True

    def __init__(self, checkpoint: Checkpoint, settings: Settings) -> None:
        self.device = pick_device(settings.device)
        keep_freed_memory()
        self._backbone = load(checkpoint, settings, self.device)
        self._run = forward_function(self._backbone.module)
        self.layers: tuple[Layer, ...] = self._backbone.structure.layers
        self.model: Mapping[str, Any] = describe(self._backbone, "single")

    def forward(self, batches: Sequence[Batch], watch: Watch) -> None:
        """See `partition.base.Replica`."""
        for batch in batches:
            with watch(batch):
                run_batch(self._run, batch, self.device)

    def close(self) -> None:
        """Drop the weights."""
        del self._backbone, self._run, self.layers
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def run_batch(run: Forward, batch: Batch, device: torch.device) -> None:
    """Run a backbone over a batch; the attention mask is passed only where there is padding."""
    input_ids = torch.from_numpy(batch.input_ids).to(device, torch.int64)
    mask = None if batch.attention_mask.all() else torch.from_numpy(batch.attention_mask).to(device, torch.int64)
    with torch.no_grad():
        run(input_ids, mask)


def describe(backbone: Backbone, partition: str) -> dict[str, Any]:
    """The columns of the run's row that only an opened model knows."""
    return {
        "family": backbone.family,
        "architecture": backbone.architecture,
        "hidden_size": backbone.hidden_size,
        "num_parameters": backbone.num_parameters,
        "dtype": backbone.dtype,
        "attention_implementation": backbone.attention_implementation,
        "partition": partition,
        "threads": torch.get_num_threads(),
        "notes": list(backbone.structure.notes),
    }
