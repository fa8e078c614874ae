"""Ground truth about layers: the loss without each, and what each adds to every set of others (its Shapley value)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from avss_dist.corpus.shards import Batch, Shard
from avss_dist.intervention import (
    NO_INTERVENTION,
    Intervention,
    Removals,
    can_be_added,
    encode_removals,
    sublayers_of,
)
from avss_dist.models.causal_lm import LanguageModel, predicted
from avss_dist.models.skipping import Recorded, recording, resuming
from avss_dist.names import LOSS
from avss_dist.settings import fingerprint
from avss_dist.stats.layer_stats import Float64
from avss_dist.tasks.base import Row, predicted_tokens

SHAPLEY = "shapley"  # nats per token; low is unimportant
SHARED = "shapley_shared"  # 1 of a permutation that was truncated before the layer, else 0
MOST_KEPT = 2 << 30  # bytes of hidden states


@dataclass(frozen=True, eq=False)
class LeaveOneOut:
    """The loss on a shard of text of the whole model, and without each layer: rows as `TextLoss` gives of each.

    A pass without a layer begins there, from the hidden states of the whole model's pass: of ``n`` passes, about half
    of what layers compute is left. A family in which that would not give the same is run from its first layer.

    Attributes:
        layers: layers and sublayers that are removed, one at a time; all layers by default.
        sublayers: by default all sublayers, in place of the layers.
    """

    shard: Shard
    layers: Removals | None = None
    sublayers: bool = False

    @property
    def key(self) -> str:
        """See `tasks.base.Measure`."""
        some: dict[str, Any] = {} if self.layers is None else {"layers": encode_removals(self.layers)}
        some |= {"sublayers": True} if self.sublayers else {}
        return fingerprint(measure="leave one out", shard=self.shard.content_hash, **some)

    def __call__(self, model: LanguageModel, intervention: Intervention = NO_INTERVENTION) -> list[Row]:
        """See `tasks.base.Measure`: removed layers are left out of all."""
        layers = range(len(model.layers))
        each = (sublayers_of(layers) if self.sublayers else layers) if self.layers is None else self.layers
        more = [intervention.without(one) for one in each if can_be_added(one, intervention.removed)]
        losses = model.losses_under(list(self.shard.batches(model.settings.batch_size)), [intervention, *more])
        weights = predicted_tokens(self.shard, model)
        return [
            Row(metric=LOSS, samples=samples, weights=weights, removed=without.removed)
            for without, samples in zip([intervention, *more], losses, strict=True)
        ]


@dataclass(frozen=True, eq=False, kw_only=True)
class Shapley:
    """Layer Shapley values by sampled permutations: Zhang, Dong and Kawaguchi, arXiv 2409.14381, section 3.

    The value of a set of layers is minus the loss, in nats per token, of the model with no other layers. Layers are
    removed one by one in a random order; a layer's contribution is the loss after its removal less that before it.
    Rows: `SHAPLEY` of each layer, a sample for each permutation, whose mean is the value; `SHARED` with truncation. The
    contributions of each permutation add up to the loss with no layer less that with all (efficiency).

    Attributes:
        shards: the text, all of it.
        seeds: of the permutations, one each.
        truncation: once the loss is no better than that of a uniform guess, ``log(vocabulary)``, stop. Layers that are
            left share alike what the loss with no layer is above that. It saves most of the work, and is a bias: which
            of them matters in a broken model is not seen. (The paper gives them 0, so that values do not add up.) A
            model that is no better than a guess to begin with is measured without truncation. Without it the estimate
            is unbiased.
    """

    shards: tuple[Shard, ...]
    seeds: tuple[int, ...]
    truncation: bool = True

    @property
    def key(self) -> str:
        """See `tasks.base.Measure`."""
        shards = [shard.content_hash for shard in self.shards]
        rest = {"rest": "shared"} if self.truncation else {}  # earlier versions gave it to no layer
        return fingerprint(measure="shapley", shards=shards, seeds=list(self.seeds), truncation=self.truncation, **rest)

    def __call__(self, model: LanguageModel, intervention: Intervention = NO_INTERVENTION) -> list[Row]:
        """See `tasks.base.Measure`: removed layers take no part."""
        players = [layer.index for layer in model.layers if layer.index not in intervention.removed]
        text = _Text(model, self.shards, intervention)
        values, shared = np.zeros((2, len(self.seeds), len(model.layers)))
        for contributions, unmeasured, seed in zip(values, shared, self.seeds, strict=True):
            order = np.random.default_rng(seed).permutation(players).tolist()
            losses = text.losses(order)
            before = next(losses)
            bound = self._bound(model, before)
            for place, layer in enumerate(order):
                if before >= bound:
                    rest = order[place:]
                    contributions[rest] = (text.without_all(players) - before) / len(rest)
                    unmeasured[rest] = len(rest) > 1
                    break
                after = next(losses)
                contributions[layer], before = after - before, after
        found = {SHAPLEY: values, **({SHARED: shared} if self.truncation else {})}
        ones = np.ones(len(self.seeds))
        return [
            Row(metric=metric, samples=samples[:, layer], weights=ones, layer=layer)
            for metric, samples in found.items()
            for layer in players
        ]

    def _bound(self, model: LanguageModel, whole: float) -> float:
        """Return the loss from which on a permutation is truncated; infinity where none is."""
        guess = math.log(model.module.config.get_text_config().vocab_size)
        return guess if self.truncation and whole < guess else math.inf


class _Text:
    """The loss on text as layers leave a model one by one.

    What each layer was given is kept for all of the text, twice, where it is no more than `MOST_KEPT`; a pass without
    one more layer begins there. Where ranks share the batches, it is kept by the rank that has the batch.
    """

    def __init__(self, model: LanguageModel, shards: Sequence[Shard], intervention: Intervention) -> None:
        self._model, self._intervention = model, intervention
        self._batches = [batch for shard in shards for batch in shard.batches(model.settings.batch_size)]
        self._tokens = float(sum(predicted(batch).sum() for batch in self._batches))
        size = sum(batch.input_ids.size for batch in self._batches) * model.token_bytes * len(model.layers)
        self._keeps = model.keeps_hidden_states and 2 * size <= MOST_KEPT and model.resumes
        self._kept: dict[int, Recorded] = {}  # of the whole model, by the batch's id
        self._empty: float | None = None

    @cached_property
    def _whole(self) -> float:
        with self._model.applying(self._intervention):
            return self._mean(self._model.each(self._record if self._keeps else self._model.losses, self._batches))

    def without_all(self, players: Sequence[int]) -> float:
        """Return the nats per token without any of the layers; measured once."""
        if self._empty is None:
            with self._model.applying(self._intervention.without(*players)):
                self._empty = self._mean(self._model.each(self._model.losses, self._batches))
        return self._empty

    def losses(self, order: Sequence[int]) -> Iterator[float]:
        """Nats per token with all layers, without the first of ``order``, without the first two, ..."""
        yield self._whole
        recorded = {batch: Recorded(dict(one.inputs), one.forms) for batch, one in self._kept.items()}
        for number, layer in enumerate(order):
            ask = partial(self._resumed, recorded, layer) if self._keeps else self._model.losses
            with self._model.applying(self._intervention.without(*order[: number + (not self._keeps)])):
                found = self._model.each(ask, self._batches)
            yield self._mean(found)

    def _record(self, batch: Batch) -> Float64:
        with recording(self._model.layers) as self._kept[id(batch)]:
            return self._model.losses(batch)

    def _resumed(self, recorded: Mapping[int, Recorded], layer: int, batch: Batch) -> Float64:
        layers, of_batch = self._model.layers, recorded[id(batch)]
        with resuming(layers, layer, of_batch), recording(layers[layer + 1 :]) as later:
            losses = self._model.losses(batch)
        of_batch.inputs.update(later.inputs)
        return losses

    def _mean(self, losses: Sequence[Float64]) -> float:
        return float(np.concatenate(losses).sum() / self._tokens)
