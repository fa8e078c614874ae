"""Cells: one part of a task, asked of one model without some layers. Run here, or by Ray workers."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from avss_dist.errors import AvssError, as_failure
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.settings import Settings, fingerprint
from avss_dist.tasks.base import Measure, Row


@dataclass(frozen=True, eq=False, kw_only=True)
class Cell:
    """The unit of work, of retry and of what is kept.

    Attributes:
        run_id: the evaluation that it belongs to.
        task: its name.
        part: which part of the task ``measure`` is.
    """

    run_id: str
    checkpoint: Checkpoint
    settings: Settings
    task: str
    part: int
    measure: Measure = field(repr=False)
    drop: tuple[int, ...] = ()

    @property
    def cell_id(self) -> str:
        """Equal where the same is measured within an evaluation: names its file."""
        return fingerprint(measure=self.measure.key, part=self.part, drop=list(self.drop))[:20]


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """What a cell gave, and how long it took."""

    rows: Sequence[Row]
    family: str
    device: str
    seconds: float


CellOutcome = tuple[Cell, CellResult | AvssError]


class CellRunner:
    """Measures cells in this process; the model of the last one stays open."""

    def __init__(self) -> None:
        self._opened: tuple[Any, LanguageModel] | None = None

    def run(self, cell: Cell) -> CellResult:
        """Measure a cell.

        Raises:
            AvssError: the model cannot be opened, or not asked this.
        """
        model = self._open(cell)
        start = time.perf_counter()
        rows = cell.measure(model, cell.drop)
        seconds = time.perf_counter() - start
        return CellResult(rows=rows, family=model.family, device=str(model.device), seconds=seconds)

    def _open(self, cell: Cell) -> LanguageModel:
        key = cell.checkpoint, cell.settings
        if self._opened is None or self._opened[0] != key:
            self.close()
            self._opened = key, LanguageModel(cell.checkpoint, cell.settings)
        return self._opened[1]

    def close(self) -> None:
        """Free the device."""
        if self._opened is not None:
            self._opened[1].close()
        self._opened = None


def run_here(cells: Iterable[Cell]) -> Generator[CellOutcome, None, None]:
    """See `executors.base.Executor.run_cells`: one after the other, in this process."""
    runner = CellRunner()
    try:
        for cell in cells:
            try:
                outcome: CellResult | AvssError = runner.run(cell)
            except Exception as error:
                outcome = as_failure(error)
            yield cell, outcome
    finally:
        runner.close()
