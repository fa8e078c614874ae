"""Lost nodes and workers: one line for each node, with the units that are measured again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from avss_dist.executors.ray.cluster import RayCluster
from avss_dist.executors.ray.queue import UnitQueue
from avss_dist.system.streams import say

NOTICE_SECONDS = 15.0  # until the head knows that a node is dead; its workers may be lost before that


@dataclass(eq=False)
class _Loss:
    """The units of one queue that were lost with the workers of one node."""

    queue: UnitQueue[Any]
    node: str
    since: float
    units: set[int] = field(default_factory=set)


class Losses:
    """Workers that a pool has lost, until it is known whether their nodes are lost too."""

    def __init__(self, cluster: RayCluster) -> None:
        self._cluster = cluster
        self._losses: dict[tuple[int, str], _Loss] = {}

    def add(self, queue: UnitQueue[Any], nodes: Iterable[str], units: Sequence[int]) -> None:
        """Note that workers on these nodes were lost while they had units of a queue, or opened its model."""
        for node in nodes:
            loss = self._losses.setdefault((id(queue), node), _Loss(queue, node, self._cluster.now()))
            loss.units.update(units)

    def tell(self) -> None:
        """Report the losses whose node is known to be dead, and those that have waited for `NOTICE_SECONDS`."""
        if not self._losses:
            return
        nodes = self._cluster.nodes()
        for key, loss in list(self._losses.items()):
            node = nodes.get(loss.node, {})
            waited = self._cluster.now() - loss.since > NOTICE_SECONDS
            if not node.get("Alive") or waited or not loss.queue.is_active:
                del self._losses[key]
                text = _text(loss, node)
                say(f"{datetime.now(UTC):%H:%M:%S} {text[0].upper()}{text[1:]}.")
                loss.queue.note(text)


def _text(loss: _Loss, node: dict[str, Any]) -> str:
    name = f"{node.get('NodeManagerAddress', '')} ({loss.node[:8]})".strip()
    lost = f"a worker on the node {name} was lost" if node.get("Alive") else f"the node {name} was lost"
    return f"{lost}; {loss.queue.describe_repeated(sorted(loss.units))}"
