"""Partition ``streaming``: every batch of a shard runs through a layer before the next layer's weights are loaded.

A checkpoint larger than memory therefore costs one read of its files for each shard. See `streaming.passes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from avss_dist.core.devices import SPARE_SHARE
from avss_dist.core.errors import ConfigError, ModelError
from avss_dist.core.intervention import Intervention
from avss_dist.core.process import bound
from avss_dist.core.settings import Settings
from avss_dist.core.streams import portion, report
from avss_dist.core.text import describe_bytes
from avss_dist.corpus.shards import Batch
from avss_dist.models.causal_lm import LanguageModel, last_layer_not_run
from avss_dist.models.change.replay import Record, pass_back
from avss_dist.models.change.skipping import resumption, skip_of
from avss_dist.models.checkpoint.loading import Backbone, open_module, without_head
from avss_dist.models.checkpoint.locate import Checkpoint
from avss_dist.models.checkpoint.size import Footprint, footprint
from avss_dist.models.forward import Change, Forward, Output, changing
from avss_dist.models.gradients import Watcher, WatcherT
from avss_dist.models.structure.layers import Layer
from avss_dist.partition.estimate import MemoryQuery, PartitionEstimate, batch_bytes
from avss_dist.partition.placement import Placement
from avss_dist.partition.replica import BatchContext, Replica
from avss_dist.partition.splitting import layer_modules
from avss_dist.partition.streaming.passes import FORKS, RECORD, Fork, Passes
from avss_dist.partition.streaming.weights import StreamedWeights, buffer_bytes
from avss_dist.stats.layer_stats import Float64

T = TypeVar("T")
MAX_WAITING_BYTES = 2 << 30  # of hidden states of all waiting passes, without a limit by the user


class StreamingReplica(Replica):
    """Model whose layers are loaded one at a time.

    See `partition.replica.Replica`. ``placement.max_memory["cpu"]`` limits weights and waiting hidden states in host
    memory. Weights take up to two layers of it; hidden states that do not fit beside them wait in temporary files. On a
    GPU they first wait in the memory that layers and batches leave.

    Raises:
        ConfigError: the limit has no room for one layer.
        ModelError: the weights cannot be read layer by layer; the message says why.
    """

    @staticmethod
    def minimum_host_weights(size: Footprint, kind: str, *, head: bool) -> int:
        """Return the bytes of weights that must be in host memory at once, on a device of this kind."""
        largest = max(size.layer_bytes, default=0)
        if kind != "cpu":
            return int(largest * size.stored_share)
        outside = size.other_bytes
        if head:
            outside = size.weight_bytes - sum(size.layer_bytes)
        return largest + size.unpacking_bytes + outside

    @classmethod
    def obstacle(cls, query: MemoryQuery) -> str | None:
        """Return why the partition does not run the model with these settings, or None if it does."""
        if not query.size.quantized:
            return None
        if not query.size.can_unpack:
            return "computes with unpacked weights, and transformers cannot unpack these while it loads them"
        return "needs the setting dequantize, which unpacks the weights"

    @classmethod
    def usage(cls, query: MemoryQuery) -> PartitionEstimate:
        """Return the memory of a replica, with at most two layers at a time, and of unpacked weights.

        Under a limit, the next layer and hidden states take what it leaves.
        """
        dtype = query.size.dtype
        is_quantized = query.size.quantized
        if is_quantized:
            settings = replace(query.settings, dequantize=True)
            query = replace(query, settings=settings, size=footprint(query.checkpoint, settings))
        size = query.size
        two_layers = sum(sorted(size.layer_bytes)[-2:])
        host = cls.minimum_host_weights(size, query.devices.kind, head=False)
        why = "layers are read for each shard"
        if size.unpacking_bytes:
            why += f", and unpacked in {describe_bytes(size.unpacking_bytes)}"
        if "cpu" not in query.max_memory:
            rows = query.settings.sequences_per_shard or query.settings.batch_size
            waiting = size.hidden_bytes(rows, query.settings.sequence_length)
            next_layer = two_layers - max(size.layer_bytes)
            host += waiting + int(next_layer * size.stored_share)
            why += f"; {describe_bytes(waiting)} of hidden states wait"
        if is_quantized:
            why += f"; weights are unpacked to {dtype}"
        if not query.on_gpu:
            return query.usage(host, why)
        return query.usage(size.other_bytes + two_layers + size.unpacking_bytes, why, host_weights=host)

    def __init__(self, checkpoint: Checkpoint, settings: Settings, placement: Placement, *, head: bool = False) -> None:
        # Layers are filled with random numbers until the model was tried.
        with ExitStack() as self._filled:
            super().__init__(checkpoint, settings, placement, head=head)
        order: list[int] = []  # of modules; several layers in a row may be one of them
        for layer in self.layers:
            index = self._modules.index(layer.module)
            if not order or index != order[-1]:
                order.append(index)
        host_bytes = self._host_bytes_for_hidden_states(placement.max_memory.get("cpu"))
        device_bytes = self._device_bytes_for_hidden_states(checkpoint, settings, placement.max_memory.get("0"))
        self._passes = Passes(self._modules, self._weights, self._parts, order, self.device, device_bytes, host_bytes)
        if isinstance(self.language_model, StreamingLanguageModel):
            self.language_model.passes = self._passes

    def _open(self, checkpoint: Checkpoint, settings: Settings, placement: Placement, *, head: bool) -> Backbone:
        self.language_model_type = StreamingLanguageModel
        self._weights = StreamedWeights(checkpoint, settings, head=head)
        model = self._weights.model
        backbone = without_head(model)
        self._modules = layer_modules(model, settings.layers)
        used = model if head else backbone
        self._parts, outside = self._weights.split(self._modules, used)
        self._weights.load(outside, self.device)
        self._weights.resolve_ties(used)
        model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(self.device))
        self._filled.enter_context(self._weights.fill_random(self._parts, self.device))
        return open_module(model, layers=settings.layers, device=self.device)

    def forward(self, batches: Sequence[Batch], context: BatchContext) -> None:
        """Run the backbone over every batch, each inside its context.

        Every layer is loaded once for all batches whose passes wait for it.
        """
        run = super().forward
        self._passes.run([partial(run, [batch], context) for batch in batches])

    def _host_bytes_for_hidden_states(self, maximum: int | None) -> int | None:
        """Return the bytes of host memory that weights leave of a maximum, or None if there is no limit."""
        if maximum is None:
            return None
        on_cpu = self.device.type == "cpu"
        unpacking = 0
        if on_cpu or self._weights.unpacks_on_cpu:
            unpacking = self._weights.unpacking_bytes(self._parts)
        if unpacking and on_cpu:  # nothing of the next layer is in the memory of this process
            layer = max(part.loaded_bytes for part in self._parts)
            beside = unpacking
        else:
            layer = max(buffer_bytes(part.stored) for part in self._parts)
            beside = layer + unpacking
        tensors = (*self._weights.model.parameters(), *self._weights.model.buffers())
        outside = sum(tensor.nbytes for tensor in tensors if tensor.device.type == "cpu")
        needed = layer + unpacking + outside
        if maximum < needed:
            raise ConfigError(
                f"`max_memory` leaves {describe_bytes(maximum)} of host memory for weights; streaming needs "
                f"{describe_bytes(needed)} for one layer and the weights outside of layers.",
                f"Allow {(needed - maximum) // 10**6 + 1} MB more.",
            )
        return max(0, maximum - layer - beside - outside)

    def _device_bytes_for_hidden_states(self, checkpoint: Checkpoint, settings: Settings, maximum: int | None) -> int:
        """Return the bytes of a GPU that two layers and two batches at their peak leave for waiting hidden states."""
        if self.device.type != "cuda":
            return 0
        try:
            size = footprint(checkpoint, settings)
        except ModelError:  # without a known size, nothing waits on the GPU
            return 0
        free, _ = torch.cuda.mem_get_info(self.device)
        room = int(free * SPARE_SHARE)
        if maximum:
            room = min(room, maximum)
        layer = max(max(part.loaded_bytes, buffer_bytes(part.stored)) for part in self._parts)
        unpacking = 0
        if not self._weights.unpacks_on_cpu:
            unpacking = self._weights.unpacking_bytes(self._parts)
        batch = batch_bytes(size, settings, head=True)
        return max(0, room - 2 * layer - unpacking - 2 * batch)

    def close(self) -> None:
        """Drop the weights."""
        self._passes.close()
        del self._weights, self._modules, self._parts, self._passes
        super().close()


class StreamingLanguageModel(LanguageModel):
    """Language model whose layers are loaded one at a time.

    See `causal_lm.LanguageModel`. It is constructed while all layers have random weights; ``passes`` is set afterwards.
    """

    keeps_hidden_states = False
    weights_stay = False
    passes: Passes

    def __init__(self, checkpoint: Checkpoint, settings: Settings, backbone: Backbone, device: torch.device) -> None:
        super().__init__(checkpoint, settings, backbone, device)
        # These are found by running the model, while its layers have numbers.
        self.resumes, self.obstacles  # noqa: B018

    def _groups(self, batches: Sequence[Batch], passes: int) -> Iterator[tuple[range, AbstractContextManager[None]]]:
        """Yield groups of batch indices whose hidden states fit in memory, ``passes`` times each.

        With each group comes a context for its part of the progress.
        """
        room = MAX_WAITING_BYTES if self.passes.host_bytes is None else self.passes.host_bytes
        largest = max((batch.input_ids.size for batch in batches), default=1) * self.token_bytes
        step = max(1, room // (passes * largest))
        for start in range(0, len(batches), step):
            end = min(start + step, len(batches))
            yield range(start, end), portion(start / len(batches), (end - start) / len(batches))

    @contextmanager
    def running(self, layer: Layer) -> Iterator[Forward]:
        """Load the weights of a layer inside the context, and yield a function that calls it alone."""
        with self.passes.window() as window:
            window.load(self.passes.modules.index(layer.module))
            yield partial(self.passes.call, layer.module)

    def value(self, layer: int, path: str) -> torch.Tensor:
        """Return a copy of a parameter of a layer, whose weights are loaded for it."""
        with self.running(self.layers[layer]):
            return self.layers[layer].module.get_parameter(path).detach().clone()

    def hidden_states(self, batch: Batch) -> torch.Tensor:
        """Return the input of the head, and load each layer while the module runs."""
        return self._alone(partial(super().hidden_states, batch))

    def generate(self, **kwargs: object) -> Output:
        """Call the module's ``generate``, and read the weights for every token."""
        return self._alone(partial(super().generate, **kwargs))

    def _find_cache_obstacle(self, skipped: frozenset[int]) -> str | None:
        return "`partition` streaming finds the weights of a layer by its place in the whole model"

    def _alone(self, function: Callable[[], T]) -> T:
        if not hasattr(self, "passes") or self.passes.running:
            return function()
        return self.passes.run([function])[0]

    def each(self, function: Callable[[Batch], T], batches: Sequence[Batch], activity: str = "Reading text") -> list[T]:
        """Return the result of a function for every batch, from interleaved passes."""
        return self.passes.run([partial(function, batch) for batch in batches], activity)

    def together(self, functions: Sequence[Callable[[], T]]) -> list[T]:
        """Return the results of functions that run the model, from interleaved passes."""
        return self.passes.run(functions)

    def losses_under(
        self, batches: Sequence[Batch], interventions: Sequence[Intervention], activity: str = "Reading text"
    ) -> list[Float64]:
        """Return the `losses` of all batches, float64[rows], under each intervention.

        A pass that removes more layers forks from the first one where they differ.
        """
        first = interventions[0]
        branches = self.branches(interventions)
        losses: dict[tuple[Intervention, int], Float64] = {}

        def ask(intervention: Intervention, index: int, hidden: torch.Tensor | None = None) -> None:
            start: list[Change] = []
            if hidden is not None:
                start = resumption(self.layers, last_layer_not_run(intervention, branches[intervention]), hidden)
            with self.applying(intervention), changing(start):
                losses[intervention, index] = self.losses(batches[index])

        def ask_first(index: int) -> None:
            forks: dict[nn.Module, list[Fork]] = {}
            for branch, layer in branches.items():
                forks.setdefault(self.layers[layer].module, []).append(partial(ask, branch, index))
            with bound(FORKS, forks):
                ask(first, index)

        others = dict.fromkeys(interventions[1:])
        separate = [other for other in others if other not in branches and other != first]
        for group, part in self._groups(batches, 2 * len(interventions)):
            passes = [partial(ask_first, index) for index in group]
            for other in separate:
                passes += [partial(ask, other, index) for index in group]
            with part:
                self.passes.run(passes, activity)
        by_intervention = []
        for intervention in interventions:
            by_batch = [losses[intervention, index] for index in range(len(batches))]
            by_intervention.append(np.concatenate(by_batch))
        return by_intervention

    def backpropagate(
        self, batches: Sequence[Batch], watchers: Sequence[WatcherT], *, draws: int = 0, seed: int = 0
    ) -> list[WatcherT]:
        """Run a forward and a backward pass of each batch inside its watcher, and return the watchers.

        Each layer runs again in the backward pass, when it is loaded again. See
        `causal_lm.LanguageModel.backpropagate`.
        """
        if not self.resumes:
            raise ModelError(
                f"`partition` streaming has no gradients of a {self.family} model: more than hidden states goes from "
                "layer to layer.",
                "Use `partition` single.",
            )
        keeps = max((watcher.keeps for watcher in watchers), default=0)
        for group, part in self._groups(batches, len(self.layers) * (1 + keeps) + draws):
            with part:
                self._backpropagate([batches[i] for i in group], [watchers[i] for i in group], draws, seed)
        return list(watchers)

    def _backpropagate(self, batches: Sequence[Batch], watchers: Sequence[Watcher], draws: int, seed: int) -> None:
        activity = watchers[0].activity
        layers = [layer for layer in self.layers if not skip_of(layer.module)]
        records = [Record(layers[-1]) for _ in batches]

        def forward(batch: Batch, record: Record, watcher: Watcher) -> list[torch.Tensor]:
            """Return the gradients of the last layer's output, for the text's labels and for each draw."""
            try:
                with bound(RECORD, record), watcher.watch():
                    hidden = self.hidden_states(batch)
                leaf = record.leaf.pop()
                leaf_gradients = list(self.loss_gradients(hidden.detach(), batch, draws, seed))
                pass_back(hidden, leaf, leaf_gradients)
            finally:
                torch.set_grad_enabled(False)
            return leaf_gradients

        passes = [partial(forward, *arguments) for arguments in zip(batches, records, watchers, strict=True)]
        with portion(0, 0.5):
            gradients = self.passes.run(passes, activity)
        with self.passes.window(backwards=True) as window:
            for number, module in enumerate(layer.module for layer in reversed(layers)):
                report(activity, 0.5 + 0.5 * number / len(layers))
                window.load(self.passes.modules.index(module))
                for i, (record, watcher) in enumerate(zip(records, watchers, strict=True)):
                    with watcher.watch():
                        record.pass_back(module, partial(self.passes.call, module), gradients[i])
