"""Events of an evaluation: what its callback is told while it goes on. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from avss_dist.tasks.base import Result
    from avss_dist.tasks.cells import Cell


@dataclass(frozen=True)
class CellsStarted:
    """Cells are about to be measured; ``done`` of them were measured before."""

    cells: Sequence[Cell]
    done: int


@dataclass(frozen=True)
class CellUnderway:
    """A cell that takes long has done a share of a step."""

    cell: Cell
    step: str
    share: float


@dataclass(frozen=True)
class CellDone:
    """A cell is measured, or has failed."""

    cell: Cell


@dataclass(frozen=True, kw_only=True)
class SearchStep:
    """A round of a search is over.

    Attributes:
        best: the loss without the best set of the round.
        sets: number of sets whose loss the search has, with this round's.
    """

    best: Result
    sets: int


@dataclass(frozen=True)
class ScoringStarted:
    """Layers are about to be scored on so many tokens, of which some were measured before."""

    num_tokens: int
    done_tokens: int


@dataclass(frozen=True)
class ScoringAdvanced:
    """Layers are scored on so many more tokens."""

    num_tokens: int


@dataclass(frozen=True)
class WeightsWritten:
    """So many more bytes of a checkpoint are written."""

    num_bytes: int


Event = CellsStarted | CellUnderway | CellDone | SearchStep | ScoringStarted | ScoringAdvanced | WeightsWritten
OnEvent = Callable[[Event], None]


def ignore(_event: Event) -> None:
    """Receive an event, and do nothing."""
