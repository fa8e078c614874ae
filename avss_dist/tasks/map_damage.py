"""Effect of changed linear maps on the loss: of small inputs that become zero, and of rounded weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import nn

from avss_dist.core.errors import ModelError
from avss_dist.core.intervention import NO_INTERVENTION, Intervention, round_place
from avss_dist.core.values import NewObject
from avss_dist.corpus.shards import Batch, Shard
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.change.number_formats import NumberFormat, number_format
from avss_dist.models.change.rounding import rounded_before, rounded_weight
from avss_dist.models.forward import Arguments, CallAfter, Keywords, changing
from avss_dist.models.structure.layers import Layer, Projection, as_rows
from avss_dist.models.structure.linear_maps import weight_of
from avss_dist.stats.layer_stats import Float64
from avss_dist.stats.metrics import BITS_PER_WEIGHT, NUM_WEIGHTS, PREDICTED_RISE
from avss_dist.tasks.backward import CURRENT, DRAWS, BackwardMeasure, BackwardPass, RowKey
from avss_dist.tasks.task import Measure, MetricRow, losses_under

# Orders of the predicted change. Those of zeroed inputs are followed by a colon and the path of a map.
FIRST = "first_order"
SECOND = "second_order"
OUTPUT_ERROR = "output_error"
MAX_KEPT_BYTES = 2 << 30  # of changes of outputs that wait for the gradients of drawn labels
Key = tuple[int, str]  # layer, and path of a linear map below it


See = Callable[[BackwardPass, Layer, Projection, torch.Tensor, torch.Tensor], None]
"""Receives the current pass and a linear map that has run: the layer, the map, the map's input and its output."""


@contextmanager
def reporting_maps(maps: Iterable[tuple[Layer, Projection]], see: See) -> Iterator[None]:
    """Report linear maps to a function inside the context whenever one has run while gradients are enabled."""

    def report(layer: Layer, projection: Projection, args: Arguments, kwargs: Keywords, output: torch.Tensor) -> None:
        current = CURRENT.get()
        if torch.is_grad_enabled() and current is not None:
            see(current, layer, projection, _first_tensor(*args, *kwargs.values()), output)

    reports = [CallAfter(projection.module, partial(report, layer, projection)) for layer, projection in maps]
    with changing(reports):
        yield


def _first_tensor(*arguments: object) -> torch.Tensor:
    """Return the first tensor among the arguments of a linear map, which is its input."""
    return next(argument for argument in arguments if isinstance(argument, torch.Tensor))


def _maps(layers: Iterable[Layer]) -> Iterator[tuple[Layer, Projection]]:
    """Yield all linear maps of layers, each with its layer."""
    for layer in layers:
        for projection in layer.projections:
            yield layer, projection


@dataclass(frozen=True, eq=False, kw_only=True)
class MapDamage(BackwardMeasure):
    """Predicted change of the summed loss, in nats, when the inputs of one linear map up to a threshold become zero.

    x is the input of a token, d = -x in the elements that become zero, and g = W^T (gradient of the loss at the map's
    output). Each map has rows with a sample for each threshold, weighted by the number of predicted tokens:

    - ``first_order:PATH``: the sum over tokens of ``<g, d>``.
    - ``second_order:PATH``: half the sum of ``<g, d>^2``, a mean over draws, with the gradients of labels drawn from
      the model's own prediction: by the Fisher information (Michel et al., arXiv 1905.10650).

    Attributes:
        thresholds: ascending thresholds of each map, equally many for each.
        draws: number of draws of labels.
        seed: seed of the draws.
    """

    thresholds: Mapping[Key, tuple[float, ...]] = field(repr=False)
    draws: int = DRAWS
    seed: int = 0
    measure = "map damage"
    new_pass = BackwardPass
    activity = "Predicting the effect of zeroed inputs"

    def identity(self) -> NewObject:
        """Return the values that the key is made of."""
        thresholds = [[*key, *values] for key, values in sorted(self.thresholds.items())]
        return super().identity() | {"thresholds": thresholds}

    def hooked(self, layers: Sequence[Layer]) -> AbstractContextManager[None]:
        """Report the linear maps with thresholds to the current pass inside the context."""
        maps = []
        for layer, projection in _maps(layers):
            if (layer.index, projection.path) in self.thresholds:
                maps.append((layer, projection))
        return reporting_maps(maps, self._listen)

    def _listen(
        self, current: BackwardPass, layer: Layer, projection: Projection, x: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Add to a pass, at each gradient of the output, the products <g, d> of all tokens, or half of their squares.

        Its sums are float64[thresholds].
        """
        thresholds = self.thresholds[layer.index, projection.path]
        width = x.shape[-1]
        x = x.detach()

        def add(number: int, gradient: torch.Tensor) -> None:
            inputs = x.reshape(-1, width).float()
            at_input = (gradient @ weight_of(projection.module)).to(x.dtype)
            gradients = at_input.reshape(-1, width).float()
            edges = torch.tensor(thresholds, dtype=torch.float32, device=inputs.device)
            interval = torch.bucketize(inputs.abs(), edges)
            sums = torch.zeros((len(inputs), len(edges) + 1), device=inputs.device)
            sums.scatter_add_(1, interval, gradients * inputs)
            # All inputs up to a threshold become zero, so that its sum has those of the smaller ones.
            change = -sums.double().cumsum(dim=1)[:, :-1]
            order = SECOND if number else FIRST
            key = RowKey(f"{order}:{projection.path}", layer.index)
            current.add(key, current.change_of_loss(number, change, dim=0))

        current.listen(out, add)

    def rows(self, layers: Sequence[Layer], passes: Sequence[BackwardPass], weights: Float64) -> Iterator[MetricRow]:
        """Yield the rows of all passes."""
        for key in passes[0].sums:
            samples: Float64 = np.sum([batch.sums[key].cpu().numpy() for batch in passes], axis=0)
            tokens = np.full(len(samples), float(weights.sum()))
            yield MetricRow(metric=key.metric, samples=samples, weights=tokens, layer=key.layer)


@dataclass(frozen=True, eq=False)
class RoundedLosses(Measure):
    """Loss on a shard of text of the whole model, and with the weights of each layer rounded to a number format.

    A pass resumes from the hidden states of the whole model's pass, as in `text_loss.LeaveOneOut`. Weights are
    rounded again for every batch, which takes as long as a product with about 500 tokens.

    Attributes:
        format: name of the format.
    """

    shard: Shard
    format: str
    measure = "rounded losses"

    def __call__(self, model: LanguageModel, intervention: Intervention = NO_INTERVENTION) -> list[MetricRow]:
        """Return the losses of the model under the intervention, and with each remaining layer rounded."""
        layers = _roundable_layers(model, intervention, [self.format])
        roundings = [replace(intervention, rounding=round_place(self.format, layer.index)) for layer in layers]
        return losses_under(model, self.shard, [intervention, *roundings], f"Rounding layers to {self.format}")


def _roundable_layers(model: LanguageModel, intervention: Intervention, formats: Sequence[str]) -> list[Layer]:
    """Return the layers that have linear maps and are not removed.

    Raises:
        ModelError: a format cannot take one of the maps, a layer is used more than once, or weights are split.
    """
    layers = [layer for layer in model.layers if layer.projections and layer.index not in intervention.removed]
    if not layers:
        raise ModelError(f"No layer of '{model.checkpoint.name}' has a linear map whose input is seen.")
    model.require_roundable(layers, [number_format(name) for name in formats])
    if note := rounded_before(layers):
        model.notes[f"{note} ({model.checkpoint.name})."] = None
    return layers


class _RoundingPass(BackwardPass):
    """Sums over one batch: float64[rows], by metric, layer and key of the rounding."""

    measure: RoundingDamage
    runs_by_layer = True

    def __init__(self, measure: RoundingDamage, batch: Batch, layers: Sequence[Layer], device: torch.device) -> None:
        super().__init__(measure, batch, layers, device)
        self.formats = [number_format(name) for name in measure.formats]
        self._changes: dict[Key, list[torch.Tensor]] = {}  # of outputs, by format
        self._kept_bytes = 0

    def see(self, layer: Layer, projection: Projection, x: torch.Tensor, out: torch.Tensor) -> None:
        """Listen to the gradient of a linear map that has run."""
        size = out.detach().float().square().sum(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        self.listen(out, partial(self._project, layer.index, projection, x.detach(), size))

    def _project(
        self,
        layer: int,
        projection: Projection,
        x: torch.Tensor,
        size: torch.Tensor,
        number: int,
        gradient: torch.Tensor,
    ) -> None:
        """Add the products <g, d> of all tokens of a map, or half of their squares for drawn labels."""
        key = (layer, projection.path)
        gradient = gradient.float()
        order = SECOND if number else FIRST
        for format_, change in zip(self.formats, self._output_changes(key, projection, x), strict=True):
            products = self._by_token(projection, (gradient * change.float()).sum(dim=-1))
            predicted = self.change_of_loss(number, products, dim=1)
            sums = {order: predicted, PREDICTED_RISE: predicted}
            if number == 0:
                error = self._by_token(projection, change.float().square().sum(dim=-1) / size)
                sums[OUTPUT_ERROR] = error.where(self.observed.to(error.device), 0).sum(dim=1)
            # A layer, which has no path, has the sums of its maps.
            for path in (projection.path, None):
                rounding = round_place(format_.name, layer, path).key
                for metric, values in sums.items():
                    self.add(RowKey(metric, layer, rounding=rounding), values)
        if number == self.measure.draws:
            self._kept_bytes -= sum(change.nbytes for change in self._changes.pop(key, ()))

    def _output_changes(
        self, key: Key, projection: Projection, x: torch.Tensor
    ) -> Iterator[torch.Tensor] | list[torch.Tensor]:
        """Return the change of a map's output for each format, [..., outputs], kept ones if there is room for them."""
        if key in self._changes:
            return self._changes[key]
        tokens = x[..., 0].numel()
        outputs = weight_of(projection.module).shape[0]
        num_bytes = len(self.formats) * tokens * outputs * x.element_size()
        changes = (_output_change(projection.module, format_, x) for format_ in self.formats)
        if self._kept_bytes + num_bytes > MAX_KEPT_BYTES:
            return changes
        self._kept_bytes += num_bytes
        self._changes[key] = list(changes)
        return self._changes[key]

    def _by_token(self, projection: Projection, values: torch.Tensor) -> torch.Tensor:
        """Return values of the tokens of a map's output as float64[rows, tokens], 0 for padding."""
        by_row = as_rows(values.unsqueeze(-1), projection.axes, *self.real.shape, place=f"'{projection.path}'")
        return by_row.sum(dim=-1).double().where(self.real.to(by_row.device), 0)


@dataclass(frozen=True, eq=False, kw_only=True)
class RoundingDamage(BackwardMeasure):
    """Predicted change of the loss if the weight of a linear map is rounded, for all maps and number formats.

    W is the weight, x the input of a token t, d_t = (Q(W) - W) x the change of the output, and g_t the gradient of the
    summed loss at the output, in nats. Every map and format has these rows, with a sample for each sequence:

    - ``first_order``: the sum over tokens of ``<g_t, d_t>``, which is ``<dL/dW, Q(W) - W>``.
    - ``second_order``: half the sum over tokens of ``<g_t, d_t>^2`` with the gradients of labels drawn from the model's
      own prediction, a mean over draws: the Fisher information token by token, as ``fisher_0`` of `damage.Damage`.
    - ``predicted``: their sum, the predicted increase of the loss. All are in nats per predicted token.
    - ``output_error``: the sum over tokens of ``|d_t|^2 / |W x|^2``, per token, with bias, without gradients.

    - ``num_weights``, ``bits_per_weight``: the size of the weight, and the bits of a number with its share of scales.

    A layer has the sums of these over its maps (of bits, the mean), as if its maps did not interact. The
    gradient at a map's output has the effect of all later layers on a small change, so that none are looked ahead.

    All formats share one forward pass and ``1 + draws`` backward passes. A weight is rounded once for each batch and
    format (20 to 40 ns for a number; 100 to 300 for FP4), and one product gives d_t: about as much as the forward pass,
    for each format. Only one rounded weight is in memory at a time. The changes d_t of all maps wait for the drawn
    labels, up to `MAX_KEPT_BYTES`; others are computed again for each draw.

    Attributes:
        formats: names of the formats.
        draws: number of draws of labels.
        seed: seed of the draws.
    """

    formats: tuple[str, ...]
    draws: int = DRAWS
    seed: int = 0
    measure = "rounding damage"
    new_pass = _RoundingPass
    by_token = (OUTPUT_ERROR,)
    activity = "Predicting the effect of rounding"

    def layers(self, model: LanguageModel, intervention: Intervention) -> list[Layer]:
        """Return the layers that are measured."""
        return _roundable_layers(model, intervention, self.formats)

    def hooked(self, layers: Sequence[Layer]) -> AbstractContextManager[None]:
        """Report all linear maps to the current pass inside the context."""

        def see(
            current: BackwardPass, layer: Layer, projection: Projection, x: torch.Tensor, out: torch.Tensor
        ) -> None:
            assert isinstance(current, _RoundingPass)
            current.see(layer, projection, x, out)

        return reporting_maps(_maps(layers), see)

    def rows(self, layers: Sequence[Layer], passes: Sequence[BackwardPass], weights: Float64) -> Iterator[MetricRow]:
        """Yield the rows of all passes, and the number of weights of every place and their bits in every format."""
        yield from super().rows(layers, passes, weights)
        formats = [number_format(name) for name in self.formats]
        for layer in layers:
            for format_ in formats:
                yield from _size_rows(layer.projections, format_, layer.index, None)
            for projection in layer.projections:
                for format_ in formats:
                    yield from _size_rows([projection], format_, layer.index, projection.path)


def _size_rows(maps: Sequence[Projection], format_: NumberFormat, layer: int, path: str | None) -> Iterator[MetricRow]:
    """Yield the number of weights of a layer or of one of its linear maps, and their bits in a format."""
    number = 0
    bits = 0.0
    for projection in maps:
        number += projection.outputs * projection.inputs
        bits += format_.bits(projection.outputs, projection.inputs) * projection.outputs * projection.inputs
    rounding = round_place(format_.name, layer, path).key
    yield MetricRow(
        metric=NUM_WEIGHTS,
        samples=np.array([number], np.float64),
        weights=np.ones(1),
        layer=layer,
        rounding=rounding,
    )
    yield MetricRow(
        metric=BITS_PER_WEIGHT,
        samples=np.array([bits], np.float64),
        weights=np.array([number], np.float64),
        layer=layer,
        rounding=rounding,
    )


def _output_change(module: nn.Module, format_: NumberFormat, x: torch.Tensor) -> torch.Tensor:
    """Return the change of a linear map's output if its weight is rounded, [..., outputs], in the dtype of x."""
    difference = rounded_weight(module, format_).float() - weight_of(module).float()
    return x @ difference.to(x.dtype).T
