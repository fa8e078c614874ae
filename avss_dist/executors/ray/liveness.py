"""What of a Ray cluster must live: its head, which knows where everything is, and the node of this process."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Set

import ray

from avss_dist.errors import RunFailed
from avss_dist.settings import CONNECT_SECONDS

HEAD_SECONDS = float(os.environ.get("RAY_gcs_rpc_server_reconnect_timeout_s", 60)) / 2  # noqa: SIM112
"""For how long the head may be away, which can be restarted. Ray ends this process without a word after twice that."""
RETRY_SECONDS = 0.5
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""How a client of HTTP/2, which gRPC is built on, begins: the preface, and empty settings (RFC 9113, 3.4)."""
KEPT = "Run the same command again: everything measured so far is kept."
ENDED = f"Error: this process was killed, or Ray ended it because its node or the head of the cluster was lost. {KEPT}"


def require_listening(address: str, *, greet: bool = False) -> None:
    """Raise OSError soon where nobody listens at ``HOST:PORT``; Ray would try for minutes.

    Args:
        greet: whoever listens must answer, too, as every gRPC server does at once.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")  # of IPv6
    if not host or not port.isdecimal() or "/" in host:
        return
    hosts = [host, ray.util.get_node_ip_address()] if host in ("127.0.0.1", "localhost") else [host]
    for i, name in enumerate(hosts):  # Ray takes the loopback address for the one that others see
        try:
            with socket.create_connection((name, int(port)), timeout=CONNECT_SECONDS) as server:
                if greet and os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
                    server.sendall(_HELLO)
                    if not server.recv(1):
                        raise ConnectionError("the connection was closed without an answer")
            return
        except OSError:
            if i == len(hosts) - 1:
                raise


def has_head() -> bool:
    """Whether the head of the cluster, the GCS, can be reached."""
    try:
        require_listening(ray.get_runtime_context().gcs_address)
    except OSError:
        return False
    return True


def require_head() -> None:
    """Wait for the head where it is away, as calls that need it would without end.

    Raises:
        RunFailed: it did not come back.
    """
    deadline = time.monotonic() + HEAD_SECONDS
    while not has_head():
        if time.monotonic() > deadline:
            where = ray.get_runtime_context().gcs_address
            raise RunFailed(
                f"The Ray cluster is lost: its head (the GCS at {where}) has crashed, or was killed.",
                f"Start it again. {KEPT}",
            )
        time.sleep(RETRY_SECONDS)


def node_lost() -> RunFailed:
    """The node of this process is lost: no worker that it starts can live then."""
    return RunFailed(
        "The Ray node of this process has died: its raylet or its dashboard agent crashed, or was killed.",
        f"raylet.out and dashboard_agent.log in /tmp/ray/session_latest/logs say why. {KEPT}",
    )


def draining_nodes() -> Set[str]:
    """The ids of nodes that are about to be taken away: they are given nothing new, and end when they are idle.

    A preemption notice, the autoscaler or ``ray drain-node`` says so. Of Ray's interfaces only this one tells without
    a dashboard; Ray Train asks it too.
    """
    return ray._private.state.state.get_draining_nodes().keys()


def require_node() -> None:
    """Raise RunFailed where the head of the cluster or the node of this process is lost."""
    require_head()
    nodes = {node["NodeID"]: node["Alive"] for node in ray.nodes()}
    if not nodes.get(ray.get_runtime_context().get_node_id()):
        raise node_lost()
