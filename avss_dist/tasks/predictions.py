"""Predictions of a shard of text in short form, which students of the model learn from."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import numpy as np

from avss_dist.core.intervention import NO_INTERVENTION, Intervention
from avss_dist.core.names import LOSS, OTHERS
from avss_dist.core.settings import fingerprint
from avss_dist.corpus.shards import Shard
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.stats.predictions import TopPredictions, join
from avss_dist.tasks.base import Row, predicted_tokens


@dataclass(frozen=True, eq=False, kw_only=True)
class TextPredictions:
    """Measure of the most probable tokens at each position of a shard; a sample is a sequence.

    Its rows are the loss, which carries the predictions, and the probability of all other tokens.

    Attributes:
        top: number of tokens; at most the vocabulary.
        draws: number of tokens that are drawn from the others at each position.
    """

    shard: Shard = field(repr=False)
    top: int
    draws: int

    @property
    def key(self) -> str:
        """See `tasks.base.Measure`."""
        return fingerprint(measure="predictions", shard=self.shard.content_hash, top=self.top, draws=self.draws)

    def __call__(self, model: LanguageModel, intervention: Intervention = NO_INTERVENTION) -> list[Row]:
        """See `tasks.base.Measure`."""
        batches = list(self.shard.batches(model.settings.batch_size))
        weights = predicted_tokens(self.shard, model)
        with model.applying(intervention):
            measured = model.each(partial(model.top_predictions, top=self.top, draws=self.draws), batches)
        predictions = join([part for _, part in measured], [len(batch.input_ids) for batch in batches])
        losses = np.concatenate([losses for losses, _ in measured])
        return [
            Row(metric=LOSS, samples=losses, weights=weights, predictions=predictions),
            Row(metric=OTHERS, samples=_others(predictions, len(weights)), weights=weights),
        ]


def _others(predictions: TopPredictions, rows: int) -> np.ndarray:
    """Return the summed probability of the other tokens over the positions of each row, float64[rows]."""
    return np.bincount(predictions.row, np.exp(predictions.others.astype(np.float64)), minlength=rows)
