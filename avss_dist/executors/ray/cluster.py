"""The Ray cluster as a driver uses it: results, nodes, heartbeats, and the clock."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence, Set
from typing import Any

import ray
from ray.exceptions import RayError

from avss_dist.executors.ray.heartbeats import Sign
from avss_dist.executors.ray.liveness import require_node

ANSWER_SECONDS = 2.0  # for the monitor to answer


class RayCluster:
    """Connection of a driver to its Ray cluster. Tests of scheduling put a simulated cluster in its place.

    Args:
        monitor: the `HeartbeatMonitor` actor.
    """

    def __init__(self, monitor: Any) -> None:
        self._monitor = monitor

    def now(self) -> float:
        """Return the monotonic time in seconds."""
        return time.monotonic()

    def wait(self, references: Sequence[Any], *, number: int, seconds: float) -> list[Any]:
        """Return at most ``number`` references that are ready; wait at most ``seconds`` for as many."""
        ready, _ = ray.wait([*references], num_returns=number, timeout=seconds)
        return list(ready)

    def get(self, reference: Any) -> Any:
        """Return the value of a reference.

        Raises:
            RayTaskError: the call raised an exception, which is its ``cause``.
            RayError: the worker, its node or the value was lost.
        """
        return ray.get(reference)

    def require_node(self) -> None:
        """Raise RunFailed if the head of the cluster or the node of this process is lost."""
        require_node()

    def nodes(self) -> dict[str, dict[str, Any]]:
        """Return the nodes of the cluster as ``ray.nodes`` describes them, by id."""
        return {node["NodeID"]: node for node in ray.nodes()}

    def draining(self) -> Set[str]:
        """Return the ids of draining nodes, which are given no new work and end when idle.

        A preemption notice, the autoscaler or ``ray drain-node`` drains a node. This is Ray's only interface that
        reports it without a dashboard. Ray Train uses it too.
        """
        return ray._private.state.state.get_draining_nodes().keys()

    def signs(self) -> Mapping[str, Sign] | None:
        """Return the latest known state of each worker; None if the monitor was lost. Ray then restarts it."""
        try:
            ready = self.wait([self._monitor.signs.remote()], number=1, seconds=ANSWER_SECONDS)
            return self.get(ready[0]) if ready else {}
        except RayError:
            return None

    def events(self, worker: str) -> list[Any]:
        """Return the events of a worker since the last call; an empty list if the monitor was lost."""
        try:
            events: list[Any] = self.get(self._monitor.take_events.remote(worker))
        except RayError:
            return []
        return events

    def leave(self, draining: Set[str]) -> None:
        """Move the monitor off a draining node, which cannot end while it has an actor."""
        actor = ray._private.state.actors(self._monitor._actor_id.hex())
        if actor.get("Address", {}).get("NodeID") in draining:
            ray.kill(self._monitor, no_restart=False)
