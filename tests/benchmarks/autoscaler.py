"""A run on a cluster without a CPU: Ray's own autoscaler brings nodes for its replicas, and takes them away.

    python tests/benchmarks/autoscaler.py [--rows 512] [--replicas 2..3]

The head has no CPU; each node is a raylet with one, started on this machine by Ray's autoscaler through a provider of
nodes. Prints when nodes came, when each replica joined, and when the nodes that had no work left went; compares the
tables with those of one process.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["RAY_AUTH_MODE"] = "disabled"

from support.benchmark_cluster import SIZES, write_model  # isort: skip  (before Ray)
import ray
from support.autoscaler import AutoscaledCluster
from support.noting import noting
from support.tables import assert_same_tables

import avss_dist


class Watch(threading.Thread):
    """Notes when nodes come and go, by address.

    Attributes:
        events: what happened, at which second since the epoch.
        alive: the ids of the nodes that have a CPU.
        over: ends it.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.events: list[tuple[float, str]] = []
        self.alive: set[str] = set()
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.2):
            if ray.is_initialized():
                nodes = {
                    node["NodeID"]: node for node in ray.nodes() if node["Resources"].get("CPU") or not node["Alive"]
                }
                now = {node_id for node_id, node in nodes.items() if node["Alive"]}
                for node_id in now ^ self.alive:
                    verb = "has come" if node_id in now else "has gone"
                    self.events.append((time.time(), f"node {nodes[node_id]['NodeManagerAddress']} {verb}"))
                self.alive = now


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512, help="of text, in shards of 8")
    parser.add_argument("--replicas", default="2..3")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, AutoscaledCluster(3) as cluster:
        folder = Path(temporary)
        model = write_model(folder)
        options = {**SIZES, "max_sequences": arguments.rows, "corpus": "builtin:pydoc"}
        (folder / "notes").mkdir()
        ray.init(cluster.address, log_to_driver=False)
        watch = Watch()
        watch.start()
        with noting(folder / "notes") as notes:
            begun = time.time()
            where: dict[str, Any] = {"executor": "ray", "address": cluster.address, "replicas": arguments.replicas}
            run = avss_dist.score(model, warehouse=folder / "scaled", placement_seconds=300, **where, **options)
            ended = time.time()
        while watch.alive:
            time.sleep(0.2)
        watch.over.set()
        watch.join()
        ray.shutdown()
        joined = [(note.at, "a replica joins") for note in notes if note.what == "opens"]
        last = (ended, f"the run is {run.status}: {run.num_shards} shards")
        for at, what in sorted([*watch.events, *joined, last]):
            print(f"{at - begun:>8.1f}  {what}")
        avss_dist.score(model, warehouse=folder / "one", executor="local", **options)
        assert_same_tables(folder / "scaled", folder / "one")
        print("the tables are, byte for byte, those of one process")


if __name__ == "__main__":
    main()
