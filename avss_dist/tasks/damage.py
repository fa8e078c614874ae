"""Effect of removing each layer on the hidden states a few layers later and, by their gradients, on the loss.

One pass measures all layers: each layer runs on the hidden states of the whole model and on those of the models without
one of the layers before it. Each of these models is followed for ``lookahead`` layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import NamedTuple

import torch

from avss_dist.corpus.shards import Batch
from avss_dist.models.forward import Arguments, Forward, Keywords, Output
from avss_dist.models.structure.layers import Layer, LayerCall, output_tensor
from avss_dist.stats.catalog import BLOCK_DISTANCE, SCORES
from avss_dist.tasks.backward import DRAWS, TAYLOR, BackwardMeasure, BackwardPass, RowKey

LOOKAHEAD = max(info.lookahead for info in SCORES.values() if info.lookahead is not None)  # layers
PROPAGATED = "propagated"
PROPAGATED_COSINE = "propagated_cosine"
SIGNED = "taylor_signed"
FISHER = "fisher"
PREDICTED = "predicted"
BLOCK_COSINE = "block_cosine"


class Displacement(NamedTuple):
    """Difference that the removal of a layer makes to the hidden states after a later layer.

    Attributes:
        removed: index of the removed layer.
        distances: values of ``m`` of `Damage` that the later layer stands for.
        difference: hidden states without the layer, less those of the whole model: [rows, tokens, units].
    """

    removed: int
    distances: Sequence[int]
    difference: torch.Tensor


class _DamagePass(BackwardPass):
    """Sums over one batch by metric and removed layer. Those of blocks name the layers of the block, too."""

    measure: Damage

    def __init__(self, measure: Damage, batch: Batch, layers: Sequence[Layer], device: torch.device) -> None:
        super().__init__(measure, batch, layers, device)
        self.keeps = measure.lookahead + 2
        self._changed: dict[int, torch.Tensor] = {}  # hidden states without a layer, by its index
        self._streams: list[torch.Tensor] = []  # [rows, tokens, units] before each layer, and the last
        self._displaced: dict[int, list[Displacement]] = {}  # by the layer after which it is measured

    def call(self, uses: Sequence[Layer], forward: Forward, args: Arguments, kwargs: Keywords) -> Output:
        """Run a layer on the whole model's hidden states and on those of the models without an earlier layer.

        When a layer runs again for its gradients, it runs on the whole model's hidden states alone.
        """
        number, layer = self.count_call(uses)
        call = LayerCall(args, kwargs)
        is_again = number >= len(uses)
        if is_again:
            output = forward(*args, **kwargs)
        else:
            # A layer may change its input in place.
            layer_input = call.hidden.detach().clone()
            models = self._run_changed(layer, forward, call)
            models[layer.index] = layer_input
            output = forward(*args, **kwargs)
            self._compare(layer, models, layer_input, output_tensor(layer, output, layer_input))
        if torch.is_grad_enabled():
            self.listen(output_tensor(layer, output, call.hidden), partial(self._project, layer))
        return output

    @torch.no_grad()
    def _run_changed(self, layer: Layer, forward: Forward, call: LayerCall) -> dict[int, torch.Tensor]:
        """Return the output of a layer on the hidden states without each earlier layer, by that layer."""
        outputs = {}
        for removed, hidden in self._changed.items():
            moved = call.with_hidden(hidden.to(call.hidden.device))
            outputs[removed] = output_tensor(layer, forward(*moved.args, **moved.kwargs), hidden)
        return outputs

    @torch.no_grad()
    def _compare(
        self, layer: Layer, models: dict[int, torch.Tensor], layer_input: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Compare the models without a layer with the whole model after a layer, run on ``layer_input``."""
        whole = self.by_row(layer, out)
        if not self._streams:
            self._streams.append(self.by_row(layer, layer_input))
        # The next layer may change its input in place.
        self._streams.append(whole.clone())
        reference = whole.float()
        size = torch.linalg.vector_norm(reference, dim=-1).clamp_min_(torch.finfo(torch.float32).tiny)
        position = self.order.index(layer.index)
        is_last = layer.index == self.order[-1]
        displaced = self._displaced.setdefault(layer.index, [])
        self._changed = {}
        for removed, hidden in models.items():
            distance = position - self.order.index(removed)
            # Nothing comes after the last layer, so that it stands for every larger distance, too.
            distances = range(distance, self.measure.lookahead + 1) if is_last else (distance,)
            changed = self.by_row(layer, hidden.to(out.device)).float()
            difference = changed - reference
            relative = self._sum(torch.linalg.vector_norm(difference, dim=-1) / size)
            cosine = self._sum(1 - torch.cosine_similarity(changed, reference, dim=-1))
            for later_layers in distances:
                self.sums[RowKey(f"{PROPAGATED}_{later_layers}", removed)] = relative
                self.sums[RowKey(f"{PROPAGATED_COSINE}_{later_layers}", removed)] = cosine
            displaced.append(Displacement(removed, distances, difference.to(whole.dtype)))
            if distance < self.measure.lookahead and not is_last:
                self._changed[removed] = hidden
        if is_last:
            self._measure_blocks()

    def _measure_blocks(self) -> None:
        """Add the distances between the input and the output of every block of layers."""
        device = self._streams[-1].device
        directions = []
        for stream in self._streams:
            directions.append(torch.nn.functional.normalize(stream.float().to(device), dim=-1))
        self._streams = []
        by_token = torch.stack(directions, dim=2)  # [rows, tokens, streams, units]
        cosines = torch.stack([(row @ row.transpose(1, 2)).clamp_(-1, 1) for row in by_token])
        distances = torch.arccos(cosines) / torch.pi
        for start, layer in enumerate(self.order):
            for end in range(start + 1, len(self.order) + 1):
                block = tuple(self.order[start:end])
                self.sums[RowKey(BLOCK_DISTANCE, layer, block)] = self._sum(distances[..., start, end])
                self.sums[RowKey(BLOCK_COSINE, layer, block)] = self._sum(1 - cosines[..., start, end])

    def _project(self, layer: Layer, number: int, gradient: torch.Tensor) -> None:
        """Add the products of the gradient at the output of a layer with what it is without an earlier layer."""
        gradient = self.by_row(layer, gradient).float()
        displacements = self._displaced.get(layer.index, [])
        is_last_pass = number == self.measure.draws
        if is_last_pass:
            self._displaced.pop(layer.index, None)
        real = self.real.to(gradient.device)
        for removed, distances, difference in displacements:
            products = (gradient * difference.float()).sum(dim=-1).double().where(real, 0)
            change = self.change_of_loss(number, products, dim=1)
            if number == 0:
                sums = {SIGNED: change, PREDICTED: change, TAYLOR: products.abs().sum(dim=1)}
            else:
                sums = {FISHER: change, PREDICTED: change}
            for metric, later_layers in product(sums, distances):
                self.add(RowKey(f"{metric}_{later_layers}", removed), sums[metric])

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sums of values over the counted tokens of each row, float64[rows]."""
        return values.double().where(self.observed.to(values.device), 0).sum(dim=1)


@dataclass(frozen=True, eq=False, kw_only=True)
class Damage(BackwardMeasure):
    """Effect of removing each layer, measured ``m`` layers later, for every ``m`` from 0 to ``lookahead``.

    x are the hidden states after the layer that is ``m`` layers later (or after the last layer), x' are those without
    this layer, d = x' - x, and g is the gradient of the summed loss at x, in nats. Each layer has these rows, with a
    sample for each sequence:

    - ``propagated_m``: the sum over tokens of ``|d| / |x|``, per token.
    - ``propagated_cosine_m``: the same of ``1 - cos(x', x)``.
    - ``taylor_m``, ``taylor_signed_m``: the sum over tokens of ``|<g, d>|``, and of ``<g, d>``, per predicted token:
      the change of the loss to first order (``m`` = 0: Molchanov et al., arXiv 1906.10771, section 3.1).
    - ``fisher_m``: half the sum over tokens of ``<g, d>^2`` with the gradients of labels drawn from the model's own
      prediction, a mean over draws: the second order, by the Fisher information (Michel et al., arXiv 1905.10650).
    - ``predicted_m``: ``taylor_signed_m + fisher_m``, the predicted increase of the loss in nats per predicted token.

    Every block of layers (``drop``) has ``block_distance`` and ``block_cosine``: the means over tokens of
    ``acos(cos) / pi`` and of ``1 - cos`` between its input and its output (Gromov et al., arXiv 2403.17887, section 3).

    Attributes:
        lookahead: number of later layers after which the effect is measured.
        draws: number of draws of labels.
        seed: seed of the draws.
    """

    lookahead: int = LOOKAHEAD
    draws: int = DRAWS
    seed: int = 0
    measure = "damage"
    new_pass = _DamagePass
    by_token = (PROPAGATED, BLOCK_DISTANCE, BLOCK_COSINE)
