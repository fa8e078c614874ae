"""Tasks of several ranks: a gang that does one task together, and ends with its first error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray.exceptions import RayError, RayTaskError

from avss_dist.core.errors import AvssError, RunFailed
from avss_dist.executors.ray.cluster import RayCluster, Watch
from avss_dist.executors.ray.gang import Gang, missing_package
from avss_dist.partition.group import lost_rank

POLL_SECONDS = 0.5
CHECK_SECONDS = 5.0  # between two looks at nodes and heartbeats
NOTICE_SECONDS = 10.0  # until Ray knows that a process is dead; the other ranks lose their connection before


class RankedRun:
    """A task that the ranks of a gang do together.

    Args:
        cluster: the Ray cluster of the gang.
        placement_seconds: how long to wait for a place for all ranks.
        hang_seconds: how long a rank may begin no layer.
        shortage: describes the resources that the cluster lacks.
        on_event: receives the events of the first rank.
    """

    def __init__(
        self,
        gang: Gang,
        cluster: RayCluster,
        *,
        placement_seconds: float,
        hang_seconds: float,
        shortage: Callable[[], str],
        on_event: Callable[[Any], None],
    ) -> None:
        self._gang, self._cluster, self._on_event = gang, cluster, on_event
        self._placement_seconds, self._shortage = placement_seconds, shortage
        self._watch = Watch(cluster, hang_seconds)
        self._check_seconds = min(CHECK_SECONDS, hang_seconds / 4)
        self._begun: float | None = None  # when all ranks were placed
        self._hangs = False

    def result(self, task: Any) -> Any:
        """Do the task, and return what the first rank returns. The workers are stopped in any case.

        Raises:
            AvssError: a rank raised it.
            RunFailed: a rank was lost, hangs or raised another exception, or the ranks were not placed in time.
        """
        results: dict[int, Any] = {}
        asked = checked = self._cluster.now()
        try:
            waiting = {reference: rank for rank, reference in enumerate(self._gang.run(task))}
            while waiting:
                ready = self._cluster.wait([*waiting], number=1, seconds=POLL_SECONDS)
                for event in self._cluster.events(self._gang.names[0]):
                    self._on_event(event)
                for reference in ready:
                    try:
                        results[waiting[reference]] = self._cluster.get(reference)
                    except RayError as error:
                        raise self._cause(waiting, reference, error) from error
                    del waiting[reference]
                if self._cluster.now() - checked > self._check_seconds:
                    checked = self._cluster.now()
                    self._check(asked)
        finally:
            self._gang.stop(hangs=self._hangs)
        return results[0]

    def _check(self, asked: float) -> None:
        """Raise RunFailed if a node is lost, the ranks have waited too long for their places, or one hangs."""
        self._cluster.require_node()
        if self._begun is None and self._gang.is_placed:
            self._begun = self._cluster.now()
        if self._begun is None:
            if self._cluster.now() - asked > self._placement_seconds:
                raise RunFailed(
                    f"The ranks were not placed in {self._placement_seconds:.0f} seconds. {self._shortage()}",
                    "Free some of it, lower `ranks`, or use another cluster.",
                )
        elif self._watch.listen() and (why := self._watch.complaint(self._gang, self._begun)):
            self._hangs = True
            why = why.replace(self._gang.names[0].removesuffix("0"), "", 1)  # the gang's name, before the rank
            raise RunFailed(f"{why[0].upper()}{why[1:]}.", "Run the same command again, or raise `hang_seconds`.")

    def _cause(self, waiting: dict[Any, int], reference: Any, error: RayError) -> AvssError:
        """Return the error of the rank that failed first. The other ranks only lose their connection to it."""
        rank = waiting.pop(reference)
        if waiting and isinstance(error, RayTaskError) and lost_rank(error.cause):
            ready = self._cluster.wait([*waiting], number=1, seconds=NOTICE_SECONDS)
            for other in ready:
                try:
                    self._cluster.get(other)
                except RayError as first:
                    return self._described(waiting[other], first)
        return self._described(rank, error)

    def _described(self, rank: int, error: RayError) -> AvssError:
        if missing := missing_package(error):
            return missing
        if not isinstance(error, RayTaskError):
            self._cluster.require_node()
            return RunFailed(f"Rank {rank} was lost: {str(error).splitlines()[0]}", "Run the same command again.")
        cause = error.cause
        if isinstance(cause, AvssError):
            return cause
        return RunFailed(f"Rank {rank} failed: {type(cause).__name__}: {cause}", "Its traceback is shown with `-v`.")
