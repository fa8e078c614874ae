"""Ray's own autoscaler on this machine: nodes come when work waits for a place, and go when they have none."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.tags import STATUS_UP_TO_DATE, TAG_RAY_NODE_KIND, TAG_RAY_NODE_STATUS, TAG_RAY_USER_NODE_TYPE
from ray.util import get_node_ip_address

OBJECTS = "100000000"  # bytes of a node's object store
LISTS = "cluster_synced_files initialization_commands setup_commands head_setup_commands worker_setup_commands"
LISTS += " head_start_ray_commands worker_start_ray_commands rsync_exclude rsync_filter"


class LocalNodes(NodeProvider):  # type: ignore[misc]
    """Every node is a raylet with one CPU, at a loopback address of its own."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self._lock = threading.RLock()
        self._made = 1
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._tags = {"head": {TAG_RAY_NODE_KIND: "head", **_tags("head")}}

    def non_terminated_nodes(self, tag_filters: Mapping[str, str]) -> list[str]:
        with self._lock:
            for node in [node for node, process in self._processes.items() if process.poll() is not None]:
                del self._processes[node], self._tags[node]
            return [node for node, tags in self._tags.items() if tag_filters.items() <= tags.items()]

    def is_running(self, node_id: str) -> bool:
        return node_id in self._tags

    def is_terminated(self, node_id: str) -> bool:
        return node_id not in self._tags

    def node_tags(self, node_id: str) -> dict[str, str]:
        return dict(self._tags[node_id])

    def set_node_tags(self, node_id: str, tags: Mapping[str, str]) -> None:
        self._tags[node_id].update(tags)

    def internal_ip(self, node_id: str) -> str:
        return str(self.provider_config["head"]) if node_id == "head" else node_id

    external_ip = internal_ip

    def create_node(self, node_config: dict[str, Any], tags: Mapping[str, str], count: int) -> None:
        for _ in range(count):
            with self._lock:
                self._made += 1
                node = f"127.0.0.{self._made}"
                self._tags[node] = {**tags, **_tags(tags[TAG_RAY_USER_NODE_TYPE])}
                self._processes[node] = self._start(node)

    def _start(self, node: str) -> subprocess.Popen[bytes]:
        with open(self.provider_config["log"], "ab") as log:
            return subprocess.Popen(
                [*_ray(1), "--address", self.provider_config["address"], "--node-ip-address", node],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def terminate_node(self, node_id: str) -> None:
        with self._lock:
            self._processes.pop(node_id).terminate()
            del self._tags[node_id]

    @staticmethod
    def bootstrap_config(cluster_config: dict[str, Any]) -> dict[str, Any]:
        return cluster_config


def _ray(cpus: int) -> list[str]:
    """The command that runs a node, until it is ended."""
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
    return [*ray, "--num-cpus", str(cpus), "--object-store-memory", OBJECTS]


def _tags(kind: str) -> dict[str, str]:
    return {TAG_RAY_USER_NODE_TYPE: kind, TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE}


class AutoscaledCluster:
    """A head without CPUs, for a ``with`` block; up to so many nodes of one CPU come by themselves.

    Attributes:
        address: ``HOST:PORT`` of the head.
    """

    def __init__(self, most: int, *, idle_seconds: float = 10.0) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="avss-as-")
        self._most, self._idle_seconds = most, idle_seconds
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = f"{get_node_ip_address()}:{free.getsockname()[1]}"

    def __enter__(self) -> AutoscaledCluster:
        host, port = self.address.split(":")
        folder = Path(self._folder.name)
        (folder / "autoscaling.yaml").write_text(json.dumps(self._config(host, folder)), encoding="utf-8")
        options = [f"--autoscaling-config={folder / 'autoscaling.yaml'}", "--include-dashboard", "false"]
        self._head = subprocess.Popen(
            [
                *_ray(0),
                "--head",
                "--port",
                port,
                "--node-ip-address",
                host,
                "--temp-dir",
                str(folder / "ray"),
                *options,
            ],
            env={**os.environ, "AUTOSCALER_UPDATE_INTERVAL_S": "1"},
            stdout=subprocess.DEVNULL,
        )
        return self

    def __exit__(self, *_: object) -> None:
        for process in [*psutil.Process(self._head.pid).children(recursive=True), self._head]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._head.wait()
        self._folder.cleanup()

    def _config(self, host: str, folder: Path) -> dict[str, Any]:
        kinds = {"head": (0, 0), "worker": (1, self._most)}
        return {
            **{name: [] for name in LISTS.split()},
            **{name: {} for name in ("docker", "auth", "file_mounts")},
            "file_mounts_sync_continuously": False,
            "cluster_name": "local",
            "provider": {
                "type": "external",
                "module": f"{__name__}.{LocalNodes.__name__}",
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
                "head": host,
                "address": self.address,
                "log": str(folder / "nodes.log"),
            },
            "max_workers": self._most,
            "available_node_types": {
                kind: {"resources": {"CPU": cpus}, "node_config": {}, "min_workers": 0, "max_workers": most}
                for kind, (cpus, most) in kinds.items()
            },
            "head_node_type": "head",
            "upscaling_speed": 100,
            "idle_timeout_minutes": self._idle_seconds / 60,
        }
