"""Predictions after each layer by the logit lens, and the shape of the hidden states before it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from avss_dist.core.intervention import NO_INTERVENTION, Intervention
from avss_dist.core.settings import fingerprint
from avss_dist.corpus.shards import Batch, Shard
from avss_dist.models.causal_lm import LanguageModel, predicted
from avss_dist.models.layers import as_rows
from avss_dist.stats.layer_stats import Float64
from avss_dist.tasks.base import Row, predicted_tokens

GAIN, SETTLES = "lens_gain", "lens_settles"
RANK, KURTOSIS, LARGEST, LARGEST_FIRST = "effective_rank", "kurtosis", "largest_unit", "largest_unit_first"
METRICS = (GAIN, SETTLES, RANK, KURTOSIS, LARGEST, LARGEST_FIRST)
TINY = 1e-12  # added to a variance that may be zero


@dataclass(frozen=True, eq=False)
class Lens:
    """Logit lens of each layer, and the shape of its input, with a sample for each sequence.

    The logit lens after a layer predicts the next token from its output, by the model's final norm and head
    (nostalgebraist, "interpreting GPT: the logit lens", 2020): the model without all later layers.

    - ``lens_gain``: the loss of the lens before the layer minus that after it, in nats per predicted token. The gains
      of all layers add up to the loss without any layer minus that of the model.
    - ``lens_settles``: the share of predicted tokens whose most probable next token is the model's own after this
      layer and after all later ones, but not after the one before. The shares add up to 1, with those that the
      embedding alone predicts.
    - ``effective_rank``: the exponential of the entropy of the normalized singular values of the centered hidden states
      [tokens, units] of a sequence (Roy and Vetterli, EUSIPCO 2007).
    - ``kurtosis``: the fourth central moment over the units of a token, over the squared variance; a mean over tokens.
    - ``largest_unit``, ``largest_unit_first``: the largest absolute value over the units of a token, over their root
      mean square; a mean over tokens, and of the first token of each row (massive activations, arXiv 2402.17762).
    """

    shard: Shard

    @property
    def key(self) -> str:
        """See `tasks.base.Measure`."""
        return fingerprint(measure="lens", shard=self.shard.content_hash)

    def __call__(self, model: LanguageModel, intervention: Intervention = NO_INTERVENTION) -> list[Row]:
        """See `tasks.base.Measure`. Removed layers have no rows."""
        layers = [layer.index for layer in model.layers if layer.index not in intervention.removed]
        without = [intervention.without(*layers[place:]) for place in reversed(range(len(layers)))]
        batches = list(self.shard.batches(model.settings.batch_size))
        by_batch = model.each(partial(_measure, model, [intervention, *without], layers), batches)
        return list(_rows(by_batch, layers, predicted_tokens(self.shard, model)))


Sums = dict[tuple[str, int], tuple[Float64, Float64 | None]]
"""Samples of the rows of a batch, and their weights, by metric and layer; None stands for the predicted tokens."""


def _measure(model: LanguageModel, interventions: Sequence[Intervention], layers: Sequence[int], batch: Batch) -> Sums:
    """Measure one batch.

    Args:
        interventions: that of the cell, then without the last layer, the last two and so on.
    """
    (whole, *lenses), recorded = model.measured_under(interventions, batch, model.losses_and_top_tokens, layers)
    sums: Sums = {}
    for layer, hidden in recorded.inputs.items():
        sums |= _shapes(layer, as_rows(hidden, model.layers[layer].axes, *batch.input_ids.shape), batch)
    settled = predicted(batch)  # after the layer that comes next, and all later ones
    after = whole[0].sum(axis=1)
    for layer, (losses, tops) in zip(reversed(layers), lenses, strict=True):
        before = losses.sum(axis=1)
        sums[GAIN, layer] = before - after, None
        still = settled & (tops == whole[1])
        sums[SETTLES, layer] = (settled & ~still).sum(axis=1).astype(np.float64), None
        settled, after = still, before
    return sums


def _shapes(layer: int, hidden: torch.Tensor | None, batch: Batch) -> Sums:
    """Return the measures of the hidden states before a layer, [rows, tokens, units]; none if rows are not apart."""
    if hidden is None:
        return {}
    observed = torch.from_numpy(batch.observed).to(hidden.device)
    states = hidden.double()
    tokens = observed.sum(dim=1).cpu().numpy().astype(np.float64)
    centered = states - states.mean(dim=2, keepdim=True)
    variance = centered.square().mean(dim=2)
    kurtosis = centered.pow(4).mean(dim=2) / (variance + TINY).square()
    largest = states.abs().amax(dim=2) / (states.square().mean(dim=2) + TINY).sqrt()

    def summed(values: torch.Tensor) -> Float64:
        sums: Float64 = values.where(observed, 0).sum(dim=1).cpu().numpy()
        return sums

    ones = np.ones(len(tokens))
    ranks = [_effective_rank(rows[mask]) for rows, mask in zip(states, observed, strict=True)]
    return {
        (KURTOSIS, layer): (summed(kurtosis), tokens),
        (LARGEST, layer): (summed(largest), tokens),
        (LARGEST_FIRST, layer): (largest[:, 0].cpu().numpy(), ones),
        (RANK, layer): (np.array(ranks), ones),
    }


def _effective_rank(states: torch.Tensor) -> float:
    """Return the effective rank of hidden states, [tokens, units], about their mean."""
    if len(states) < 2:
        return 1.0
    values = torch.linalg.svdvals(states - states.mean(dim=0))
    total = float(values.sum())
    if total <= 0:
        return 1.0
    shares = values / total
    return float(torch.special.entr(shares).sum().exp())


def _rows(by_batch: Sequence[Sums], layers: Sequence[int], predicted_numbers: Float64) -> Iterator[Row]:
    """Yield a row for each metric and layer that every batch has."""
    samples: dict[tuple[str, int], list[tuple[Float64, Float64 | None]]] = defaultdict(list)
    for sums in by_batch:
        for key, values in sums.items():
            samples[key].append(values)
    for metric in METRICS:
        for layer in layers:
            parts = samples.get((metric, layer), [])
            if len(parts) < len(by_batch):
                continue
            weights = [weight for _, weight in parts if weight is not None]
            yield Row(
                metric=metric,
                samples=np.concatenate([values for values, _ in parts]),
                weights=np.concatenate(weights) if weights else predicted_numbers,
                layer=layer,
            )
