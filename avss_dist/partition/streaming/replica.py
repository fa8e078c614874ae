"""Partition ``streaming``: every batch of a shard runs through a layer before the next layer's weights are loaded.

A checkpoint larger than memory therefore costs one read of its files for each shard. See `streaming.passes`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any, ClassVar, TypeVar

import torch

from avss_dist.core.errors import ModelError
from avss_dist.core.settings import Settings
from avss_dist.core.text import describe_bytes
from avss_dist.corpus.shards import Batch
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.layers import Layer, layer_lists
from avss_dist.models.loading import forward_function, open_module, quiet, without_head
from avss_dist.models.size import Footprint, footprint
from avss_dist.partition.choose import require_room_for_a_layer
from avss_dist.partition.memory import PartitionMemory, Usage
from avss_dist.partition.replica import BatchContext, Placement, RowSplit, describe, run_batch
from avss_dist.partition.streaming.buffers import buffer_bytes
from avss_dist.partition.streaming.language_model import StreamingLanguageModel
from avss_dist.partition.streaming.passes import Passes
from avss_dist.partition.streaming.weights import StreamedWeights
from avss_dist.system.devices import free_device, pick_device
from avss_dist.system.memory import keep_freed_memory

SPARE_SHARE = 0.9  # of what a GPU has free
T = TypeVar("T")


class StreamingMemory(PartitionMemory):
    """Memory of a replica with one or two layers and the waiting hidden states in memory."""

    unpacks = True

    @staticmethod
    def minimum_host_weights(size: Footprint, kind: str, *, head: bool) -> int:
        """See `PartitionMemory`."""
        outside = size.weight_bytes - sum(size.layer_bytes) if head else size.other_bytes
        largest = max(size.layer_bytes, default=0)
        return largest + size.unpacking_bytes + outside if kind == "cpu" else int(largest * size.stored_share)

    @property
    def obstacle(self) -> str | None:
        """See `PartitionMemory`."""
        if not self.stored.quantized:
            return None
        if not self.stored.can_unpack:
            return "computes with unpacked weights, and transformers cannot unpack these while it loads them"
        return "needs the setting dequantize, which unpacks the weights"

    def usage(self) -> Usage:
        """See `PartitionMemory`. Under a limit, the next layer and hidden states take what it leaves."""
        size, layers = self.size, sum(sorted(self.size.layer_bytes)[-2:])
        host = self.minimum_host_weights(size, self.devices.kind, head=False)
        why = "layers are read for each shard"
        if size.unpacking_bytes:
            why += f", and unpacked in {describe_bytes(size.unpacking_bytes)}"
        if "cpu" not in self.max_memory:
            rows = self.settings.sequences_per_shard or self.settings.batch_size
            waiting = size.hidden_bytes(rows, self.settings.sequence_length)
            host += waiting + int((layers - max(size.layer_bytes)) * size.stored_share)
            why += f"; {describe_bytes(waiting)} of hidden states wait"
        if not self.on_gpu:
            return self.process_usage(host, why)
        return self.process_usage(size.other_bytes + layers + size.unpacking_bytes, why, host_weights=host)


class StreamingReplica:
    """Model whose layers are loaded one at a time; see `partition.replica.Replica`.

    ``placement.max_memory["cpu"]`` limits weights and waiting hidden states in host memory. Weights take up to two
    layers of it; hidden states that do not fit beside them wait in temporary files. On a GPU they
    first wait in the memory that layers and batches leave.

    Raises:
        ConfigError: the limit has no room for one layer.
        ModelError: the weights cannot be read layer by layer; the message says why.
    """

    split = RowSplit()
    reports_stats = True
    language_model: StreamingLanguageModel | None = None
    memory: ClassVar[type[PartitionMemory]] = StreamingMemory

    def __init__(self, checkpoint: Checkpoint, settings: Settings, placement: Placement, *, head: bool = False) -> None:
        self.device = pick_device(settings.device)
        keep_freed_memory()
        self._weights = StreamedWeights(checkpoint, settings, head=head)
        model = self._weights.model
        backbone, config = without_head(model), model.config.get_text_config()
        lists = layer_lists(backbone, getattr(config, "num_hidden_layers", None), settings.layers)
        modules = [module for layers in lists.values() for module in layers]
        used = model if head else backbone
        self._parts, outside = self._weights.split(modules, used)
        self._weights.load(outside, self.device)
        self._weights.resolve_ties(used)
        model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(self.device))
        with quiet(), self._weights.fill_random(self._parts, self.device):
            opened = open_module(model, layers=settings.layers, device=self.device)
            if head:
                self.language_model = StreamingLanguageModel(checkpoint, settings, opened, self.device)
        self.layers: tuple[Layer, ...] = opened.structure.layers
        self.model: Mapping[str, Any] = describe(opened, "streaming")
        self._run = forward_function(opened.module)
        order = [index for index, _ in groupby(modules.index(layer.module) for layer in self.layers)]
        host_bytes = self._host_bytes_for_hidden_states(placement.max_memory.get("cpu"))
        device_bytes = self._device_bytes_for_hidden_states(checkpoint, settings, placement.max_memory.get("0"))
        self._passes = Passes(modules, self._weights, self._parts, order, self.device, device_bytes, host_bytes)
        if self.language_model:
            self.language_model.passes = self._passes

    @property
    def bytes_read(self) -> int:
        """Number of bytes of weights read so far."""
        return self._weights.bytes_read

    def forward(self, batches: Sequence[Batch], context: BatchContext) -> None:
        """See `partition.replica.Replica`."""

        def run(batch: Batch) -> None:
            with context(batch):
                run_batch(self._run, batch, self.device)

        self._passes.run([partial(run, batch) for batch in batches])

    def collect(self, counted: T) -> list[T]:
        """See `partition.replica.Replica`."""
        return [counted]

    def _host_bytes_for_hidden_states(self, maximum: int | None) -> int | None:
        """Return the bytes of host memory that weights leave of a maximum; None is no limit."""
        if maximum is None:
            return None
        on_cpu = self.device.type == "cpu"
        unpacking = self._weights.unpacking_bytes(self._parts) if on_cpu or self._weights.unpacks_on_cpu else 0
        if unpacking and on_cpu:  # of the next layer, nothing is in the memory of this process
            layer, beside = max(part.loaded_bytes for part in self._parts), unpacking
        else:
            layer = max(buffer_bytes(part.stored) for part in self._parts)
            beside = layer + unpacking
        tensors = (*self._weights.model.parameters(), *self._weights.model.buffers())
        outside = sum(t.nbytes for t in tensors if t.device.type == "cpu")
        require_room_for_a_layer(layer + unpacking + outside, maximum)
        return max(0, maximum - layer - beside - outside)

    def _device_bytes_for_hidden_states(self, checkpoint: Checkpoint, settings: Settings, maximum: int | None) -> int:
        """Return the bytes of a GPU that two layers and two batches at their peak leave for waiting hidden states."""
        if self.device.type != "cuda":
            return 0
        try:
            size = footprint(checkpoint, settings)
        except ModelError:  # what cannot be sized is measured with care
            return 0
        free = int(torch.cuda.mem_get_info(self.device)[0] * SPARE_SHARE)
        layer = max(max(part.loaded_bytes, buffer_bytes(part.stored)) for part in self._parts)
        unpacking = 0 if self._weights.unpacks_on_cpu else self._weights.unpacking_bytes(self._parts)
        shape = settings.batch_size, settings.sequence_length
        batch = size.activation_bytes(*shape) + size.logit_bytes(*shape)
        return max(0, min(free, maximum or free) - 2 * layer - unpacking - 2 * batch)

    def close(self) -> None:
        """Drop the weights."""
        self._passes.close()
        self.language_model = None
        del self._weights, self._run, self.layers, self._parts, self._passes
        free_device(self.device)
