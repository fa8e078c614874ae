"""Tasks of a language model, split into parts, their rows of samples, and the results over all parts.

A `Measure` measures one part on a worker and returns rows of samples. Samples are stored, so that means, errors and
paired intervals are computed afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from avss_dist.core.intervention import NO_INTERVENTION, Intervention, InterventionKey, Removals
from avss_dist.core.names import LOSS
from avss_dist.core.settings import fingerprint
from avss_dist.corpus.shards import Shard
from avss_dist.models.causal_lm import LanguageModel, predicted
from avss_dist.stats.layer_stats import Float64


@dataclass(frozen=True, eq=False, kw_only=True)
class Row:
    """One metric of one part of a task.

    Attributes:
        metric: name of the metric.
        samples: float64[n], a value for each sample; for `LOSS`, its summed negative log-likelihood.
        weights: float64[n], the weight of each sample: the metric is ``sum(samples) / sum(weights)``.
        removed: layers and sublayers that were removed; None means those of the cell.
        rounding: key of the `intervention.Rounding` that the metric describes; None means that of the cell.
        layer: index of the layer that the metric describes; None for the whole model.
        patch: fitted weights, encoded by `interventions.encode_patch`; None if nothing was fitted.
    """

    metric: str
    samples: Float64
    weights: Float64
    removed: Removals | None = None
    rounding: str | None = None
    layer: int | None = None
    patch: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, eq=False)
class Measure:
    """Measurement of one part of a task, which can be pickled. Measures with equal keys do equal work.

    Attributes:
        measure: name of the measurement in keys.
    """

    measure: ClassVar[str]

    @property
    def key(self) -> str:
        """SHA-256, in hex, of everything that can change the rows."""
        return fingerprint(**self.identity())

    def identity(self) -> dict[str, Any]:
        """Return the values that the key is made of: the name and the fields, shards by their content."""
        return {"measure": self.measure, **{f.name: _identity(getattr(self, f.name)) for f in fields(self)}}

    def __call__(self, model: LanguageModel, intervention: Intervention = NO_INTERVENTION) -> list[Row]:
        """Measure a model under an intervention.

        Args:
            intervention: the removed layers, which the measure itself applies, because it may remove others, too. The
                patch, the sparsity and the rounding of a cell are already applied.
        """
        raise NotImplementedError


def _identity(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_identity(inner) for inner in value]
    return value.content_hash if isinstance(value, Shard) else value


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task: its name, its parts in order, and its options, which are stored with its results."""

    name: str
    parts: tuple[Measure, ...]
    options: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def key(self) -> str:
        """SHA-256, in hex, of its parts' keys."""
        return fingerprint(parts=[part.key for part in self.parts])


def predicted_tokens(shard: Shard, model: LanguageModel) -> Float64:
    """Return the number of predicted tokens of each sequence of a shard, float64[sequences]."""
    batches = shard.batches(model.settings.batch_size)
    return np.concatenate([predicted(batch).sum(axis=1) for batch in batches]).astype(np.float64)


def losses_under(
    model: LanguageModel, shard: Shard, interventions: Sequence[Intervention], metric: str = LOSS
) -> list[Row]:
    """Return the loss on a shard under each intervention: rows with a sample for each sequence."""
    losses = model.losses_under(list(shard.batches(model.settings.batch_size)), interventions)
    weights = predicted_tokens(shard, model)
    return [
        Row(metric=metric, samples=samples, weights=weights, removed=applied.removed, rounding=applied.key.rounding)
        for applied, samples in zip(interventions, losses, strict=True)
    ]


@dataclass(frozen=True, eq=False)
class Result:
    """Result of a metric over all parts of a task.

    Attributes:
        intervention: key of the change to the model; of a task that fits a patch, with that patch.
        layer: index of the layer that the metric describes; None for the whole model.
        samples, weights: float64[n], those of all parts in their order.
    """

    metric: str
    intervention: InterventionKey
    layer: int | None
    samples: Float64 = field(repr=False)
    weights: Float64 = field(repr=False)

    @property
    def removed(self) -> Removals:
        """Removed layers and sublayers."""
        return self.intervention.removed

    @property
    def value(self) -> float:
        """Weighted mean of the samples: ``sum(samples) / sum(weights)``."""
        return float(self.samples.sum() / self.weights.sum())

    @property
    def left_out(self) -> Float64:
        """Values without one sample each (jackknife), float64[n]. NaN if no weight remains."""
        with np.errstate(invalid="ignore", divide="ignore"):
            values: Float64 = (self.samples.sum() - self.samples) / (self.weights.sum() - self.weights)
        return values

    @property
    def stderr(self) -> float:
        """Standard error of the value, a ratio of means, linearized (Cochran, Sampling Techniques, 1977, section 6.4).

        NaN for a single sample.
        """
        n = len(self.samples)
        if n < 2:
            return float("nan")
        residuals = self.samples - self.value * self.weights
        return float(np.sqrt(n / (n - 1) * np.square(residuals).sum()) / self.weights.sum())

    def metrics(self) -> list[tuple[str, float, float]]:
        """Return name, value and standard error, and those of the perplexity of a loss (by the delta method)."""
        perplexity = float(np.exp(self.value)) if self.metric == LOSS else None
        more = [] if perplexity is None else [("perplexity", perplexity, perplexity * self.stderr)]
        return [(self.metric, self.value, self.stderr), *more]


def combine(rows: Iterable[Mapping[str, Any]], num_parts: int) -> list[Result]:
    """Return the results of one task from rows of ``cells``. Metrics with a missing part are left out.

    Rows of the same part are the same measurement, of which one counts.
    """
    parts: dict[tuple[InterventionKey, int | None, str], dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        parts.setdefault((InterventionKey.of_row(row), row["layer"], row["metric"]), {})[row["part"]] = row
    results = []
    for (intervention, layer, metric), rows_by_part in parts.items():
        if len(rows_by_part) < num_parts:
            continue
        ordered = [rows_by_part[part] for part in sorted(rows_by_part)]
        samples, weights = (
            np.concatenate([np.asarray(row[name], np.float64) for row in ordered]) for name in ("samples", "weights")
        )
        results.append(Result(metric, intervention, layer, samples, weights))
    return results
