"""What is reported while runs are planned and measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from avss_dist.partition.base import Placement

if TYPE_CHECKING:
    from avss_dist.runs.run import Run


class Reporter(Protocol):
    """Told how the work goes; the command line draws it.

    The next run is planned while others are measured. ``name`` is the run's: its model, and its corpus where there are
    several.
    """

    def planning(self, name: str) -> None: ...
    def placed(self, name: str, placement: Placement) -> None: ...
    def started(self, name: str, num_tokens: int, done_tokens: int) -> None: ...
    def advanced(self, name: str, num_tokens: int) -> None: ...
    def finished(self, name: str, run: Run) -> None: ...


class Silent:
    """A Reporter that says nothing."""

    def planning(self, name: str) -> None: ...
    def placed(self, name: str, placement: Placement) -> None: ...
    def started(self, name: str, num_tokens: int, done_tokens: int) -> None: ...
    def advanced(self, name: str, num_tokens: int) -> None: ...
    def finished(self, name: str, run: Run) -> None: ...
