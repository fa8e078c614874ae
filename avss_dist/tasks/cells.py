"""Cells: parts of a task, each measured on one model under an intervention."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from avss_dist.core.errors import AvssError, BatchTooLarge
from avss_dist.core.intervention import NO_INTERVENTION, Intervention, Sparsity, encode_removals
from avss_dist.core.names import REALIZED, SPARSITY
from avss_dist.core.settings import Settings, fingerprint
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.partition.replica import Placement
from avss_dist.system.memory import halve_until_it_fits
from avss_dist.tasks.task import Measure, Row

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
        more = {name: value for name, value in (("patch", key.patch), ("rounding", key.rounding)) if value}
        return fingerprint(measure=self.measure.key, part=self.part, drop=encode_removals(key.removed), **more)[:20]


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """The result of a cell, the time that it took, and notes for people on how it was measured."""

    rows: Sequence[Row]
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
    start, settings = time.perf_counter(), model.settings
    changes, removals = cell.intervention.split()
    torch.set_num_threads(settings.threads)
    model.notes.clear()

    def run(rows: int) -> list[Row]:
        model.settings = replace(settings, batch_size=rows)
        with model.applying(changes) as counts:
            measured = cell.measure(model, removals)
        if changes.sparsity is None or counts is None:
            return measured
        return [*measured, *_realized(changes.sparsity, model.total(counts()))]

    try:
        with ExitStack() as stack:
            for module in {layer.module for layer in model.layers} if heartbeat else ():
                stack.callback(module.register_forward_pre_hook(lambda *_: heartbeat and heartbeat()).remove)
            rows = rows or settings.batch_size
            least = rows if cell.placement.ranks > 1 else 1  # all ranks must halve them together
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


def _realized(sparsity: Sparsity, counts: Sequence[Sequence[int]]) -> Iterator[Row]:
    """Yield the share of zeros among the inputs of each linear map, and the share of all weights that met a zero.

    Only tokens that are made sparse count. Maps that did not run have no row.
    """
    weighted = np.zeros((2, 1))
    for rule, (zeros, elements) in zip(sparsity.maps, counts, strict=True):
        if elements:
            values = np.array([[zeros], [elements]], np.float64)
            weighted += values / rule.inputs * (rule.outputs * rule.inputs)
            yield Row(metric=f"{REALIZED}{rule.path}", samples=values[0], weights=values[1], layer=rule.layer)
    if weighted[1, 0]:
        yield Row(metric=SPARSITY, samples=weighted[0], weights=weighted[1])
