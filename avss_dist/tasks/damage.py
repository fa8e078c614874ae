"""What leaving a layer out does to the hidden states a few layers later, and, by their gradients, to the loss.

One pass sees it all: as a layer runs on the hidden states of the whole model, it also runs on those of the models that
lack one of the layers before it. Such a model is followed for ``lookahead`` layers.
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

from avss_dist.corpus.shards import Batch, Shard
from avss_dist.errors import ModelError
from avss_dist.intervention import NO_INTERVENTION, Intervention
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.layers import Layer, LayerCall, as_rows, first_tensor
from avss_dist.models.skipping import replaced_forwards
from avss_dist.registry import BLOCK_DISTANCE, SCORES
from avss_dist.settings import DRAWS, fingerprint
from avss_dist.stats.layer_stats import Float64
from avss_dist.tasks.base import Row, predicted_tokens
from avss_dist.tasks.gradients import trainable
from avss_dist.tasks.watching import WATCHED, Watched

LOOKAHEAD = max(info.lookahead for info in SCORES.values() if info.lookahead is not None)  # layers
TOGETHER = 1  # layers later: where products of two layers chose the best sets, of 0 to 3
PROPAGATED, PROPAGATED_COSINE = "propagated", "propagated_cosine"
TAYLOR, SIGNED, FISHER, PREDICTED, GATE = "taylor", "taylor_signed", "fisher", "predicted", "gate"
INTERACTION, BLOCK_COSINE = "interaction", "block_cosine"


@dataclass(frozen=True, eq=False, kw_only=True)
class Damage:
    """What leaving out each layer does, seen ``m`` layers later, for every ``m`` from 0 to ``lookahead``.

    With x the hidden states after the layer ``m`` layers later (after the last one, where there are fewer), x' what
    they are without this layer, d = x' - x, and g the gradient of the summed loss at x, in nats; rows of each layer,
    a sample for each sequence:

    - ``propagated_m``: the sum over tokens of ``|d| / |x|``, per token.
    - ``propagated_cosine_m``: that of ``1 - cos(x', x)``.
    - ``taylor_m``, ``taylor_signed_m``: the sum over tokens of ``|<g, d>|``, and of ``<g, d>``, per predicted token:
      what the loss changes by, to first order (``m`` = 0: Molchanov et al., arXiv 1906.10771, section 3.1).
    - ``fisher_m``: half the sum over tokens of ``<g, d>^2`` where g is of labels that are drawn from the model's own
      prediction, a mean over draws: the second order, by the Fisher information (Michel et al., arXiv 1905.10650).
    - ``predicted_m``: ``taylor_signed_m + fisher_m``, the predicted increase of the loss in nats per predicted token.
    - ``gate_m``: the sum over tokens of ``<g, d>``, a sample for each sequence and draw.

    Of every two layers, ``drop``: ``interaction``, the sum over tokens of the product of their ``<g, d>`` at ``m`` =
    `TOGETHER`, a mean over draws, per predicted token. That of a layer with itself is twice ``fisher_m``.

    And of every block of layers, ``drop``, that begins with a layer: ``block_distance`` and ``block_cosine``, the mean
    over tokens of ``acos(cos) / pi`` and of ``1 - cos`` of what it is given and what it gives (Gromov et al., arXiv
    2403.17887, section 3).

    Attributes:
        lookahead: layers.
        draws: of labels; None takes no gradients, and gives only what needs none.
        seed: of the labels.
    """

    shard: Shard
    lookahead: int = LOOKAHEAD
    draws: int | None = DRAWS
    seed: int = 0

    @property
    def key(self) -> str:
        """See `tasks.base.Measure`."""
        how = {"lookahead": self.lookahead, "draws": self.draws, "seed": self.seed if self.draws else 0}
        return fingerprint(measure="damage", shard=self.shard.content_hash, **how)

    def __call__(self, model: LanguageModel, intervention: Intervention = NO_INTERVENTION) -> list[Row]:
        """See `tasks.base.Measure`: removed layers are left out of all."""
        layers = [layer for layer in model.layers if layer.index not in intervention.removed]
        batches = list(self.shard.batches(model.settings.batch_size))

        def begin(batch: Batch) -> _Pass:
            return _Pass.of(batch, layers, self.lookahead, self.draws, model.device)

        with model.applying(intervention), trainable(model.module, ()), _watched(layers):
            if self.draws is None:
                passes = model.each(lambda batch: begin(batch).forward(model, batch), batches)
            else:
                passes = model.backpropagate(batches, list(map(begin, batches)), draws=self.draws, seed=self.seed)
        return list(_rows(passes, predicted_tokens(self.shard, model)))


Key = tuple[str, int, tuple[int, ...] | None]  # metric, layer, and the layers of a block that begins with it


@dataclass
class _Pass(Watched):
    """What is gathered of one batch.

    Attributes:
        observed, real: bool[rows, tokens]; tokens that count, and that gradients flow from.
        order: the layers that run.
        draws: None is without gradients.
        found: float64[rows], or float64[rows x draws] of gates.
    """

    observed: torch.Tensor
    real: torch.Tensor
    order: Sequence[int]
    lookahead: int
    draws: int | None
    found: dict[Key, torch.Tensor] = field(default_factory=dict)
    _calls: Counter[int] = field(default_factory=Counter)  # of modules, by the first layer that each is
    _without: dict[int, torch.Tensor] = field(default_factory=dict)  # hidden states, by the layer that is left out
    _streams: list[torch.Tensor] = field(default_factory=list)  # [rows, tokens, units] before each layer, and the last
    _displaced: dict[int, list[_Displaced]] = field(default_factory=dict)  # by the layer after which it is seen
    _products: dict[int, list[torch.Tensor]] = field(default_factory=dict)  # [rows, tokens] of each draw, by layer
    _gradients: Counter[int] = field(default_factory=Counter)  # that came to a layer

    @staticmethod
    def of(batch: Batch, layers: Sequence[Layer], lookahead: int, draws: int | None, device: torch.device) -> _Pass:
        observed, real = (torch.from_numpy(mask).to(device) for mask in (batch.observed, batch.attention_mask))
        return _Pass(observed, real, [layer.index for layer in layers], lookahead, draws)

    @property
    def keeps(self) -> int:
        """See `causal_lm.Watching`."""
        return self.lookahead + 2

    def forward(self, model: LanguageModel, batch: Batch) -> _Pass:
        """A pass without gradients."""
        with self.watch(), torch.no_grad():
            model.hidden_states(batch)
        return self

    def call(self, uses: Sequence[Layer], forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a layer, and models without a layer before it; where it runs again for its gradients, it alone."""
        number = self._calls[uses[0].index]
        layer = uses[number % len(uses)]
        self._calls[uses[0].index] += 1
        if number < len(uses):
            with torch.no_grad():
                call = LayerCall(args, kwargs)
                given = call.hidden.detach().clone()  # which a layer may change
                models = {of: _advanced(layer, call, hidden, forward) for of, hidden in self._without.items()}
            output = forward(*args, **kwargs)
            with torch.no_grad():
                self._compare(layer, {**models, layer.index: given}, _hidden(layer, output, given))
        else:
            output = forward(*args, **kwargs)
        if torch.is_grad_enabled():
            out = first_tensor(output)
            assert out is not None
            if not out.requires_grad:  # of the first layer: nothing before it has a gradient
                out.requires_grad_()
            out.register_hook(partial(self._receive, layer))
        return output

    def _advance(
        self, layer: Layer, call: LayerCall, hidden: torch.Tensor, forward: Callable[..., Any]
    ) -> torch.Tensor:
        moved = call.given(hidden.to(call.hidden.device))
        return _hidden(layer, forward(*moved.args, **moved.kwargs), hidden)

    def _compare(self, layer: Layer, models: dict[int, torch.Tensor], out: torch.Tensor) -> None:
        """Compare models without a layer with the whole one, after a layer; the newest began here."""
        whole = self._rows(layer, out)
        self._streams += [] if self._streams else [self._rows(layer, models[layer.index])]
        self._streams.append(whole.clone())  # which the next layer may change
        at, last = self.order.index(layer.index), layer.index == self.order[-1]
        self._without = {}
        for of, hidden in models.items():
            after = at - self.order.index(of)
            seen_as = range(after, self.lookahead + 1) if last else (after,)
            here = self._rows(layer, hidden.to(out.device))
            self._measure_distance(of, seen_as, here, whole)
            if self.draws is not None:
                displaced = _Displaced(of, seen_as, (here.float() - whole.float()).to(whole.dtype))
                self._displaced.setdefault(layer.index, []).append(displaced)
            if after < self.lookahead:
                self._without[of] = hidden
        if last:
            self._without = {}
            self._measure_blocks()

    def _measure_distance(self, of: int, seen_as: Sequence[int], here: torch.Tensor, whole: torch.Tensor) -> None:
        one, other = here.float(), whole.float()
        size = torch.linalg.vector_norm(other, dim=-1).clamp_min_(torch.finfo(torch.float32).tiny)
        relative = torch.linalg.vector_norm(one - other, dim=-1) / size
        cosine = 1 - torch.cosine_similarity(one, other, dim=-1)
        for m in seen_as:
            self.found[f"{PROPAGATED}_{m}", of, None] = self._sum(relative)
            self.found[f"{PROPAGATED_COSINE}_{m}", of, None] = self._sum(cosine)

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
                self.found[BLOCK_DISTANCE, layer, block] = self._sum(distances[..., start, end])
                self.found[BLOCK_COSINE, layer, block] = self._sum(1 - cosines[..., start, end])

    def _receive(self, layer: Layer, gradient: torch.Tensor) -> None:
        """Take the gradient at what a layer gives: first of the text's labels, then of each draw's."""
        number = self._gradients[layer.index]
        self._gradients[layer.index] += 1
        assert self.draws is not None
        g = self._rows(layer, gradient.detach()).float()
        displaced = self._displaced[layer.index]
        if number == self.draws:
            del self._displaced[layer.index]
        for one in displaced:
            products = (g * one.by.float()).sum(dim=-1).double().where(self.real.to(g.device), 0)
            for m in one.seen_as:
                self._project(one.of, m, number, products)
        if self._products and number == self.draws and layer.index == self.order[0]:
            self._measure_interactions()

    def _project(self, of: int, m: int, number: int, products: torch.Tensor) -> None:
        """Take the products <g, d> of all tokens, [rows, tokens], of one set of labels."""
        total = products.sum(dim=1)
        if number == 0:
            self.found[f"{TAYLOR}_{m}", of, None] = products.abs().sum(dim=1)
            for metric in (SIGNED, PREDICTED):
                self.found[f"{metric}_{m}", of, None] = total.clone()
            return
        assert self.draws is not None
        second = products.square().sum(dim=1) / (2 * self.draws)
        fisher, gate = (f"{FISHER}_{m}", of, None), (f"{GATE}_{m}", of, None)
        self.found[fisher] = self.found[fisher] + second if number > 1 else second
        self.found[f"{PREDICTED}_{m}", of, None] += second
        if m == min(TOGETHER, self.lookahead):
            self._products.setdefault(of, []).append(products)
        if number == 1:
            self.found[gate] = total.new_zeros((len(total), self.draws))
        self.found[gate][:, number - 1] = total

    def _measure_interactions(self) -> None:
        """Of all draws, when they have come back to the first layer."""
        by_layer = [torch.cat(self._products[of], dim=1).to(self.real.device) for of in self.order]
        values = torch.stack(by_layer, dim=1)  # [rows, layers, draws x tokens]
        products = values @ values.transpose(1, 2) / len(self._products[self.order[0]])
        for i, one in enumerate(self.order):
            for j, other in enumerate(self.order[i + 1 :], i + 1):
                self.found[INTERACTION, one, (one, other)] = products[:, i, j]
        self._products = {}

    def _rows(self, layer: Layer, tensor: torch.Tensor) -> torch.Tensor:
        """[rows, tokens, units]"""
        rows = as_rows(tensor, layer.axes, *self.real.shape)
        if rows is None:
            raise ModelError(f"Layer {layer.index} ({layer.name}) does not keep rows and tokens apart.")
        return rows

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        """float64[rows], over the tokens that count."""
        return values.double().where(self.observed.to(values.device), 0).sum(dim=1)


@dataclass(frozen=True)
class _Displaced:
    """By how much hidden states differ, [rows, tokens, units], without the layer ``of``; ``m`` of `Damage`."""

    of: int
    seen_as: Sequence[int]
    by: torch.Tensor


def _advanced(layer: Layer, call: LayerCall, hidden: torch.Tensor, forward: Callable[..., Any]) -> torch.Tensor:
    """What a layer gives of other hidden states than it was called with."""
    moved = call.given(hidden.to(call.hidden.device))
    return _hidden(layer, forward(*moved.args, **moved.kwargs), hidden)


def _hidden(layer: Layer, output: Any, given: torch.Tensor) -> torch.Tensor:
    """The hidden states that a layer gives."""
    out = first_tensor(output)
    if out is None or out.shape != given.shape:
        raise ModelError(f"Layer {layer.index} ({layer.name}) does not keep the shape of its input.")
    return out


@contextmanager
def _watched(layers: Sequence[Layer]) -> Iterator[None]:
    """Inside, the pass that is watched runs the layers."""
    uses: defaultdict[nn.Module, list[Layer]] = defaultdict(list)
    for layer in layers:
        uses[layer.module].append(layer)

    def call(of: Sequence[Layer], forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        watching = WATCHED.get()
        return forward(*args, **kwargs) if watching is None else watching.call(of, forward, args, kwargs)

    with replaced_forwards({module: partial(call, of, module.forward) for module, of in uses.items()}):
        yield


def _rows(passes: Sequence[_Pass], predicted: Float64) -> Iterator[Row]:
    observed = np.concatenate([one.observed.sum(dim=1).cpu().numpy() for one in passes]).astype(np.float64)
    for key in sorted(passes[0].found, key=lambda key: (key[1], key[2] or (), key[0])):
        metric, layer, block = key
        samples = torch.cat([one.found[key].flatten().cpu() for one in passes]).numpy()
        if metric.startswith(GATE):
            weights = np.ones(len(samples))
        else:
            weights = observed if metric.startswith((PROPAGATED, BLOCK_DISTANCE, BLOCK_COSINE)) else predicted
        yield Row(metric=metric, samples=samples, weights=weights, layer=layer, removed=block)
