"""The Ray cluster as a driver uses it: results, nodes, heartbeats and the clock, and what of it hangs or is lost."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Collection, Mapping, Sequence, Set
from typing import Any

import grpc
import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import RayError

from avss_dist.core.errors import RunFailed
from avss_dist.runs.ray.gang import Gang
from avss_dist.runs.ray.heartbeats import Doing, Sign

CONNECT_SECONDS = 10.0  # for the head of a cluster to accept a connection
LOOPBACK = ("127.0.0.1", "localhost")


HEAD_SECONDS = float(os.environ.get("RAY_gcs_rpc_server_reconnect_timeout_s", 60)) / 2  # noqa: SIM112
"""Seconds that the head may be away, as it can be restarted. Ray ends this process silently after twice that."""
RETRY_SECONDS = 0.5
RUN_AGAIN = "Run the same command again: everything measured so far is kept."


def require_gcs(address: str) -> None:
    """Raise OSError soon if no gRPC server answers at ``HOST:PORT``. Ray would try to reach its head for minutes.

    An address without a port, such as ``local``, is accepted, and with TLS only the connection is tried.
    """
    server = _connect(address)
    uses_tls = os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")
    if server and not uses_tls:
        with grpc.insecure_channel(server, [("grpc.enable_http_proxy", 0)]) as channel:
            try:
                grpc.channel_ready_future(channel).result(timeout=CONNECT_SECONDS)
            except grpc.FutureTimeoutError:
                raise TimeoutError(f"it did not answer as a gRPC server within {CONNECT_SECONDS:g} seconds") from None


def _connect(address: str) -> str:
    """Return the ``HOST:PORT`` that accepts a connection, or an empty string if the address has no port.

    Raises:
        OSError: nobody listens there.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")  # of IPv6
    if not host or not port.isdecimal() or "/" in host:
        return ""
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except OSError:
        own_address = ray.util.get_node_ip_address()  # for which Ray takes the loopback address
        if host not in LOOPBACK or own_address in LOOPBACK:
            raise
        return _connect(f"{own_address}:{port}")
    if ":" in host:  # of IPv6
        return f"[{host}]:{port}"
    return f"{host}:{port}"


def has_head() -> bool:
    """Whether the head of the cluster, the GCS, can be reached."""
    try:
        _connect(ray.get_runtime_context().gcs_address)
    except OSError:
        return False
    return True


def require_head() -> None:
    """Wait until the head answers. Calls that need it would otherwise wait forever.

    Raises:
        RunFailed: the head did not come back in `HEAD_SECONDS`.
    """
    deadline = time.monotonic() + HEAD_SECONDS
    while not has_head():
        if time.monotonic() > deadline:
            head = f"its head (the GCS at {ray.get_runtime_context().gcs_address})"
            raise RunFailed(
                f"The Ray cluster is lost: {head} has crashed or was killed.", f"Start it again. {RUN_AGAIN}"
            )
        time.sleep(RETRY_SECONDS)


def node_lost() -> RunFailed:
    """Return the error for the loss of this process's node, after which it cannot start workers."""
    return RunFailed(
        "The Ray node of this process has died: its raylet or its dashboard agent crashed, or was killed.",
        f"See raylet.out and dashboard_agent.log in /tmp/ray/session_latest/logs. {RUN_AGAIN}",
    )


ANSWER_SECONDS = 2.0  # for the monitor to answer


class RayCluster:
    """Connection of a driver to its Ray cluster. Tests of scheduling put a simulated cluster in its place.

    Args:
        monitor: the `HeartbeatMonitor` actor.
    """

    def __init__(self, monitor: ActorHandle) -> None:
        self._monitor = monitor

    def now(self) -> float:
        """Return the monotonic time in seconds."""
        return time.monotonic()

    def wait(self, references: Sequence[ObjectRef], *, number: int, seconds: float) -> list[ObjectRef]:
        """Return at most ``number`` references that are ready. Wait at most ``seconds`` for as many."""
        ready, _ = ray.wait([*references], num_returns=number, timeout=seconds)
        return list(ready)

    def get(self, reference: ObjectRef) -> Any:
        """Return the value of a reference.

        Raises:
            RayTaskError: the call raised an exception, which is its ``cause``.
            RayError: the worker, its node or the value was lost.
        """
        return ray.get(reference)

    def require_node(self) -> None:
        """Raise RunFailed if the head of the cluster or the node of this process is lost."""
        require_head()
        own_node = self.nodes().get(ray.get_runtime_context().get_node_id(), {})
        if not own_node.get("Alive"):
            raise node_lost()

    def nodes(self) -> dict[str, Mapping[str, Any]]:
        """Return the nodes of the cluster as ``ray.nodes`` describes them, by id."""
        return {node["NodeID"]: node for node in ray.nodes()}

    def draining(self) -> Set[str]:
        """Return the ids of draining nodes, which are given no new work and end when idle.

        A preemption notice, the autoscaler or ``ray drain-node`` drains a node. This is Ray's only interface that
        reports it without a dashboard. Ray Train uses it too.
        """
        return ray._private.state.state.get_draining_nodes().keys()

    def signs(self) -> Mapping[str, Sign] | None:
        """Return the latest known state of each worker, or None if the monitor was lost. Ray then restarts it."""
        try:
            ready = self.wait([self._monitor.signs.remote()], number=1, seconds=ANSWER_SECONDS)
            return self.get(ready[0]) if ready else {}
        except RayError:
            return None

    def events(self, worker: str) -> list[Any]:
        """Return the events of a worker since the last call, or an empty list if the monitor was lost."""
        try:
            return [*self.get(self._monitor.take_events.remote(worker))]
        except RayError:
            return []


START_SECONDS = 60.0  # at least, for a process to report for the first time


class Watch:
    """Latest reports of the ranks, and their times.

    Args:
        cluster: source of the reports.
        hang_seconds: how long a rank may begin no layer.
    """

    def __init__(self, cluster: RayCluster, hang_seconds: float) -> None:
        self._cluster = cluster
        self._hang_seconds = hang_seconds
        self._signs: Mapping[str, Sign] = {}
        self._heard = 0.0  # when the signs came
        self._alive: dict[str, float] = {}  # when each rank last made progress, or was seen to have a process

    def listen(self) -> bool:
        """Query the monitor. Returns False if it was lost with its node. Ray then restarts it elsewhere."""
        signs = self._cluster.signs()
        if signs is None:
            return False
        self._signs = signs
        self._heard = self._cluster.now()
        for name, sign in signs.items():
            self._alive[name] = self._heard - sign.silence
        return True

    def complaint(self, gang: Gang, begun: float) -> str:
        """Return why a gang counts as hanging in its round, or an empty string if it does not hang."""
        now = self._cluster.now()
        for name in gang.find_processes():
            self._alive.setdefault(name, now)
        silence = {name: now - self._alive[name] for name in gang.names if name in self._alive}
        hanging = late(silence, self._signs, now - begun, self._hang_seconds)
        if not hanging:
            return ""
        return f"rank {hanging[0]} made no progress in {silence[hanging[0]]:.0f} seconds"

    def doing(self, gang: Gang, begun: float) -> Doing | None:
        """Return the activity that the first rank of a gang has reported in its round, if any."""
        sign = self._signs.get(gang.names[0])
        if sign is None:
            return None
        reported_at = self._heard - sign.age
        return sign.doing if reported_at > begun else None


def late(silence: Mapping[str, float], heard: Collection[str], elapsed: float, hang_seconds: float) -> list[str]:
    """Return the ranks of a gang that have made no progress for too long although they had work.

    Args:
        silence: seconds since each rank with a process last made progress, or was first seen.
        heard: the ranks that report; others may still be starting.
        elapsed: seconds since the gang's round began.
    """
    if elapsed <= hang_seconds:
        return []
    late_ranks = []
    for name, seconds in silence.items():
        limit = hang_seconds if name in heard else max(hang_seconds, START_SECONDS)
        if seconds > limit:
            late_ranks.append(name)
    return late_ranks
