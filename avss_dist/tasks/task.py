"""Tasks of a language model, split into parts, their rows of samples, and the results over all parts.

A `Measure` measures one part on a worker and returns rows of samples. Samples are stored, so that means, errors and
paired intervals are computed afterwards. A `Cell` is a part that is measured on one model under an intervention.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from math import isfinite, nan
from typing import ClassVar

import numpy as np
import torch

from avss_dist.core.errors import AvssError, BatchTooLarge, without_secrets
from avss_dist.core.fingerprint import fingerprint
from avss_dist.core.intervention import (
    NO_INTERVENTION,
    Intervention,
    InterventionKey,
    Removals,
    Sparsity,
    removal_numbers,
)
from avss_dist.core.memory import halve_until_it_fits
from avss_dist.core.settings import Settings
from avss_dist.core.values import JsonObject, NewObject, TableRow
from avss_dist.corpus.seen import SeenText
from avss_dist.corpus.shards import Shard
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.checkpoint.locate import Checkpoint
from avss_dist.models.predictions import predicted
from avss_dist.partition.placement import Placement
from avss_dist.stats.intervals import MINIMUM_UNITS, jackknife_interval
from avss_dist.stats.layer_stats import Float64
from avss_dist.stats.metrics import LOSS, REALIZED, SPARSITY, retention_of
from avss_dist.warehouse.reader import grouped


@dataclass(frozen=True, eq=False, kw_only=True)
class MetricRow:
    """One metric of one part of a task.

    Attributes:
        metric: name of the metric.
        samples: float64[n], a value for each sample; for `LOSS`, its summed negative log-likelihood.
        weights: float64[n], the weight of each sample: the metric is ``sum(samples) / sum(weights)``.
        removed: layers and sublayers that were removed; None means those of the cell.
        rounding: key of the `intervention.Rounding` that the metric describes; None means that of the cell.
        layer: index of the layer that the metric describes; None for the whole model.
        patch: fitted weights, encoded by `patches.encode_patch`; None if nothing was fitted.
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

    def identity(self) -> NewObject:
        """Return the values that the key is made of: the name and the fields, shards by their content."""
        identity: NewObject = {"measure": self.measure}
        for described in fields(self):
            identity[described.name] = _identity(getattr(self, described.name))
        return identity

    def __call__(self, model: LanguageModel, intervention: Intervention = NO_INTERVENTION) -> list[MetricRow]:
        """Measure a model under an intervention.

        Args:
            intervention: the removed layers, which the measure itself applies, because it may remove others, too. The
                patch, the sparsity and the rounding of a cell are already applied.
        """
        raise NotImplementedError


def _identity(value: object) -> object:
    """Return what identifies the value of a field: of a shard, the hash of its content."""
    if isinstance(value, tuple):
        return [_identity(inner) for inner in value]
    if isinstance(value, Shard):
        return value.content_hash
    return value


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task: its name without keys, its parts in order, and its options, which are stored with its results.

    Attributes:
        read: texts that it reads to measure something by which models are changed.
    """

    name: str
    parts: tuple[Measure, ...]
    options: JsonObject = field(default_factory=dict)
    read: tuple[SeenText, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", str(without_secrets(self.name)))

    @cached_property
    def key(self) -> str:
        """SHA-256, in hex, of its parts' keys."""
        return fingerprint(parts=[part.key for part in self.parts])


def predicted_tokens(shard: Shard, model: LanguageModel) -> Float64:
    """Return the number of predicted tokens of each sequence of a shard, float64[sequences]."""
    counts = [predicted(batch).sum(axis=1) for batch in shard.batches(model.settings.batch_size)]
    return np.concatenate(counts).astype(np.float64)


def losses_under(
    model: LanguageModel,
    shard: Shard,
    interventions: Sequence[Intervention],
    activity: str = "Measuring losses",
    metric: str = LOSS,
) -> list[MetricRow]:
    """Return the loss on a shard under each intervention: rows with a sample for each sequence.

    Args:
        activity: name of the work in the progress that is reported.
    """
    batches = list(shard.batches(model.settings.batch_size))
    losses = model.losses_under(batches, interventions, activity)
    weights = predicted_tokens(shard, model)
    rows = []
    for intervention, samples in zip(interventions, losses, strict=True):
        row = MetricRow(
            metric=metric,
            samples=samples,
            weights=weights,
            removed=intervention.removed,
            rounding=intervention.key.rounding,
        )
        rows.append(row)
    return rows


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
        metrics = [(self.metric, self.value, self.stderr)]
        if self.metric == LOSS:
            perplexity = float(np.exp(self.value))
            metrics.append(("perplexity", perplexity, perplexity * self.stderr))
        return metrics


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Retention of a metric: after over before, or before over after if lower is better. 1 means no change.

    The retention of a loss is that of its perplexity.

    Attributes:
        value: the retention.
        low, high: ends of the 95% interval over paired samples; NaN where the two have different numbers of samples,
            where fewer than ``MINIMUM_UNITS`` samples differ, or where the retention is zero or infinite.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, before: Result, after: Result) -> Retention:
        """Return the retention between two results of one metric on the same samples."""
        value = retention_of(before.metric, np.array(before.value), np.array(after.value))
        # Most samples of an accuracy may be equal, and equal samples say nothing about its variation.
        if _num_differing(before, after) < MINIMUM_UNITS:
            return cls(value=float(value), low=nan, high=nan)
        left_out = retention_of(before.metric, before.left_out, after.left_out)
        low, high = jackknife_interval(value, left_out, scale="log")
        return cls(value=float(value), low=float(low), high=float(high))

    def describe(self) -> str:
        """Return the retention as text, with its interval if it is known."""
        text = f"{self.value:z.1%} kept"
        if self.has_interval:
            text += f" (95% interval {self.low:z.1%} to {self.high:z.1%})"
        return text

    @property
    def has_interval(self) -> bool:
        """Whether both ends of the interval are known."""
        return isfinite(self.low) and isfinite(self.high)


def _num_differing(before: Result, after: Result) -> int:
    """Return the number of samples that differ between two results, or 0 if they have different numbers of samples."""
    if len(before.samples) != len(after.samples):
        return 0
    is_different = (before.samples != after.samples) | (before.weights != after.weights)
    return int(np.count_nonzero(is_different))


def combine(rows: Iterable[TableRow], num_parts: int) -> list[Result]:
    """Return the results of one task from rows of ``cells``. Metrics with a missing part are left out.

    Rows of the same part are the same measurement, of which one counts.
    """
    results = []
    by_result = grouped(rows, lambda row: (row["metric"], InterventionKey.of_row(row), row["layer"]))
    for (metric, intervention, layer), rows_of_result in by_result.items():
        by_part = {row["part"]: row for row in rows_of_result}
        if len(by_part) < num_parts:
            continue
        in_order = [by_part[part] for part in sorted(by_part)]
        samples = np.concatenate([np.asarray(row["samples"], np.float64) for row in in_order])
        weights = np.concatenate([np.asarray(row["weights"], np.float64) for row in in_order])
        results.append(Result(metric, intervention, layer, samples, weights))
    return results


Heartbeat = Callable[[], None]


@dataclass(frozen=True, eq=False, kw_only=True)
class Cell:
    """The unit of work, retry and storage.

    Attributes:
        run_id: id of the evaluation that it belongs to.
        task: name of the task.
        part: index of ``measure`` among the parts of the task.
        placement: placement of the replica that measures it; ``run_id`` depends on it if it changes numbers.
        intervention: change of the model; ``run_id`` depends on its sparsity.
    """

    run_id: str
    checkpoint: Checkpoint
    settings: Settings
    task: str
    part: int
    measure: Measure = field(repr=False)
    placement: Placement = field(default_factory=Placement)
    intervention: Intervention = NO_INTERVENTION

    @property
    def cell_id(self) -> str:
        """Name of its file, equal for equal measurements within an evaluation."""
        key = self.intervention.key
        identity: NewObject = {"measure": self.measure.key, "part": self.part, "drop": removal_numbers(key.removed)}
        # Cells without them keep the names that they had before there were any.
        if key.patch:
            identity["patch"] = key.patch
        if key.rounding:
            identity["rounding"] = key.rounding
        return fingerprint(**identity)[:20]


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """The result of a cell, the time that it took, and notes for people on how it was measured."""

    rows: Sequence[MetricRow]
    family: str
    device: str
    seconds: float
    notes: Sequence[str] = ()


CellOutcome = tuple[Cell, CellResult | AvssError]


def measure_cell(
    model: LanguageModel, cell: Cell, *, rows: int | None = None, heartbeat: Heartbeat | None = None
) -> CellResult:
    """Measure a cell. Where a batch does not fit in memory, the cell is measured again with half the rows a batch.

    Args:
        model: model of the cell.
        rows: rows in a batch; by default those of the model's settings.
        heartbeat: called whenever a layer begins.

    Raises:
        AvssError: the task does not fit the model.
        BatchTooLarge: one row does not fit.
    """
    start = time.perf_counter()
    settings = model.settings
    changes, removals = cell.intervention.split()
    torch.set_num_threads(settings.threads)
    model.notes.clear()

    def run(rows: int) -> list[MetricRow]:
        model.settings = replace(settings, batch_size=rows)
        with model.applying(changes) as counts:
            measured = cell.measure(model, removals)
        if changes.sparsity is None or counts is None:
            return measured
        return [*measured, *_realized(changes.sparsity, model.total(counts.by_map()))]

    try:
        with _calling_at_layers(model, heartbeat):
            rows = rows or settings.batch_size
            # Several ranks would have to halve the rows together, so that they do not.
            least = rows if cell.placement.ranks > 1 else 1
            result, _ = halve_until_it_fits(
                run,
                rows,
                lambda rows: BatchTooLarge(
                    f"{rows} x {settings.sequence_length} tokens do not fit in memory.",
                    "Use a smaller `sequence_length`.",
                ),
                least=least,
            )
    finally:
        model.settings = settings
    return CellResult(
        rows=result,
        family=model.family,
        device=str(model.device),
        seconds=time.perf_counter() - start,
        notes=tuple(model.notes),
    )


@contextmanager
def _calling_at_layers(model: LanguageModel, heartbeat: Heartbeat | None) -> Iterator[None]:
    """Call a function whenever a layer begins inside the context."""
    with ExitStack() as hooks:
        if heartbeat is not None:
            for module in {layer.module for layer in model.layers}:
                hook = module.register_forward_pre_hook(lambda *_: heartbeat())
                hooks.callback(hook.remove)
        yield


def _realized(sparsity: Sparsity, counts: Sequence[Sequence[int]]) -> Iterator[MetricRow]:
    """Yield the share of zeros among the inputs of each linear map, and the share of all weights that met a zero.

    Only tokens that are made sparse count. Maps that did not run have no row.

    Args:
        counts: numbers of zeros and of all elements of each map's inputs.
    """
    all_weights = np.zeros((2, 1))
    for rule, (zeros, elements) in zip(sparsity.maps, counts, strict=True):
        if not elements:
            continue
        values = np.array([[zeros], [elements]], np.float64)
        weights = rule.outputs * rule.inputs
        all_weights += values / rule.inputs * weights
        yield MetricRow(metric=f"{REALIZED}{rule.path}", samples=values[0], weights=values[1], layer=rule.layer)
    if all_weights[1, 0]:
        yield MetricRow(metric=SPARSITY, samples=all_weights[0], weights=all_weights[1])
