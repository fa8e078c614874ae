"""Measures of backward passes through a text's loss: their common part, and the gradients of layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import nn

from avss_dist.core.devices import to_device
from avss_dist.core.errors import ModelError
from avss_dist.core.intervention import NO_INTERVENTION, Intervention, Removals
from avss_dist.core.process import bound
from avss_dist.corpus.shards import Batch, Shard
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.forward import Arguments, Change, Forward, Keywords, Output, RunThrough, changing
from avss_dist.models.predictions import predicted
from avss_dist.models.structure.layers import Layer, LayerCall, as_rows, output_tensor
from avss_dist.stats.layer_stats import Float64
from avss_dist.tasks.task import Measure, MetricRow, predicted_tokens
from avss_dist.warehouse.reader import grouped

TAYLOR = "taylor"  # nats per predicted token; low is unimportant
L1 = "gradient_l1"
L2 = "gradient_l2"
FROBENIUS = "weight_frobenius"
CHUNK = 2048  # tokens whose updates exist at once
DRAWS = 2
"""Default number of labels that are drawn from the model's predictions for each token."""

CURRENT: ContextVar[BackwardPass | None] = ContextVar("pass", default=None)
"""The pass that hooks report to."""


class RowKey(NamedTuple):
    """Everything that a row of a backward measure describes.

    Attributes:
        metric: name of the metric.
        layer: index of the layer.
        removed: removed layers, if they are others than those of the cell.
        rounding: key of the rounding, if it is another than that of the cell.
    """

    metric: str
    layer: int
    removed: Removals | None = None
    rounding: str | None = None


class BackwardPass:
    """Sums over one batch, which hooks collect in a forward pass and in all backward passes through it.

    Attributes:
        measure: the `BackwardMeasure`.
        order: indices of the layers that run.
        keeps, runs_by_layer: see `gradients.Watcher`.
        observed, real: bool[rows, tokens]; tokens that are counted, and tokens without padding.
        sums: float64[any] by the row that they become. They are on the devices that computed them, so that nothing
            waits for a device.
    """

    keeps = 2
    runs_by_layer = False

    def __init__(self, measure: BackwardMeasure, batch: Batch, layers: Sequence[Layer], device: torch.device) -> None:
        self.measure = measure
        self.order = [layer.index for layer in layers]
        self.observed = to_device(batch.observed, device)
        self.real = to_device(batch.attention_mask, device)
        self.sums: dict[RowKey, torch.Tensor] = {}
        self._calls: Counter[int] = Counter()  # of modules, by the first layer that each is

    @property
    def activity(self) -> str:
        """Name of the work in the progress that is reported."""
        return self.measure.activity

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Make this pass current for hooks inside the context."""
        with bound(CURRENT, self):
            yield

    def call(self, uses: Sequence[Layer], forward: Forward, args: Arguments, kwargs: Keywords) -> Output:
        """Run a layer. Passes that read or change what goes through layers do more.

        Args:
            uses: the layers that are the same module.
            forward: forward of the module.
            args, kwargs: its arguments.
        """
        return forward(*args, **kwargs)

    def count_call(self, uses: Sequence[Layer]) -> tuple[int, Layer]:
        """Count a call of the module that layers are, and return its number and its layer."""
        first = uses[0].index
        number = self._calls[first]
        self._calls[first] += 1
        return number, uses[number % len(uses)]

    def listen(self, out: torch.Tensor, receive: Callable[[int, torch.Tensor], None]) -> None:
        """Have a function called with the number and the gradient of an output in each backward pass.

        Number 0 is the gradient for the labels of the text. Those of drawn labels follow.
        """
        if not out.requires_grad:  # of the first layer: nothing before it has a gradient
            out.requires_grad_()
        numbers = count()
        out.register_hook(lambda gradient: receive(next(numbers), gradient.detach()))

    def add(self, key: RowKey, values: torch.Tensor) -> None:
        """Add values to a sum."""
        if key in self.sums:
            before = self.sums[key]
            self.sums[key] = before + values.to(before.device)
        else:
            self.sums[key] = values.clone()

    def change_of_loss(self, number: int, products: torch.Tensor, dim: int) -> torch.Tensor:
        """Return the first-order change of the loss from the products <g, d> of gradients and changes of activations.

        For drawn labels, return that of second order: half of the squares, a mean over draws.
        """
        if number == 0:
            return products.sum(dim=dim)
        return products.square().sum(dim=dim) / (2 * self.measure.draws)

    def by_row(self, layer: Layer, tensor: torch.Tensor) -> torch.Tensor:
        """Return a layer's input, output or gradient as [rows, tokens, units]."""
        return as_rows(tensor, layer.axes, *self.real.shape, place=layer)


@dataclass(frozen=True, eq=False)
class BackwardMeasure(Measure):
    """Measure of a forward pass of each batch of a shard, and of backward passes through it.

    Attributes:
        draws: number of further backward passes, with labels that are drawn from the model's own prediction.
        seed: seed of the draws.
        new_pass: class of the passes, a `BackwardPass`.
        by_token: starts of the names of metrics that are means over the counted tokens, and not the predicted ones.
        trains: whether the layers' weights have gradients, too.
        activity: see `gradients.Watcher`.
    """

    shard: Shard
    new_pass: ClassVar[type[BackwardPass]]
    by_token: ClassVar[tuple[str, ...]] = ()
    draws = 0
    seed = 0
    trains = False
    activity: ClassVar[str] = "Computing gradients"

    def __call__(self, model: LanguageModel, intervention: Intervention = NO_INTERVENTION) -> list[MetricRow]:
        """Return the rows of the passes of a model under an intervention.

        Removed layers have no rows.
        """
        layers = self.layers(model, intervention)
        batches = list(self.shard.batches(model.settings.batch_size))
        passes = [self.new_pass(self, batch, layers, model.device) for batch in batches]
        trained = layers if self.trains else ()
        with model.applying(intervention), trainable(model.module, trained), self.hooked(layers):
            passes = model.backpropagate(batches, passes, draws=self.draws, seed=self.seed)
        return list(self.rows(layers, passes, predicted_tokens(self.shard, model)))

    def layers(self, model: LanguageModel, intervention: Intervention) -> list[Layer]:
        """Return the layers that are measured."""
        return [layer for layer in model.layers if layer.index not in intervention.removed]

    def hooked(self, layers: Sequence[Layer]) -> AbstractContextManager[None]:
        """Report the layers to the current pass inside the context."""
        return through_passes(layers)

    def rows(self, layers: Sequence[Layer], passes: Sequence[BackwardPass], weights: Float64) -> Iterator[MetricRow]:
        """Yield the rows of all passes: a row for each sum, with a sample for each sequence.

        Args:
            weights: predicted tokens of each sequence.
        """
        observed = torch.cat([batch.observed.sum(dim=1).cpu() for batch in passes])
        counted_tokens = observed.numpy().astype(np.float64)
        for key in sorted(passes[0].sums, key=_order_of_row):
            samples = torch.cat([batch.sums[key].cpu() for batch in passes])
            yield MetricRow(
                metric=key.metric,
                samples=samples.numpy(),
                weights=counted_tokens if key.metric.startswith(self.by_token) else weights,
                layer=key.layer,
                removed=key.removed,
                rounding=key.rounding,
            )


def _order_of_row(key: RowKey) -> tuple[int, Removals, str, str]:
    """Return the sort key of a row: layer, removed layers, rounding, metric."""
    return key.layer, key.removed or (), key.rounding or "", key.metric


@contextmanager
def through_passes(layers: Sequence[Layer]) -> Iterator[None]:
    """Have layers run by the method ``call`` of the current pass inside the context.

    Its arguments are the layers that are the same module, ``forward`` of the module, and the arguments of that.
    """

    def call(uses: Sequence[Layer], forward: Forward, *args: object, **kwargs: object) -> Output:
        current = CURRENT.get()
        if current is None:
            return forward(*args, **kwargs)
        return current.call(uses, forward, args, kwargs)

    uses_by_module = grouped(layers, lambda layer: layer.module)
    changes: list[Change] = []
    for module, uses in uses_by_module.items():
        changes.append(RunThrough(module, partial(call, uses)))
    with changing(changes):
        yield


def matrices(module: nn.Module) -> list[nn.Parameter]:
    """Return the weight matrices of a layer, including stacks of matrices (experts), without convolutions.

    Of a parameter of DeepSpeed ZeRO-3, this process may have only a part.
    """
    by_id: dict[int, nn.Parameter] = {}
    for child in module.modules():
        if isinstance(child, nn.Conv1d):
            continue
        for parameter in child.parameters(recurse=False):
            shape = getattr(parameter, "ds_shape", parameter.shape)
            if len(shape) in (2, 3) and parameter.is_floating_point():
                by_id[id(parameter)] = parameter
    return list(by_id.values())


class LayerGradients(BackwardPass):
    """Effects of removal by layer, and norms of weights and of their gradients, from one pass."""

    keeps = 1

    def __init__(self, measure: BackwardMeasure, batch: Batch, layers: Sequence[Layer], device: torch.device) -> None:
        super().__init__(measure, batch, layers, device)
        self._tokens = max(1.0, float(predicted(batch).sum()))

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Make this pass current for hooks inside the context, and at its end remove those of weights."""
        with super().watch(), ExitStack() as self._hooks:
            yield

    def call(self, uses: Sequence[Layer], forward: Forward, args: Arguments, kwargs: Keywords) -> Output:
        """Run a layer, and listen to the gradients of its output and of its weights."""
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        hidden = LayerCall(args, kwargs).hidden
        is_first_call = RowKey(FROBENIUS, uses[0].index) not in self.sums
        if is_first_call:
            # Before the layer runs: afterwards its streamed weights are gone.
            self._listen_to_weights(uses, hidden.device)
        version = hidden._version
        output = forward(*args, **kwargs)
        _, layer = self.count_call(uses)
        out = output_tensor(layer, output, hidden)
        states = hidden.detach(), out.detach()
        versions = version, out._version
        out.register_hook(partial(self._remove, layer, states, versions))
        return output

    def _listen_to_weights(self, uses: Sequence[Layer], device: torch.device) -> None:
        """Add the norms of a layer's weights, and listen to their gradients, whose norms begin at zero."""
        weights = matrices(uses[0].module)
        zero = torch.zeros(1, dtype=torch.float64, device=device)
        size = sum((whole_norm(weight, 2) for weight in weights), zero)
        for use in uses:
            self.add(RowKey(FROBENIUS, use.index), size)
            self.add(RowKey(L1, use.index), zero)
            self.add(RowKey(L2, use.index), zero)
        for weight in weights:
            hook = weight.register_post_accumulate_grad_hook(partial(self.accumulate, uses))
            self._hooks.callback(hook.remove)

    def _remove(
        self,
        layer: Layer,
        states: tuple[torch.Tensor, torch.Tensor],
        versions: tuple[int, int],
        gradient: torch.Tensor,
    ) -> None:
        """Add the change of the loss if a layer returned its input, from its input and output and their versions.

        The backward pass saves both anyway, so that they take no further memory.
        """
        before, after = states
        if (before._version, after._version) != versions:
            raise ModelError(f"{layer}, or one behind it, changes its input in place.")
        gradients = self._chunks(layer, gradient)
        inputs = self._chunks(layer, before)
        outputs = self._chunks(layer, after)
        products = []
        for gradients_of_chunk, inputs_of_chunk, outputs_of_chunk in zip(gradients, inputs, outputs, strict=True):
            updates = outputs_of_chunk.float() - inputs_of_chunk.float()
            products.append((gradients_of_chunk.double() * updates).sum(dim=1))
        changes = torch.cat(products).abs().view(self.real.shape)
        real_changes = changes.where(self.real.to(gradient.device), 0)
        self.sums[RowKey(TAYLOR, layer.index)] = real_changes.sum(dim=1)

    def _chunks(self, layer: Layer, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return a tensor of a layer in chunks of `CHUNK` tokens: [tokens, units] each."""
        return self.by_row(layer, tensor).flatten(0, 1).split(CHUNK)

    def accumulate(self, uses: Sequence[Layer], weight: torch.Tensor) -> None:
        """Add the norms of a weight's gradient, and free the gradient."""
        assert weight.grad is not None
        for metric, order in ((L1, 1), (L2, 2)):
            norm = whole_norm(weight.grad, order) / self._tokens
            for layer in uses:
                self.add(RowKey(metric, layer.index), norm)
        weight.grad = None


@dataclass(frozen=True, eq=False)
class Gradients(BackwardMeasure):
    """Gradient measures of each layer, from a forward and a backward pass for each batch of a shard.

    - ``taylor``: the sum over tokens of ``|<dL/d out, out - in>|``, where L is the summed negative log-likelihood in
      nats, per predicted token; a sample for each sequence. It estimates, to first order, the change of the loss if the
      layer returned its input; absolute values keep signs from cancelling (Molchanov et al., arXiv 1906.10771, 3.1).
    - ``gradient_l1``, ``gradient_l2``: sums of the norms of the gradients of the weight matrices; a sample for each
      batch, where L is the mean over its predicted tokens (as in the AVSS authors' script, arXiv 2411.02117).
    - ``weight_frobenius``: sum of the norms of the weight matrices.
    """

    measure = "gradients"
    new_pass = LayerGradients
    trains = True

    def rows(self, layers: Sequence[Layer], passes: Sequence[BackwardPass], weights: Float64) -> Iterator[MetricRow]:
        """Yield the rows of all passes. Norms have a sample for each batch, and that of weights one sample."""
        for row in super().rows(layers, passes, weights):
            if row.metric == TAYLOR:
                yield row
            elif row.metric == FROBENIUS:
                yield replace(row, samples=row.samples[:1], weights=np.ones(1))
            else:
                yield replace(row, weights=np.ones(len(row.samples)))


@contextmanager
def trainable(model: nn.Module, layers: Sequence[Layer]) -> Iterator[None]:
    """Require gradients of the layers' matrices alone inside the context."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    chosen: set[int] = set()
    for layer in layers:
        chosen.update(id(weight) for weight in matrices(layer.module))
    try:
        for parameter in before:
            parameter.requires_grad_(id(parameter) in chosen)
        yield
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)
            parameter.grad = None


def whole_norm(matrix: torch.Tensor, order: int) -> torch.Tensor:
    """Return the vector norm of a matrix's elements, or the sum of those of a stack of matrices, float64.

    Ranks may have parts of it (a DTensor). Then all of them call this.
    """
    norms: Any = torch.linalg.vector_norm(matrix.detach(), order, dim=(-2, -1), dtype=torch.float64)
    if hasattr(norms, "full_tensor"):
        norms = norms.full_tensor()
    return norms.sum()
