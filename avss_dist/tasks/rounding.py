"""Effect of rounded weights on the loss: predictions for all linear maps and formats by one pass, and measurements."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product

import numpy as np
import torch
from torch import nn

from avss_dist.core.errors import ModelError
from avss_dist.core.intervention import NO_INTERVENTION, Intervention, RoundedPlace, Rounding, round_place
from avss_dist.core.names import BITS_PER_WEIGHT, LOSS, NUM_WEIGHTS, PREDICTED_RISE
from avss_dist.core.registry import DRAWS
from avss_dist.core.settings import fingerprint
from avss_dist.corpus.shards import Batch, Shard
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.layers import Layer, Projection, as_rows
from avss_dist.models.number_formats import NumberFormat, number_format
from avss_dist.models.rounding import rounded_before, rounded_weight
from avss_dist.models.sparsifying import weight_of
from avss_dist.stats.layer_stats import Float64
from avss_dist.tasks.base import Row, predicted_tokens
from avss_dist.tasks.gradients import trainable
from avss_dist.tasks.watching import Watched, watched_maps

FIRST, SECOND, PREDICTED, OUTPUT_ERROR = "first_order", "second_order", PREDICTED_RISE, "output_error"
BITS = BITS_PER_WEIGHT
MAX_KEPT_BYTES = 2 << 30  # of changes of outputs that wait for the gradients of drawn labels


@dataclass(frozen=True, eq=False)
class RoundedLosses:
    """Loss on a shard of text of the whole model, and with the weights of each layer rounded to a number format.

    A pass resumes from the hidden states of the whole model's pass, as in `layer_removal.LeaveOneOut`. Weights are
    rounded again for every batch, which takes as long as a product with about 500 tokens.

    Attributes:
        format: name of the format.
    """

    shard: Shard
    format: str

    @property
    def key(self) -> str:
        """See `tasks.base.Measure`."""
        return fingerprint(measure="rounded losses", shard=self.shard.content_hash, format=self.format)

    def __call__(self, model: LanguageModel, intervention: Intervention = NO_INTERVENTION) -> list[Row]:
        """See `tasks.base.Measure`. Removed layers are not rounded."""
        layers = _layers(model, intervention, [number_format(self.format)])
        roundings = [round_place(self.format, layer.index) for layer in layers]
        interventions = [intervention, *map(intervention.rounded, roundings)]
        losses = model.losses_under(list(self.shard.batches(model.settings.batch_size)), interventions)
        weights = predicted_tokens(self.shard, model)
        return [
            Row(metric=LOSS, samples=samples, weights=weights, removed=applied.removed, rounding=applied.key.rounding)
            for applied, samples in zip(interventions, losses, strict=True)
        ]


@dataclass(frozen=True, eq=False, kw_only=True)
class RoundingDamage:
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

    shard: Shard
    formats: tuple[str, ...]
    draws: int = DRAWS
    seed: int = 0

    @property
    def key(self) -> str:
        """See `tasks.base.Measure`."""
        options = {"formats": list(self.formats), "draws": self.draws, "seed": self.seed}
        return fingerprint(measure="rounding damage", shard=self.shard.content_hash, **options)

    def __call__(self, model: LanguageModel, intervention: Intervention = NO_INTERVENTION) -> list[Row]:
        """See `tasks.base.Measure`. Removed layers have no rows."""
        formats = [number_format(name) for name in self.formats]
        layers = _layers(model, intervention, formats)
        batches = list(self.shard.batches(model.settings.batch_size))
        passes = [_Pass.start(batch, formats, self.draws, model.device) for batch in batches]
        maps = [(layer, projection) for layer in layers for projection in layer.projections]
        with model.applying(intervention), trainable(model.module, ()), watched_maps(maps):
            passes = model.backpropagate(batches, passes, draws=self.draws, seed=self.seed)
        return [*_rows(passes, predicted_tokens(self.shard, model)), *_sizes(layers, formats)]


def _layers(model: LanguageModel, intervention: Intervention, formats: Sequence[NumberFormat]) -> list[Layer]:
    """Return the layers that have linear maps and are not removed.

    Raises:
        ModelError: a format cannot take one of the maps, a layer is used more than once, or weights are split.
    """
    layers = [layer for layer in model.layers if layer.projections and layer.index not in intervention.removed]
    if not layers:
        raise ModelError(f"No layer of '{model.checkpoint.name}' has a linear map whose input is seen.")
    model.require_roundable(layers, formats)
    if note := rounded_before(layers):
        model.notes[f"{note} ({model.checkpoint.name})."] = None
    return layers


@dataclass
class _Pass(Watched):
    """Sums over one batch.

    Attributes:
        observed, real: bool[rows, tokens]; tokens that are counted, and tokens without padding.
        sums: float64[rows], by metric and place.
    """

    observed: torch.Tensor
    real: torch.Tensor
    formats: Sequence[NumberFormat]
    draws: int
    keeps: int = 2
    sums: dict[tuple[str, RoundedPlace], torch.Tensor] = field(default_factory=dict)
    _gradients: Counter[tuple[int, str]] = field(default_factory=Counter)  # that came to a map
    _changes: dict[tuple[int, str], list[torch.Tensor]] = field(default_factory=dict)  # of outputs, by format
    _kept_bytes: int = 0

    @staticmethod
    def start(batch: Batch, formats: Sequence[NumberFormat], draws: int, device: torch.device) -> _Pass:
        observed, real = (torch.from_numpy(mask).to(device) for mask in (batch.observed, batch.attention_mask))
        return _Pass(observed, real, formats, draws)

    def see(self, layer: Layer, projection: Projection, x: torch.Tensor, out: torch.Tensor) -> None:
        """Register the input of a linear map that has run, and a hook for the gradient of its output."""
        if not out.requires_grad:  # of the first layer: nothing before it has a gradient
            out.requires_grad_()
        size = out.detach().float().square().sum(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        out.register_hook(partial(self._receive, layer, projection, x.detach(), size))

    def _receive(
        self, layer: Layer, projection: Projection, x: torch.Tensor, size: torch.Tensor, gradient: torch.Tensor
    ) -> None:
        """Add a gradient at the output of a map: first that of the text's labels, then those of the draws."""
        key = layer.index, projection.path
        number = self._gradients[key]
        self._gradients[key] += 1
        g = gradient.detach().float()
        places = [RoundedPlace(layer=layer.index, path=projection.path, format=known.name) for known in self.formats]
        for place, change in zip(places, self._output_changes(key, projection, x), strict=True):
            if number == 0:
                error = self._by_token(projection, change.float().square().sum(dim=-1) / size)
                self._add(OUTPUT_ERROR, place, error.where(self.observed.to(error.device), 0).sum(dim=1))
            self._project(place, number, self._by_token(projection, (g * change.float()).sum(dim=-1)))
        if number == self.draws:
            self._kept_bytes -= sum(change.nbytes for change in self._changes.pop(key, ()))

    def _output_changes(
        self, key: tuple[int, str], projection: Projection, x: torch.Tensor
    ) -> Iterator[torch.Tensor] | list[torch.Tensor]:
        """Return the change of a map's output for each format, [..., outputs], kept ones if there is room for them."""
        if key in self._changes:
            return self._changes[key]
        units = weight_of(projection.module).shape[0]
        size = len(self.formats) * x[..., 0].numel() * units * x.element_size()
        changes = (_output_change(projection.module, known, x) for known in self.formats)
        if self._kept_bytes + size > MAX_KEPT_BYTES:
            return changes
        self._kept_bytes += size
        self._changes[key] = list(changes)
        return self._changes[key]

    def _project(self, place: RoundedPlace, number: int, products: torch.Tensor) -> None:
        """Add the products <g, d> of all tokens of a map, [rows, tokens], for one set of labels."""
        if number == 0:
            for metric in (FIRST, PREDICTED):
                self._add(metric, place, products.sum(dim=1))
        else:
            for metric in (SECOND, PREDICTED):
                self._add(metric, place, products.square().sum(dim=1) / (2 * self.draws))

    def _add(self, metric: str, place: RoundedPlace, values: torch.Tensor) -> None:
        """Add values of a map, float64[rows], to its sum and to that of its layer."""
        for summed in (place, RoundedPlace(layer=place.layer, format=place.format)):
            known = self.sums.get((metric, summed))
            self.sums[metric, summed] = values.clone() if known is None else known + values.to(known.device)

    def _by_token(self, projection: Projection, values: torch.Tensor) -> torch.Tensor:
        """Return values of the tokens of a map's output as float64[rows, tokens], 0 for padding."""
        by_row = as_rows(values.unsqueeze(-1), projection.axes, *self.real.shape)
        if by_row is None:
            raise ModelError(f"The linear map '{projection.path}' does not keep rows and tokens apart.")
        return by_row.sum(dim=-1).double().where(self.real.to(by_row.device), 0)


def _output_change(module: nn.Module, known: NumberFormat, x: torch.Tensor) -> torch.Tensor:
    """Return the change of a linear map's output if its weight is rounded, [..., outputs], in the dtype of x."""
    difference = rounded_weight(module, known).float() - weight_of(module).float()
    return x @ difference.to(x.dtype).T


def _rows(passes: Sequence[_Pass], predicted: Float64) -> Iterator[Row]:
    observed = np.concatenate([batch.observed.sum(dim=1).cpu().numpy() for batch in passes]).astype(np.float64)
    for metric, place in sorted(passes[0].sums, key=lambda key: (key[1].layer, str(key[1]), key[0])):
        yield Row(
            metric=metric,
            samples=torch.cat([batch.sums[metric, place].cpu() for batch in passes]).numpy(),
            weights=observed if metric == OUTPUT_ERROR else predicted,
            layer=place.layer,
            rounding=Rounding((place,)).key,
        )


def _sizes(layers: Sequence[Layer], formats: Sequence[NumberFormat]) -> Iterator[Row]:
    """Yield the number of weights of every place, and their bits in every format."""
    for layer in layers:
        shapes = {projection.path: (projection.outputs, projection.inputs) for projection in layer.projections}
        for path, known in product([None, *shapes], formats):
            maps = [shapes[path]] if path else [*shapes.values()]
            weights = sum(outputs * inputs for outputs, inputs in maps)
            bits = sum(known.bits(*shape) * shape[0] * shape[1] for shape in maps)
            key = round_place(known.name, layer.index, path).key
            sizes = {NUM_WEIGHTS: (weights, 1), BITS: (bits, weights)}
            for metric, (value, weight) in sizes.items():
                samples, ones = np.array([value], np.float64), np.array([weight], np.float64)
                yield Row(metric=metric, samples=samples, weights=ones, layer=layer.index, rounding=key)
