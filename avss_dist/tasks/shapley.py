"""Layer Shapley values: the ground truth of layer importance over all sets of layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch

from avss_dist.core.intervention import NO_INTERVENTION, Intervention
from avss_dist.core.streams import portion
from avss_dist.core.values import NewObject
from avss_dist.corpus.shards import Batch, Shard
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.change.skipping import resumption
from avss_dist.models.forward import changing
from avss_dist.models.predictions import predicted
from avss_dist.models.watching import recording
from avss_dist.stats.layer_stats import Float64
from avss_dist.tasks.task import Measure, MetricRow

SHAPLEY = "shapley"  # nats per token; low is unimportant
SHARED = "shapley_shared"  # 1 of a permutation that was truncated before the layer, else 0
MAX_RECORDED_BYTES = 2 << 30  # of hidden states


@dataclass(frozen=True, eq=False, kw_only=True)
class Shapley(Measure):
    """Layer Shapley values by sampled permutations: Zhang, Dong and Kawaguchi, arXiv 2409.14381, section 3.

    The value of a set of layers is minus the loss, in nats per token, of the model with only these layers. Layers are
    removed one by one in a random order; a layer's contribution is the loss after its removal minus that before it.
    Rows: `SHAPLEY` of each layer, a sample for each permutation, whose mean is the value; `SHARED` with truncation. The
    contributions of a permutation sum to the loss without layers minus that with all layers (efficiency).

    Attributes:
        shards: all shards of the text.
        seeds: seeds of the permutations, one for each.
        truncation: stop once the loss reaches that of a uniform guess, ``log(vocabulary)``; the remaining layers share
            the rest of the loss equally. This saves most of the work, and is a bias: the order of the remaining layers
            in a broken model is not measured. (The paper gives them 0, which violates efficiency.) A model that starts
            no better than a guess is measured without truncation. Without truncation the estimate is unbiased.
    """

    shards: tuple[Shard, ...]
    seeds: tuple[int, ...]
    truncation: bool = True
    measure = "shapley"

    def identity(self) -> NewObject:
        """Return the values that the key is made of: earlier versions gave the rest to no layer."""
        identity = super().identity()
        if self.truncation:
            identity["rest"] = "shared"
        return identity

    def __call__(self, model: LanguageModel, intervention: Intervention = NO_INTERVENTION) -> list[MetricRow]:
        """Return the Shapley values of the layers, a sample for each permutation.

        Removed layers have no rows.
        """
        players = [layer.index for layer in model.layers if layer.index not in intervention.removed]
        text = _Text(model, self.shards, intervention, players)
        contributions = np.zeros((len(self.seeds), len(model.layers)))
        shared = np.zeros((len(self.seeds), len(model.layers)))
        guess = math.log(model.module.config.get_text_config().vocab_size)
        for number, seed in enumerate(self.seeds):
            order = np.random.default_rng(seed).permutation(players).tolist()
            with portion(number / len(self.seeds), 1 / len(self.seeds)):
                self._remove_in_order(text, order, guess, contributions[number], shared[number])
        metrics = {SHAPLEY: contributions}
        if self.truncation:
            metrics[SHARED] = shared
        ones = np.ones(len(self.seeds))
        rows = []
        for metric, samples in metrics.items():
            for layer in players:
                rows.append(MetricRow(metric=metric, samples=samples[:, layer], weights=ones, layer=layer))
        return rows

    def _remove_in_order(
        self, text: _Text, order: Sequence[int], guess: float, contributions: Float64, shared: Float64
    ) -> None:
        """Remove layers one by one, and note what each contributes.

        Args:
            guess: loss of a uniform guess, in nats per token.
            contributions: float64[layers], to be filled.
            shared: float64[layers], in which layers whose contributions are not told apart become 1.
        """
        losses = text.losses(order)
        steps = 1 + len(order)
        with portion(0, 1 / steps):
            before = next(losses)
        bound = math.inf
        if self.truncation and before < guess:
            bound = guess
        for place, layer in enumerate(order):
            if before >= bound:
                remaining = order[place:]
                contributions[remaining] = (text.empty - before) / len(remaining)
                shared[remaining] = len(remaining) > 1
                return
            with portion((1 + place) / steps, 1 / steps):
                after = next(losses)
            contributions[layer] = after - before
            before = after


class _Text:
    """Text whose loss is measured as layers are removed one by one.

    The inputs of all layers are recorded for the whole text, if two copies fit in `MAX_RECORDED_BYTES`; a pass without
    one more layer resumes from them. If ranks share the batches, each rank records its own.
    """

    def __init__(
        self, model: LanguageModel, shards: Sequence[Shard], intervention: Intervention, players: Sequence[int]
    ) -> None:
        self._model = model
        self._intervention = intervention
        self._players = players
        self._batches: list[Batch] = []
        for shard in shards:
            self._batches += shard.batches(model.settings.batch_size)
        self._tokens = float(sum(predicted(batch).sum() for batch in self._batches))
        positions = sum(batch.input_ids.size for batch in self._batches)
        recorded_bytes = positions * model.token_bytes * len(model.layers)
        fits = 2 * recorded_bytes <= MAX_RECORDED_BYTES
        self._keeps = model.keeps_hidden_states and fits and model.resumes
        self._inputs: dict[int, dict[int, torch.Tensor]] = {}  # of layers of the whole model, by the batch's id

    @cached_property
    def _whole(self) -> float:
        if self._keeps:
            return self._loss((), self._record)
        return self._loss((), self._model.losses)

    @cached_property
    def empty(self) -> float:
        """Nats per token without any of the layers."""
        return self._loss(self._players, self._model.losses)

    def losses(self, order: Sequence[int]) -> Iterator[float]:
        """Yield the nats per token with all layers, without the first of ``order``, without the first two, ..."""
        yield self._whole
        inputs = {batch: dict(whole) for batch, whole in self._inputs.items()}
        for number, layer in enumerate(order):
            if self._keeps:  # the pass begins behind this layer
                yield self._loss(order[:number], partial(self._resumed, inputs, layer))
            else:
                yield self._loss(order[: number + 1], self._model.losses)

    def _loss(self, removed: Sequence[int], measure: Callable[[Batch], Float64]) -> float:
        """Return the nats per token without some layers, from the losses of a batch's rows."""
        with self._model.applying(self._intervention.without(*removed)):
            by_batch = self._model.each(measure, self._batches, "Removing layers in random orders")
        return float(np.concatenate(by_batch).sum() / self._tokens)

    def _record(self, batch: Batch) -> Float64:
        with recording(self._model.layers) as self._inputs[id(batch)]:
            return self._model.losses(batch)

    def _resumed(self, inputs: Mapping[int, dict[int, torch.Tensor]], layer: int, batch: Batch) -> Float64:
        layers = self._model.layers
        states = inputs[id(batch)]
        first_input = states.pop(layer).clone()
        with changing(resumption(layers, layer, first_input)), recording(layers[layer + 1 :]) as later:
            losses = self._model.losses(batch)
        states.update(later)
        return losses
