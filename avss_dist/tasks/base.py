"""Tasks of a language model, split into parts; the rows that a part gives, and the results of all parts together.

A part is measured by a `Measure`, which is sent to a worker and gives rows of samples. Samples are kept, so that means,
errors and paired intervals are computed afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from avss_dist.corpus.shards import Shard
from avss_dist.intervention import NO_INTERVENTION, Intervention, InterventionKey, Removals
from avss_dist.models.causal_lm import LanguageModel, predicted
from avss_dist.names import ENTROPY, LOSS
from avss_dist.settings import fingerprint
from avss_dist.stats.layer_stats import Float64


@dataclass(frozen=True, eq=False, kw_only=True)
class Row:
    """One metric of one part of a task.

    Attributes:
        metric: its name.
        samples: float64[n], a value for each sample; of `LOSS`, its summed negative log-likelihood.
        weights: float64[n], what each counts: the value is ``sum(samples) / sum(weights)``.
        removed: the layers and sublayers that were removed; None is those of the cell.
        layer: the layer that it is about; None where it is about the whole.
        patch: weights that were fitted, as `patching.encode_patch` encodes them; None where nothing is fitted.
    """

    metric: str
    samples: Float64
    weights: Float64
    removed: Removals | None = None
    layer: int | None = None
    patch: bytes | None = field(default=None, repr=False)


class Measure(Protocol):
    """One part of a task. It is pickled, and equal ones are the same work: ``key`` says what it is."""

    @property
    def key(self) -> str:
        """SHA-256, in hex, of all that can change what it gives."""

    def __call__(self, model: LanguageModel, intervention: Intervention = NO_INTERVENTION) -> list[Row]:
        """Measure a model under an intervention.

        Args:
            intervention: the layers that are removed, which the measure applies: it may remove others, too. Weights
                and sparsity of a cell are in effect already.
        """


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task: its name, its parts in order, and the options that made them, which are stored with its results."""

    name: str
    parts: tuple[Measure, ...]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """SHA-256, in hex, of its parts."""
        return fingerprint(parts=[part.key for part in self.parts])


@dataclass(frozen=True, eq=False)
class TextLoss:
    """The loss on a shard of text, a sample for each sequence; of paired text, the entropy of predictions too."""

    shard: Shard

    @property
    def key(self) -> str:
        """See `Measure`."""
        measure = "loss and entropy" if self.shard.pairing else "loss"
        return fingerprint(measure=measure, shard=self.shard.content_hash)

    def __call__(self, model: LanguageModel, intervention: Intervention = NO_INTERVENTION) -> list[Row]:
        """See `Measure`."""
        batches = list(self.shard.batches(model.settings.batch_size))
        weights = predicted_tokens(self.shard, model)
        if not self.shard.pairing:
            (losses,) = model.losses_under(batches, [intervention])
            return [Row(metric=LOSS, samples=losses, weights=weights)]
        with model.applying(intervention):
            found = np.concatenate(model.each(model.losses_and_entropies, batches), axis=1)
        return [Row(metric=name, samples=of, weights=weights) for name, of in zip((LOSS, ENTROPY), found, strict=True)]


def predicted_tokens(shard: Shard, model: LanguageModel) -> Float64:
    """float64[sequences]: how many tokens of each sequence are predicted."""
    batches = shard.batches(model.settings.batch_size)
    return np.concatenate([predicted(batch).sum(axis=1) for batch in batches]).astype(np.float64)


@dataclass(frozen=True, eq=False)
class Result:
    """A metric of a task, over all of its parts.

    Attributes:
        intervention: what was changed in the model; its patch is the one that was fitted, of a task that fits one.
        layer: the layer that it is about; None where it is about the whole.
        value, stderr: the weighted mean of the samples, and its standard error.
        samples, weights: of all parts, in their order.
    """

    metric: str
    intervention: InterventionKey
    layer: int | None
    samples: Float64 = field(repr=False)
    weights: Float64 = field(repr=False)

    @property
    def removed(self) -> Removals:
        """Layers and sublayers that were removed."""
        return self.intervention.removed

    @property
    def value(self) -> float:
        """``sum(samples) / sum(weights)``."""
        return float(self.samples.sum() / self.weights.sum())

    @property
    def left_out(self) -> Float64:
        """float64[n], the value without each sample; NaN where no weight is left."""
        with np.errstate(invalid="ignore", divide="ignore"):
            values: Float64 = (self.samples.sum() - self.samples) / (self.weights.sum() - self.weights)
        return values

    @property
    def stderr(self) -> float:
        """Of a ratio of means, linearized (Cochran, Sampling Techniques, 1977, section 6.4); NaN of one sample."""
        n = len(self.samples)
        if n < 2:
            return float("nan")
        rest = self.samples - self.value * self.weights
        return float(np.sqrt(n / (n - 1) * np.square(rest).sum()) / self.weights.sum())


def combine(rows: Iterable[Mapping[str, Any]], num_parts: int) -> list[Result]:
    """Return the results of the rows of ``cells`` of one task; a metric of which a part is missing gives none.

    Rows of the same part are the same measurement; one of them counts.
    """
    parts: dict[tuple[InterventionKey, int | None, str], dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        parts.setdefault((InterventionKey.of_row(row), row["layer"], row["metric"]), {})[row["part"]] = row
    results = []
    for (intervention, layer, metric), found in parts.items():
        if len(found) < num_parts:
            continue
        samples, weights = (_joined([found[part][name] for part in sorted(found)]) for name in ("samples", "weights"))
        results.append(Result(metric, intervention, layer, samples, weights))
    return results


def _joined(parts: Sequence[Sequence[float]]) -> Float64:
    return np.concatenate([np.asarray(part, np.float64) for part in parts])
