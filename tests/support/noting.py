"""Workers that write down what they begin, and may be held up there: tests know who had which shard."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import ray
from ray import cloudpickle

from avss_dist.runs.ray import gang
from avss_dist.runs.ray.worker import ShardAssignment, Worker
from avss_dist.runs.work import ReplicaSpec


class Note(NamedTuple):
    """Something that began: ``opens`` or a shard's id, where, by whom, when (seconds since the epoch)."""

    what: str
    node: str
    worker: str
    at: float


class NotingWorker(Worker):
    """Writes down where it opens a model and which shards it begins, and waits at gates until they are opened.

    Attributes:
        folder: of the notes and the gates; it travels to the workers with the class.
        gates: the names of gates, by the first shard that waits there.
    """

    folder: Path
    gates: Mapping[int, str]

    def open(self, spec: ReplicaSpec, rank: int, first: Any) -> None:
        self._begin("opens", None)
        super().open(spec, rank, first)

    def measure(self, assignment: ShardAssignment) -> Any:
        if assignment.shard is not None:  # else this rank runs along with others
            shard = assignment.shard.shard_id
            gate = max((first for first in self.gates if first <= shard), default=None)
            self._begin(str(shard), None if gate is None else self.gates[gate])
        return super().measure(assignment)

    def _begin(self, what: str, gate: str | None) -> None:
        node = ray.get_runtime_context().get_node_id()
        (self.folder / f"{what} {node} {self._name} {time.time()}").touch()
        while gate is not None and not (self.folder / gate).exists():
            time.sleep(0.01)


class Notes:
    """What workers wrote down in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __iter__(self) -> Iterator[Note]:
        """In the order of time."""
        words = [file.name.split() for file in self._folder.iterdir()]
        return iter(sorted((Note(*w[:3], float(w[3])) for w in words if len(w) == 4), key=lambda note: note.at))

    @property
    def opens(self) -> list[Note]:
        """Models that are being opened, or were."""
        return [note for note in self if note.what == "opens"]

    @property
    def shards(self) -> list[Note]:
        """Shards that were begun, each as often as it was."""
        return [note for note in self if note.what != "opens"]

    def open(self, gate: str) -> None:
        """Let those go on who wait."""
        (self._folder / gate).touch()


@contextmanager
def noting(folder: Path, gates: Mapping[int, str]) -> Iterator[Notes]:
    """All workers that are started meanwhile take notes."""
    module = __import__(__name__, fromlist=["NotingWorker"])
    NotingWorker.folder = folder
    NotingWorker.gates = gates
    cloudpickle.register_pickle_by_value(module)  # workers cannot import it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gang, "Worker", NotingWorker)
        yield Notes(folder)
    cloudpickle.unregister_pickle_by_value(module)
