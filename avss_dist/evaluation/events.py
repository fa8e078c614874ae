"""Events that evaluations pass to a callback, those of scoring and distillation included. It does not import torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from avss_dist.core.text import describe_bytes
from avss_dist.distillation.curve import Event as DistillEvent
from avss_dist.planning.search import SearchStep
from avss_dist.runs.events import RunEvent

if TYPE_CHECKING:
    from avss_dist.tasks.task import Cell


LEAST_MENTIONED_BYTES = 1 << 30
"""Memory of which people are told. Less need not be said."""


@dataclass(frozen=True, kw_only=True)
class MemoryNeeded:
    """The estimated memory of each process that measures, before it begins.

    Attributes:
        parts: bytes by a word for people.
        free: bytes that are free on the device.
    """

    parts: Mapping[str, int]
    free: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(self.parts.values())

    @property
    def is_large(self) -> bool:
        """Whether people should know before it is taken: it is large, or more than half of what is free."""
        return self.total >= LEAST_MENTIONED_BYTES or self.total > self.free / 2

    def describe(self) -> str:
        """Return the total, its parts and the free bytes as a sentence, and what to do if they are too few."""
        parts = ", ".join(f"{name} {describe_bytes(size)}" for name, size in self.parts.items())
        line = f"Needs about {describe_bytes(self.total)} of memory ({parts}); {describe_bytes(self.free)} are free."
        if self.total > self.free:
            line += " Lower `batch_size` or `sequence_length`, or set `partition` streaming."
        return line


@dataclass(frozen=True)
class Remark:
    """Something that people should know before the work goes on.

    Attributes:
        text: whole sentences.
    """

    text: str


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


Event = MemoryNeeded | Remark | CellsStarted | CellUnderway | CellDone | SearchStep | RunEvent | DistillEvent
OnEvent = Callable[[Event], None]
