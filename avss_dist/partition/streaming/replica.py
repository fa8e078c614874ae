"""One layer resident at a time: every batch of a shard runs through a layer before the next layer's weights come.

Each batch has a greenlet of its own, in which the model's forward runs unchanged. Where it calls a layer it is paused
until that layer's weights are there. So a checkpoint larger than memory costs one read of its files a shard.
"""

from __future__ import annotations

import contextvars
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import groupby
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import nn

from avss_dist.corpus.shards import Batch
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.layers import Layer, input_tensor, layer_lists
from avss_dist.models.loading import forward_function, open_module, quiet, without_head
from avss_dist.partition.base import BatchContext, Placement
from avss_dist.partition.batchwise import describe, run_batch
from avss_dist.partition.choose import require_room_for_a_layer
from avss_dist.partition.streaming.buffers import AnyBuffer, buffer_bytes
from avss_dist.partition.streaming.hidden_states import HiddenStateOffloader
from avss_dist.partition.streaming.weights import Weights
from avss_dist.partition.streaming.window import Window
from avss_dist.settings import Settings
from avss_dist.system.devices import free_device, pick_device
from avss_dist.system.memory import keep_freed_memory


class StreamingReplica:
    """See `partition.base.Replica`.

    ``placement.max_memory["cpu"]`` limits weights and waiting hidden states in host memory. Weights take up to two
    layers of it; hidden states for which they leave no room wait in files in ``placement.offload_folder``.

    Raises:
        ConfigError: the limit has no room for one layer.
        ModelError: the weights cannot be read layer by layer; the message says why.
    """

    reports_stats = True

    def __init__(self, checkpoint: Checkpoint, settings: Settings, placement: Placement) -> None:
        self.device = pick_device(settings.device)
        keep_freed_memory()
        self._weights = Weights(checkpoint, settings)
        model = self._weights.model
        backbone, config = without_head(model), model.config.get_text_config()
        lists = layer_lists(backbone, getattr(config, "num_hidden_layers", None), settings.layers)
        modules = [module for layers in lists.values() for module in layers]
        self._parts, rest = self._weights.split(modules, backbone)
        self._weights.load(rest, self.device)
        self._weights.resolve_ties(backbone)
        model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(self.device))
        with quiet(), self._weights.fill_random(self._parts, self.device):
            opened = open_module(model, layers=settings.layers, device=self.device)
        self.layers: tuple[Layer, ...] = opened.structure.layers
        self.model: Mapping[str, Any] = describe(opened, "streaming")
        self._run = forward_function(opened.module)
        self._order = [index for index, _ in groupby(modules.index(layer.module) for layer in self.layers)]
        self._buffers: list[AnyBuffer] = []
        self._folder = placement.offload_folder
        self._host_bytes = self._left_for_hidden_states(placement.max_memory.get("cpu"))
        self._stops = [_Stop(module, index) for index, module in enumerate(modules)]

    @property
    def bytes_read(self) -> int:
        """Bytes of weights that were read, so far."""
        return self._weights.bytes_read

    def forward(self, batches: Sequence[Batch], context: BatchContext) -> None:
        """See `partition.base.Replica`."""

        def run(batch: Batch) -> None:
            with context(batch):
                run_batch(self._run, batch, self.device)

        if not batches:
            return
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())  # of the thread, so for all greenlets
            window = Window(self._weights, self._parts, self._order, self.device, self._buffers)
            stack.enter_context(window)
            hidden = stack.enter_context(HiddenStateOffloader(self.device, self._host_bytes, self._folder))
            passes = stack.enter_context(_passes(len(batches), run))
            waiting: dict[greenlet, int] = {}
            for one, batch in zip(passes, batches, strict=True):
                self._resume(one, batch, hidden, waiting)
            while waiting:
                index = next(iter(waiting.values()))
                window.load(index)
                for one in [one for one in passes if waiting.get(one) == index]:
                    del waiting[one]
                    hidden.restore(one)
                    self._resume(one, None, hidden, waiting)

    @staticmethod
    def _resume(one: greenlet, value: Any, hidden: HiddenStateOffloader, waiting: dict[greenlet, int]) -> None:
        """Run a pass until its next layer, or to its end."""
        stopped_at = one.switch(value)
        if not one.dead:
            waiting[one], state = stopped_at
            hidden.offload(one, state)

    def _left_for_hidden_states(self, most: int | None) -> int | None:
        """Bytes of host memory that weights leave of ``most``; None is no limit."""
        if most is None:
            return None
        layer = max(buffer_bytes(part.stored) for part in self._parts)
        tensors = (*self._weights.model.parameters(), *self._weights.model.buffers())
        rest = sum(t.nbytes for t in tensors if t.device.type == "cpu")
        require_room_for_a_layer(layer + rest, most)
        return max(0, most - 2 * layer - rest)

    def close(self) -> None:
        """Drop the weights."""
        for stop in self._stops:
            stop.remove()
        del self._weights, self._run, self.layers, self._parts, self._stops, self._buffers
        free_device(self.device)


class _Stop:
    """Makes a layer, when it is called, first switch to the greenlet that schedules, with (index, hidden states).

    The layer stays the module that it is, with its hooks and attributes; only its class's ``__call__`` is extended.
    """

    def __init__(self, layer: nn.Module, index: int) -> None:
        self._layer, self._kind = layer, type(layer)

        def call(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
            scheduler = getcurrent().parent
            assert scheduler is not None, "a layer was called outside of StreamingReplica.forward"
            scheduler.switch((index, input_tensor(args, kwargs)))
            return self._kind.__call__(layer, *args, **kwargs)

        names = {name: getattr(self._kind, name) for name in ("__module__", "__qualname__", "__doc__")}
        layer.__class__ = type(self._kind.__name__, (self._kind,), {**names, "__call__": call})

    def remove(self) -> None:
        """Give the layer its class back."""
        self._layer.__class__ = self._kind


@contextmanager
def _passes(number: int, run: Any) -> Iterator[list[greenlet]]:
    """Greenlets that will run a function, each in a copy of this context; those that have not ended are unwound."""
    passes = [greenlet(run) for _ in range(number)]
    for one in passes:
        one.gr_context = contextvars.copy_context()
    try:
        yield passes
    finally:
        for one in passes:
            one.throw()
