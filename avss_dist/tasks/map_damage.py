"""Predicted change of the loss when small inputs of each linear map become zero, by one backward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import nn

from avss_dist.core.intervention import NO_INTERVENTION, Intervention
from avss_dist.core.registry import DRAWS
from avss_dist.core.settings import fingerprint
from avss_dist.corpus.shards import Shard
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.layers import Layer, Projection
from avss_dist.models.sparsifying import weight_of
from avss_dist.stats.layer_stats import Float64
from avss_dist.tasks.base import Row, predicted_tokens
from avss_dist.tasks.gradients import trainable
from avss_dist.tasks.watching import Watched, watched_maps

FIRST, SECOND = "first_order:", "second_order:"  # before the path of a map
Key = tuple[int, str]  # layer, and path of a linear map below it


@dataclass(frozen=True, eq=False, kw_only=True)
class MapDamage:
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

    shard: Shard
    thresholds: Mapping[Key, tuple[float, ...]] = field(repr=False)
    draws: int = DRAWS
    seed: int = 0

    @property
    def key(self) -> str:
        """See `tasks.base.Measure`."""
        thresholds = [[*key, *values] for key, values in sorted(self.thresholds.items())]
        options = {"draws": self.draws, "seed": self.seed, "thresholds": thresholds}
        return fingerprint(measure="map damage", shard=self.shard.content_hash, **options)

    def __call__(self, model: LanguageModel, intervention: Intervention = NO_INTERVENTION) -> list[Row]:
        """See `tasks.base.Measure`. Removed layers have no rows."""
        layers = [layer for layer in model.layers if layer.index not in intervention.removed]
        batches = list(self.shard.batches(model.settings.batch_size))
        passes = [_Pass(self.draws, self.thresholds) for _ in batches]
        maps = [(one, p) for one in layers for p in one.projections if (one.index, p.path) in self.thresholds]
        with model.applying(intervention), trainable(model.module, ()), watched_maps(maps):
            passes = model.backpropagate(batches, passes, draws=self.draws, seed=self.seed)
        tokens = float(predicted_tokens(self.shard, model).sum())
        return list(_rows(passes, tokens))


@dataclass
class _Pass(Watched):
    """Sums over one batch: float64[thresholds], by order and map."""

    draws: int
    thresholds: Mapping[Key, tuple[float, ...]]
    keeps: int = 2
    sums: dict[tuple[str, Key], torch.Tensor] = field(default_factory=dict)
    _gradients: Counter[Key] = field(default_factory=Counter)

    def see(self, layer: Layer, projection: Projection, x: torch.Tensor, out: torch.Tensor) -> None:
        """Register the input of a linear map that has run, and a hook for its gradient."""
        if not out.requires_grad:  # of the first layer: nothing before it has a gradient
            out.requires_grad_()
        key = layer.index, projection.path
        out.register_hook(partial(self._receive, key, projection.module, x.detach()))

    def _receive(self, key: Key, module: nn.Module, x: torch.Tensor, gradient: torch.Tensor) -> None:
        """Add a gradient at the output of a map: first that of the text's labels, then those of the draws."""
        number = self._gradients[key]
        self._gradients[key] += 1
        change = -self._cumulative_products(key, x, (gradient.detach() @ weight_of(module)).to(x.dtype))
        if number == 0:
            self.sums[FIRST, key] = change.sum(dim=0)
            return
        second = change.square().sum(dim=0) / (2 * self.draws)
        self.sums[SECOND, key] = self.sums[SECOND, key] + second if number > 1 else second

    def _cumulative_products(self, key: Key, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        """Return the sum of g x over the inputs up to each threshold, float64[tokens, thresholds]."""
        x, g = x.reshape(-1, x.shape[-1]).float(), g.reshape(-1, x.shape[-1]).float()
        edges = torch.tensor(self.thresholds[key], dtype=torch.float32, device=x.device)
        at = torch.bucketize(x.abs(), edges)
        sums = torch.zeros((len(x), len(edges) + 1), device=x.device).scatter_add_(1, at, g * x)
        return sums.double().cumsum(dim=1)[:, :-1]


def _rows(passes: Sequence[_Pass], tokens: float) -> Iterator[Row]:
    for order, key in passes[0].sums:
        samples: Float64 = np.sum([batch.sums[order, key].cpu().numpy() for batch in passes], axis=0)
        yield Row(metric=f"{order}{key[1]}", samples=samples, weights=np.full(len(samples), tokens), layer=key[0])
