"""Detection of hanging ranks: those that make no progress, and those that never began."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from avss_dist.executors.ray.cluster import RayCluster
from avss_dist.executors.ray.gang import Gang
from avss_dist.executors.ray.heartbeats import Doing, Sign

START_SECONDS = 60.0  # at least, for a process to report for the first time


class Watch:
    """Latest reports of the ranks, and their times.

    Args:
        cluster: source of the reports.
        hang_seconds: how long a rank may begin no layer.
    """

    def __init__(self, cluster: RayCluster, hang_seconds: float) -> None:
        self._cluster, self._hang_seconds = cluster, hang_seconds
        self._signs: Mapping[str, Sign] = {}
        self._heard = 0.0  # when the signs came
        self._alive: dict[str, float] = {}  # when each rank last made progress, or was seen to have a process

    def listen(self) -> bool:
        """Query the monitor. Returns False if it was lost with its node; Ray then restarts it elsewhere."""
        signs = self._cluster.signs()
        if signs is None:
            return False
        self._signs = signs
        self._heard = self._cluster.now()
        self._alive |= {name: self._heard - sign.silence for name, sign in self._signs.items()}
        return True

    def complaint(self, gang: Gang, begun: float) -> str:
        """Return why a gang counts as hanging in its round; empty if it does not hang."""
        now = self._cluster.now()
        for name in gang.find_processes():
            self._alive.setdefault(name, now)
        silence = {name: now - self._alive[name] for name in gang.names if name in self._alive}
        hanging = late(silence, self._signs, now - begun, self._hang_seconds)
        return f"rank {hanging[0]} made no progress in {silence[hanging[0]]:.0f} seconds" if hanging else ""

    def doing(self, gang: Gang, begun: float) -> Doing | None:
        """Return the activity that the first rank of a gang has reported in its round, if any."""
        sign = self._signs.get(gang.names[0])
        return sign.doing if sign and self._heard - sign.age > begun else None


def late(silence: Mapping[str, float], heard: Collection[str], elapsed: float, hang_seconds: float) -> list[str]:
    """Return the ranks of a gang that have made no progress for too long although they had work.

    Args:
        silence: seconds since each rank with a process last made progress, or was first seen.
        heard: the ranks that report; others may still be starting.
        elapsed: seconds since the gang's round began.
    """
    limits = {name: hang_seconds if name in heard else max(hang_seconds, START_SECONDS) for name in silence}
    return [name for name in silence if elapsed > hang_seconds and silence[name] > limits[name]]
