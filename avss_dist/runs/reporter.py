"""What is reported while runs are planned and measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from avss_dist.partition.base import Placement
    from avss_dist.runs.run import Run


class Reporter:
    """Hears how the runs go, and says nothing: subclasses show what they hear.

    The next run is planned while others are measured, so calls come from several threads, though never two at once for
    one run. ``name`` is the run's: its model, and its corpus where there are several.
    """

    def planning(self, name: str) -> None:
        """The run's text is being read and tokenized."""

    def placed(self, name: str, placement: Placement) -> None:
        """How its replicas will be spread over devices."""

    def started(self, name: str, num_tokens: int, done_tokens: int) -> None:
        """Its shards are about to be measured; an earlier attempt has measured ``done_tokens`` of ``num_tokens``."""

    def advanced(self, name: str, num_tokens: int) -> None:
        """A shard of ``num_tokens`` is measured and committed."""

    def finished(self, name: str, run: Run) -> None:
        """The run has ended; `Run.status` says how."""
