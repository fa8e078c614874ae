"""Tasks of a language model, split into parts, and their rows of samples.

A `Measure` measures one part on a worker and returns rows of samples. Samples are stored, so that means, errors and
paired intervals are computed afterwards (`tasks.results`). A `Cell` is a part that is measured on one model under an
intervention.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch

from avss_dist.core.errors import AvssError, BatchTooLarge, without_secrets
from avss_dist.core.fingerprint import fingerprint
from avss_dist.core.intervention import (
    NO_INTERVENTION,
    Intervention,
    Removals,
    Sparsity,
    removal_numbers,
)
from avss_dist.core.memory import halve_until_it_fits
from avss_dist.core.settings import Settings
from avss_dist.core.values import JsonObject, NewObject
from avss_dist.corpus.seen import SeenText
from avss_dist.corpus.shards import Shard
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.checkpoint.locate import Checkpoint
from avss_dist.models.predictions import predicted
from avss_dist.partition.placement import Placement
from avss_dist.stats.layer_stats import Float64
from avss_dist.stats.metrics import LOSS, REALIZED, SPARSITY


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
