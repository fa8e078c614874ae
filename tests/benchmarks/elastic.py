"""A run on a cluster that changes: from three nodes to five, then one is taken away with notice and two are lost.

    python tests/benchmarks/elastic.py [--rows 1024] [--keep FOLDER]

A Ray cluster of nodes of one CPU on this machine, a random model of 8 layers, ``--replicas 2..5``. Prints who joined
and left, when, and how many shards were begun by then; compares the tables with those of a run with one worker.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from support.benchmark_cluster import SIZES, write_model  # isort: skip  (before Ray)
import ray
from support.noting import Notes, noting
from support.processes import wait_until
from support.ray_cluster import Cluster
from support.tables import assert_same_tables

import avss_dist


class Weather(threading.Thread):
    """What happens to the cluster while a run goes on, and what is seen of it.

    Args:
        num_shards: of the run; things happen after shares of them.
    """

    def __init__(self, cluster: Cluster, notes: Notes, num_shards: int) -> None:
        super().__init__(daemon=True)
        self._cluster, self._notes, self._num_shards = cluster, notes, num_shards
        self._names = {node.node_id: f"node {i}" for i, node in enumerate(cluster.nodes, 1)}
        self.events: list[tuple[float, str]] = []

    def run(self) -> None:
        """Grow, give notice, lose two."""
        self._after(0.1)
        for _ in range(2):
            node = self._cluster.grow()
            self._names[node.node_id] = f"node {len(self._names) + 1}"
            self._say(f"{self._names[node.node_id]} comes")
        wait_until(lambda: len({note.node for note in self._notes.shards}) == len(self._names))
        self._after(0.5)
        leaving, *others = self._cluster.nodes[1:]
        self._cluster.drain(leaving)
        self._say(f"{self._names[leaving.node_id]} is given notice")
        wait_until(lambda: not any(node["Alive"] for node in ray.nodes() if node["NodeID"] == leaving.node_id))
        self._say(f"{self._names[leaving.node_id]} has ended by itself")
        self._after(0.75)
        for node in others[:2]:
            self._say(f"{self._names[node.node_id]} is lost")
            self._cluster.kill_node(node)

    def _after(self, share: float) -> None:
        wait_until(lambda: len({note.what for note in self._notes.shards}) >= share * self._num_shards)

    def _say(self, what: str) -> None:
        self.events.append((time.time(), what))

    def timeline(self) -> list[tuple[float, str]]:
        """What happened, and who joined and began its last shard, in the order of time."""
        events = list(self.events)
        for worker in {note.worker for note in self._notes}:
            of = [note for note in self._notes if note.worker == worker]
            shards = [note for note in of if note.what != "opens"]
            events.append((of[0].at, f"a replica joins on {self._names[of[0].node]}"))
            if shards:
                last = f"begins shard {shards[-1].what}, its last of {len(shards)}"
                events.append((shards[-1].at, f"the replica on {self._names[of[0].node]} {last}"))
        return sorted(events)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024, help="of text, in shards of 8")
    parser.add_argument("--keep", help="folder of the warehouses; a temporary one if left out")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, Cluster() as cluster:
        folder = Path(arguments.keep or temporary)
        model = write_model(folder)
        options = {**SIZES, "max_sequences": arguments.rows, "corpus": "builtin:pydoc", "address": cluster.address}
        (folder / "notes").mkdir()
        with noting(folder / "notes") as notes:
            weather = Weather(cluster, notes, arguments.rows // SIZES["sequences_per_shard"])
            weather.start()
            begun = time.time()
            run = avss_dist.score(model, warehouse=folder / "elastic", replicas="2..5", **options)
            ended = time.time()
            weather.join()
        one = avss_dist.score(model, warehouse=folder / "one", replicas=1, **options)
        print(f"{'seconds':>8}{'begun':>7}  what")
        for at, what in weather.timeline():
            print(f"{at - begun:>8.1f}{len({n.what for n in notes.shards if n.at <= at}):>7}  {what}")
        times = Counter(note.what for note in notes.shards)
        print(f"{ended - begun:>8.1f}{len(times):>7}  the run is {run.status}: {run.num_shards} shards", end=", ")
        print(f"{times.total() - len(times)} of them begun twice")
        assert_same_tables(folder / "elastic", folder / "one")
        print(f"the tables are, byte for byte, those of the run with one worker ({one.seconds:.1f} s)")


if __name__ == "__main__":
    main()
