"""One layer resident at a time: every batch of a shard runs through a layer before the next layer's weights come.

Each batch has a greenlet of its own, in which the model's forward runs unchanged. Where it calls a layer it is paused,
until that layer's weights are there. So a checkpoint larger than memory costs one read of its files a shard.
"""

from __future__ import annotations

import contextvars
import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import nn

from avss_dist.checkpoints import Checkpoint
from avss_dist.config import Settings
from avss_dist.corpus import Batch
from avss_dist.models import forward_function, open_module, quiet, without_head
from avss_dist.partition.base import Placement, Watch
from avss_dist.partition.devices import pick_device
from avss_dist.partition.memory import keep_freed_memory
from avss_dist.partition.single import describe, run_batch
from avss_dist.partition.waiting import WaitingRoom
from avss_dist.partition.weights import Part, Shelf, Weights
from avss_dist.partition.window import Window
from avss_dist.structure import Layer, input_tensor, layer_lists


class StreamingReplica:
    """See `partition.base.Replica`.

    ``placement.max_memory["cpu"]`` bounds weights and waiting hidden states in host memory; what of the latter has no room
    waits in ``placement.offload_folder``.

    Attributes:
        bytes_read: of weights, so far.

    Raises:
        ModelError: the weights cannot be read layer by layer; the message says why.
    """

    data_rank = 0
    data_world = 1
    lockstep = False
    reports_stats = True

    def __init__(self, checkpoint: Checkpoint, settings: Settings, placement: Placement) -> None:
        self.device = pick_device(settings.device)
        keep_freed_memory()
        self._weights = Weights(checkpoint, settings)
        model = self._weights.model
        backbone = without_head(model)
        modules = _candidates(backbone, model.config.get_text_config(), settings)
        parts, rest = self._weights.split(modules, backbone)
        self._weights.bring(rest, self.device)
        self._weights.bring_ties(backbone)
        model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(self.device))
        with quiet(), self._weights.noise(parts, self.device):
            opened = open_module(model, layers=settings.layers, device=self.device)
        self.layers: tuple[Layer, ...] = opened.structure.layers
        self.model: Mapping[str, Any] = describe(opened, "streaming")
        self._run = forward_function(opened.module)
        self._modules, self._parts = modules, parts
        self._order = [modules.index(layer.module) for layer in self.layers]
        self._placement = placement
        self._shelves: list[Shelf] = []
        self._stops = [_Stop(index, module) for index, module in enumerate(modules)]

    @property
    def bytes_read(self) -> int:
        """Of weights, so far."""
        return self._weights.bytes_read

    def forward(self, batches: Sequence[Batch], watch: Watch) -> None:
        """See `partition.base.Replica`."""
        if not batches:
            return

        def run(batch: Batch) -> None:
            with watch(batch):
                run_batch(self._run, batch, self.device)
