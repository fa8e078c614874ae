"""Cells: one part of a task, measured on one model without some of its layers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import numpy as np

from avss_dist.errors import AvssError, BatchTooLarge
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.patching import decode_patch
from avss_dist.models.sparsifying import Sparsity
from avss_dist.names import REALIZED, SPARSITY
from avss_dist.partition.base import Placement
from avss_dist.settings import Settings, fingerprint
from avss_dist.system.cores import use_threads
from avss_dist.system.out_of_memory import halve_until_it_fits
from avss_dist.tasks.base import Measure, Row

Heartbeat = Callable[[], None]


class KeptPatch(Protocol):
    """Weights that repair a model, wherever they are kept."""

    @property
    def key(self) -> str:
        """SHA-256 of them, in hex."""

    def read(self) -> bytes:
        """As `patching.encode_patch` has them."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Cell:
    """The unit of work, of retry and of what is kept.

    Attributes:
        run_id: the evaluation that it belongs to.
        task: its name.
        part: which part of the task ``measure`` is.
        placement: of the replica that measures it; changes no number, or ``run_id`` says so.
        patch: the weights that the model is repaired with; None is the model as it is.
        sparsity: what becomes zero in it; None is nothing. ``run_id`` says it too.
        factor: what is left of what the layers of ``drop`` add. ``run_id`` says it too.
    """

    run_id: str
    checkpoint: Checkpoint
    settings: Settings
    task: str
    part: int
    measure: Measure = field(repr=False)
    drop: tuple[int, ...] = ()
    placement: Placement = field(default_factory=Placement)
    patch: KeptPatch | None = None
    sparsity: Sparsity | None = None
    factor: float = 0.0

    @property
    def cell_id(self) -> str:
        """Equal where the same is measured within an evaluation: names its file."""
        repair = {"patch": self.patch.key} if self.patch else {}
        return fingerprint(measure=self.measure.key, part=self.part, drop=list(self.drop), **repair)[:20]


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """What a cell gave, and how long it took."""

    rows: Sequence[Row]
    family: str
    device: str
    seconds: float


CellOutcome = tuple[Cell, CellResult | AvssError]


def measure_cell(
    model: LanguageModel, cell: Cell, *, rows: int | None = None, heartbeat: Heartbeat | None = None
) -> CellResult:
    """Measure a cell. Where a batch does not fit in memory, the cell is measured again with half the rows a batch.

    Args:
        model: the cell's.
        rows: rows in a batch; None is what the model's settings say.
        heartbeat: called whenever a layer begins.

    Raises:
        AvssError: the task does not fit the model.
        BatchTooLarge: one row does not fit.
    """
    start, settings = time.perf_counter(), model.settings
    use_threads(settings.threads)

    def run(rows: int) -> list[Row]:
        model.settings = replace(settings, batch_size=rows)
        if cell.sparsity is None:
            return cell.measure(model, cell.drop)
        with model.sparsified(cell.sparsity) as counted:
            measured = cell.measure(model, cell.drop)
        return [*measured, *_realized(cell.sparsity, model.total(counted.values()))]

    def too_large(rows: int) -> BatchTooLarge:
        return BatchTooLarge(
            f"{rows} x {settings.sequence_length} tokens do not fit in memory.", "Use a smaller `sequence_length`."
        )

    try:
        model.factor = cell.factor
        with _with_heartbeat(model, heartbeat), _repaired(model, cell.patch):
            rows = rows or settings.batch_size
            least = rows if cell.placement.ranks > 1 else 1  # all ranks must halve them together
            result, _ = halve_until_it_fits(run, rows, too_large, least=least)
    finally:
        model.settings, model.factor = settings, 0.0
    seconds = time.perf_counter() - start
    return CellResult(rows=result, family=model.family, device=str(model.device), seconds=seconds)


def _realized(sparsity: Sparsity, counts: Sequence[Sequence[int]]) -> Iterator[Row]:
    """What share of the inputs of each linear map was zero, and of the weights of all of them met a zero.

    Of the tokens that are made sparse; none of maps that did not run.
    """
    weighted = np.zeros((2, 1))
    for cut, (zeros, elements) in zip(sparsity.cuts, counts, strict=True):
        if elements:
            values = np.array([[zeros], [elements]], np.float64)
            weighted += values / cut.inputs * (cut.outputs * cut.inputs)
            yield Row(metric=f"{REALIZED}{cut.path}", samples=values[0], weights=values[1], layer=cut.layer)
    if weighted[1, 0]:
        yield Row(metric=SPARSITY, samples=weighted[0], weights=weighted[1])


@contextmanager
def _repaired(model: LanguageModel, patch: KeptPatch | None) -> Iterator[None]:
    """Inside, the model computes with the weights of a patch."""
    with model.patched(decode_patch(patch.read())[0]) if patch else nullcontext():
        yield


@contextmanager
def _with_heartbeat(model: LanguageModel, heartbeat: Heartbeat | None) -> Iterator[None]:
    """Inside, ``heartbeat`` is called whenever a layer of the model begins."""
    with ExitStack() as stack:
        if heartbeat is not None:
            for module in {layer.module for layer in model.layers}:
                stack.callback(module.register_forward_pre_hook(partial(_call, heartbeat)).remove)
        yield


def _call(heartbeat: Heartbeat, *_: object) -> None:
    heartbeat()
