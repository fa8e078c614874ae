"""Events that evaluations pass to a callback, those of scoring and distillation included. It does not import torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from avss_dist.distillation.curve import Event as DistillEvent
from avss_dist.runs.events import RunEvent

if TYPE_CHECKING:
    from avss_dist.tasks.task import Cell, Result


@dataclass(frozen=True)
class CellsStarted:
    """The start of measuring cells, of which ``done`` were measured before."""

    cells: Sequence[Cell]
    done: int


@dataclass(frozen=True)
class CellUnderway:
    """The progress of a long cell: the share of a step that is done."""

    cell: Cell
    step: str
    share: float


@dataclass(frozen=True)
class CellDone:
    """The end of a cell, which is measured or has failed.

    Attributes:
        notes: remarks for people on how it was measured.
    """

    cell: Cell
    notes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class SearchStep:
    """The end of a round of a search.

    Attributes:
        best: loss without the best set of the round.
        sets: number of sets with a known loss, those of this round included.
    """

    best: Result
    sets: int


Event = CellsStarted | CellUnderway | CellDone | SearchStep | RunEvent | DistillEvent
OnEvent = Callable[[Event], None]
