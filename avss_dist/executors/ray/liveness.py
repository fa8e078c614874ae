"""Checks that the parts of a Ray cluster are alive that a driver needs: its head, and the node of this process."""

from __future__ import annotations

import os
import socket
import time

import grpc
import ray

from avss_dist.core.errors import RunFailed

CONNECT_SECONDS = 10.0  # for the head of a cluster to accept a connection


HEAD_SECONDS = float(os.environ.get("RAY_gcs_rpc_server_reconnect_timeout_s", 60)) / 2  # noqa: SIM112
"""Seconds that the head may be away, as it can be restarted. Ray ends this process silently after twice that."""
RETRY_SECONDS = 0.5
KEPT = "Run the same command again: everything measured so far is kept."


def require_gcs(address: str) -> None:
    """Raise OSError soon if no gRPC server answers at ``HOST:PORT``; Ray would try to reach its head for minutes.

    An address without a port, such as ``local``, is accepted, and with TLS only the connection is tried.
    """
    if (server := _connect(address)) and os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
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
    hosts = [host, ray.util.get_node_ip_address()] if host in ("127.0.0.1", "localhost") else [host]
    for i, name in enumerate(hosts):  # Ray takes the loopback address for the one that others see
        try:
            socket.create_connection((name, int(port)), timeout=CONNECT_SECONDS).close()
            return f"[{name}]:{port}" if ":" in name else f"{name}:{port}"
        except OSError:
            if i == len(hosts) - 1:
                raise
    return ""


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
            where = ray.get_runtime_context().gcs_address
            raise RunFailed(
                f"The Ray cluster is lost: its head (the GCS at {where}) has crashed or was killed.",
                f"Start it again. {KEPT}",
            )
        time.sleep(RETRY_SECONDS)


def node_lost() -> RunFailed:
    """Return the error for the loss of this process's node, after which it cannot start workers."""
    return RunFailed(
        "The Ray node of this process has died: its raylet or its dashboard agent crashed, or was killed.",
        f"See raylet.out and dashboard_agent.log in /tmp/ray/session_latest/logs. {KEPT}",
    )


def require_node() -> None:
    """Raise RunFailed if the head of the cluster or the node of this process is lost."""
    require_head()
    nodes = {node["NodeID"]: node["Alive"] for node in ray.nodes()}
    if not nodes.get(ray.get_runtime_context().get_node_id()):
        raise node_lost()
