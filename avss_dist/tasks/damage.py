"""Effect of removing each layer on the hidden states a few layers later and, by their gradients, on the loss.

One pass measures all layers: each layer runs on the hidden states of the whole model and on those of the models without
one of the layers before it. Each of these models is followed for ``lookahead`` layers.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from avss_dist.core.errors import ModelError
from avss_dist.core.intervention import NO_INTERVENTION, Intervention
from avss_dist.core.registry import BLOCK_DISTANCE, DRAWS, SCORES
from avss_dist.core.settings import fingerprint
from avss_dist.corpus.shards import Batch, Shard
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.interventions import around
from avss_dist.models.layers import Layer, LayerCall, as_rows, first_tensor
from avss_dist.stats.layer_stats import Float64
from avss_dist.tasks.base import Row, predicted_tokens
from avss_dist.tasks.gradients import trainable
from avss_dist.tasks.watching import WATCHED, Watched

LOOKAHEAD = max(info.lookahead for info in SCORES.values() if info.lookahead is not None)  # layers
PROPAGATED, PROPAGATED_COSINE = "propagated", "propagated_cosine"
TAYLOR, SIGNED, FISHER, PREDICTED = "taylor", "taylor_signed", "fisher", "predicted"
BLOCK_COSINE = "block_cosine"


@dataclass(frozen=True, eq=False, kw_only=True)
class Damage:
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

    shard: Shard
    lookahead: int = LOOKAHEAD
    draws: int = DRAWS
    seed: int = 0

    @property
    def key(self) -> str:
        """See `tasks.base.Measure`."""
        options = {"lookahead": self.lookahead, "draws": self.draws, "seed": self.seed}
        return fingerprint(measure="damage", shard=self.shard.content_hash, **options)

    def __call__(self, model: LanguageModel, intervention: Intervention = NO_INTERVENTION) -> list[Row]:
        """See `tasks.base.Measure`. Removed layers have no rows."""
        layers = [layer for layer in model.layers if layer.index not in intervention.removed]
        batches = list(self.shard.batches(model.settings.batch_size))
        passes = [_Pass.start(batch, layers, self.lookahead, self.draws, model.device) for batch in batches]
        with model.applying(intervention), trainable(model.module, ()), _watched(layers):
            passes = model.backpropagate(batches, passes, draws=self.draws, seed=self.seed)
        return list(_rows(passes, predicted_tokens(self.shard, model)))


Key = tuple[str, int, tuple[int, ...] | None]  # metric, removed layer, and the layers of a block that begins with it


@dataclass
class _Pass(Watched):
    """Sums over one batch, collected as its layers run.

    Attributes:
        observed, real: bool[rows, tokens]; tokens that are counted, and tokens without padding.
        order: indices of the layers that run.
        draws: number of draws of labels.
        sums: float64[rows] by metric, removed layer and block.
    """

    observed: torch.Tensor
    real: torch.Tensor
    order: Sequence[int]
    lookahead: int
    draws: int
    sums: dict[Key, torch.Tensor] = field(default_factory=dict)
    _calls: Counter[int] = field(default_factory=Counter)  # of modules, by the first layer that each is
    _changed: dict[int, torch.Tensor] = field(default_factory=dict)  # hidden states without a layer, by its index
    _streams: list[torch.Tensor] = field(default_factory=list)  # [rows, tokens, units] before each layer, and the last
    _displaced: dict[int, list[_Displacement]] = field(default_factory=dict)  # by the layer after which it is seen
    _gradients: Counter[int] = field(default_factory=Counter)  # that came to a layer

    @staticmethod
    def start(
        batch: Batch,
        layers: Sequence[Layer],
        lookahead: int,
        draws: int,
        device: torch.device,
    ) -> _Pass:
        observed, real = (torch.from_numpy(mask).to(device) for mask in (batch.observed, batch.attention_mask))
        return _Pass(observed, real, [layer.index for layer in layers], lookahead, draws)

    @property
    def keeps(self) -> int:
        """See `causal_lm.Watching`."""
        return self.lookahead + 2

    def call(self, uses: Sequence[Layer], forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a layer on the whole model's hidden states and on those of the models without an earlier layer.

        When a layer runs again for its gradients, it runs on the whole model's hidden states alone.
        """
        number = self._calls[uses[0].index]
        layer = uses[number % len(uses)]
        self._calls[uses[0].index] += 1
        if number < len(uses):
            with torch.no_grad():
                call = LayerCall(args, kwargs)
                given = call.hidden.detach().clone()  # which a layer may change
                models = {key: _advanced(layer, call, hidden, forward) for key, hidden in self._changed.items()}
                models[layer.index] = given
            output = forward(*args, **kwargs)
            with torch.no_grad():
                self._compare(layer, models, given, _hidden(layer, output, given))
        else:
            output = forward(*args, **kwargs)
        if torch.is_grad_enabled():
            out = first_tensor(output)
            assert out is not None
            if not out.requires_grad:  # of the first layer: nothing before it has a gradient
                out.requires_grad_()
            out.register_hook(partial(self._receive, layer))
        return output

    def _compare(self, layer: Layer, models: dict[int, torch.Tensor], given: torch.Tensor, out: torch.Tensor) -> None:
        """Compare the models without a layer with the whole model after a layer, of which ``given`` is the input."""
        whole = self._rows(layer, out)
        self._streams += [] if self._streams else [self._rows(layer, given)]
        self._streams.append(whole.clone())  # which the next layer may change
        position, last = self.order.index(layer.index), layer.index == self.order[-1]
        self._changed = {}
        for removed, hidden in models.items():
            distance = position - self.order.index(removed)
            distances = range(distance, self.lookahead + 1) if last else (distance,)
            displaced = self._rows(layer, hidden.to(out.device))
            self._measure_distance(removed, distances, displaced, whole)
            displacement = _Displacement(removed, distances, (displaced.float() - whole.float()).to(whole.dtype))
            self._displaced.setdefault(layer.index, []).append(displacement)
            if distance < self.lookahead:
                self._changed[removed] = hidden
        if last:
            self._changed = {}
            self._measure_blocks()

    def _measure_distance(
        self, removed: int, distances: Sequence[int], displaced: torch.Tensor, whole: torch.Tensor
    ) -> None:
        changed, reference = displaced.float(), whole.float()
        size = torch.linalg.vector_norm(reference, dim=-1).clamp_min_(torch.finfo(torch.float32).tiny)
        relative = torch.linalg.vector_norm(changed - reference, dim=-1) / size
        cosine = 1 - torch.cosine_similarity(changed, reference, dim=-1)
        for m in distances:
            self.sums[f"{PROPAGATED}_{m}", removed, None] = self._sum(relative)
            self.sums[f"{PROPAGATED_COSINE}_{m}", removed, None] = self._sum(cosine)

    def _measure_blocks(self) -> None:
        device = self._streams[-1].device
        units = [torch.nn.functional.normalize(x.float().to(device), dim=-1) for x in self._streams]
        self._streams = []
        by_token = torch.stack(units, dim=2)  # [rows, tokens, streams, units]
        cosines = torch.stack([(row @ row.transpose(1, 2)).clamp_(-1, 1) for row in by_token])
        distances = torch.arccos(cosines) / torch.pi
        for start, layer in enumerate(self.order):
            for end in range(start + 1, len(self.order) + 1):
                block = tuple(self.order[start:end])
                self.sums[BLOCK_DISTANCE, layer, block] = self._sum(distances[..., start, end])
                self.sums[BLOCK_COSINE, layer, block] = self._sum(1 - cosines[..., start, end])

    def _receive(self, layer: Layer, gradient: torch.Tensor) -> None:
        """Add a gradient at the output of a layer: first that of the text's labels, then those of the draws."""
        number = self._gradients[layer.index]
        self._gradients[layer.index] += 1
        g = self._rows(layer, gradient.detach()).float()
        displacements = self._displaced.get(layer.index, [])
        if number == self.draws:
            self._displaced.pop(layer.index, None)
        for displacement in displacements:
            products = (g * displacement.difference.float()).sum(dim=-1).double().where(self.real.to(g.device), 0)
            for m in displacement.distances:
                self._project(displacement.removed, m, number, products)

    def _project(self, removed: int, m: int, number: int, products: torch.Tensor) -> None:
        """Add the products <g, d> of all tokens, [rows, tokens], for one set of labels."""
        if number == 0:
            self.sums[f"{TAYLOR}_{m}", removed, None] = products.abs().sum(dim=1)
            for metric in (SIGNED, PREDICTED):
                self.sums[f"{metric}_{m}", removed, None] = products.sum(dim=1)
            return
        second = products.square().sum(dim=1) / (2 * self.draws)
        fisher = f"{FISHER}_{m}", removed, None
        self.sums[fisher] = self.sums[fisher] + second if number > 1 else second
        self.sums[f"{PREDICTED}_{m}", removed, None] += second

    def _rows(self, layer: Layer, tensor: torch.Tensor) -> torch.Tensor:
        """Return a layer's input, output or gradient as [rows, tokens, units]."""
        rows = as_rows(tensor, layer.axes, *self.real.shape)
        if rows is None:
            raise ModelError(f"Layer {layer.index} ({layer.name}) does not keep rows and tokens apart.")
        return rows

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sums of values over the counted tokens of each row, float64[rows]."""
        return values.double().where(self.observed.to(values.device), 0).sum(dim=1)


@dataclass(frozen=True)
class _Displacement:
    """Difference of the hidden states without a layer.

    Attributes:
        removed: that layer.
        distances: values of ``m`` of `Damage` for which it is the difference; several after the last layer.
        difference: [rows, tokens, units].
    """

    removed: int
    distances: Sequence[int]
    difference: torch.Tensor


def _advanced(layer: Layer, call: LayerCall, hidden: torch.Tensor, forward: Callable[..., Any]) -> torch.Tensor:
    """Return a layer's output for other hidden states than those of its call."""
    moved = call.with_hidden(hidden.to(call.hidden.device))
    return _hidden(layer, forward(*moved.args, **moved.kwargs), hidden)


def _hidden(layer: Layer, output: Any, layer_input: torch.Tensor) -> torch.Tensor:
    """Return the hidden states of a layer's output."""
    out = first_tensor(output)
    if out is None or out.shape != layer_input.shape:
        raise ModelError(f"Layer {layer.index} ({layer.name}) does not keep the shape of its input.")
    return out


@contextmanager
def _watched(layers: Sequence[Layer]) -> Iterator[None]:
    """Have the current pass run the layers inside the context."""
    uses: defaultdict[nn.Module, list[Layer]] = defaultdict(list)
    for layer in layers:
        uses[layer.module].append(layer)

    def call(layers_of_module: Sequence[Layer], forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        current = WATCHED.get()
        return forward(*args, **kwargs) if current is None else current.call(layers_of_module, forward, args, kwargs)

    with around({module: partial(call, layers_of_module) for module, layers_of_module in uses.items()}):
        yield


def _rows(passes: Sequence[_Pass], predicted: Float64) -> Iterator[Row]:
    observed = np.concatenate([batch.observed.sum(dim=1).cpu().numpy() for batch in passes]).astype(np.float64)
    for key in sorted(passes[0].sums, key=lambda key: (key[1], key[2] or (), key[0])):
        metric, layer, block = key
        samples = torch.cat([batch.sums[key].flatten().cpu() for batch in passes]).numpy()
        weights = observed if metric.startswith((PROPAGATED, BLOCK_DISTANCE, BLOCK_COSINE)) else predicted
        yield Row(metric=metric, samples=samples, weights=weights, layer=layer, removed=block)
