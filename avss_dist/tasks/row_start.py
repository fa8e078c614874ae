"""Test whether a model expects other special tokens at the start of a text than the rows of a corpus have."""

from __future__ import annotations

from dataclasses import dataclass

from avss_dist.core.intervention import NO_INTERVENTION, Intervention
from avss_dist.core.settings import fingerprint
from avss_dist.corpus.shards import Shard
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.stats.metrics import AS_READ, OTHER_START
from avss_dist.tasks.base import Row, predicted_tokens


@dataclass(frozen=True, eq=False)
class RowStartLoss:
    """Loss on rows as they were read, and on the same text with other start tokens: a sample for each row."""

    as_read: Shard
    other: Shard

    @property
    def key(self) -> str:
        """See `tasks.base.Measure`."""
        return fingerprint(measure="row start", shards=[self.as_read.content_hash, self.other.content_hash])

    def __call__(self, model: LanguageModel, intervention: Intervention = NO_INTERVENTION) -> list[Row]:
        """See `tasks.base.Measure`."""
        rows = []
        for metric, shard in ((AS_READ, self.as_read), (OTHER_START, self.other)):
            (losses,) = model.losses_under(list(shard.batches(model.settings.batch_size)), [intervention])
            rows.append(Row(metric=metric, samples=losses, weights=predicted_tokens(shard, model)))
        return rows
