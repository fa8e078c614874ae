"""The Ray actor that is one rank of a replica, and its assignments."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import ray
import torch
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.util import get_node_ip_address

from avss_dist.core.devices import pick_device
from avss_dist.core.errors import ModelError
from avss_dist.core.streams import progress_to
from avss_dist.corpus.shards import Shard
from avss_dist.measure.shard import analyze_shard, follow
from avss_dist.models.checkpoint.convert import convert_pickles
from avss_dist.models.checkpoint.locate import Checkpoint, resolve
from avss_dist.partition.replica import Replica
from avss_dist.runs.ray.heartbeats import Doing
from avss_dist.runs.work import RankTask, Receipt, ReplicaSlot, ReplicaSpec
from avss_dist.tasks.task import Cell, CellResult, Heartbeat, measure_cell
from avss_dist.warehouse.encoding import encode_shard
from avss_dist.warehouse.schema import RunIdentity
from avss_dist.warehouse.shared import OpenShared

BEAT_SECONDS = 1.0
DRIVER_WRITES = "some workers do not reach the warehouse: the driver wrote for them"
UnitResult = Receipt | CellResult
Event = TypeVar("Event")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ShardAssignment:
    """A shard to be measured, or the forward passes of a rank that has no shard while others measure one.

    Attributes:
        shard: the shard; None for a rank without one in this round.
        rows: rows in a batch.
        forwards: number of forward passes of every rank in this round.
        warehouse: warehouse that the partial is written to, if this worker reaches it.
    """

    shard: Shard | None = None
    rows: int
    forwards: int
    run_id: str
    warehouse: OpenShared | None = None

    def run(
        self, spec: ReplicaSpec, model: Replica, heartbeat: Heartbeat, computed: Callable[[], None]
    ) -> Receipt | None:
        """Measure the shard, and return its receipt, or None where this rank reports none.

        The partial is encoded and written here, for there are more workers than drivers.

        Args:
            model: the replica that `runs.work.ReplicaSpec.open` returned.
            heartbeat: to be called whenever a layer begins.
            computed: may be called when the model can be used for another unit.
        """
        if self.shard is None:
            follow(model, self.forwards)
            return None
        result = analyze_shard(
            model,
            self.shard,
            spec.settings,
            rows=self.rows,
            forwards=self.forwards,
            heartbeat=heartbeat,
            computed=computed,
        )
        if not model.reports_stats:
            return None
        identity = RunIdentity(
            run_id=self.run_id,
            model=spec.checkpoint.name,
            revision=spec.checkpoint.revision,
            family=result.model["family"],
        )
        files = encode_shard(identity, result)
        # Asked last: the run may have ended while this worker measured a shard that another one had finished.
        store = self.warehouse() if self.warehouse else None
        if store:
            store.write_shard_files(self.run_id, result.shard_id, files)
            files = {}  # The driver has nothing to write.
        elif self.warehouse:
            notes = [*result.model["notes"], DRIVER_WRITES]
            files = encode_shard(identity, replace(result, model={**result.model, "notes": notes}))
        return Receipt(shard_id=result.shard_id, num_tokens=result.num_tokens, seconds=result.seconds, files=files)


@dataclass(frozen=True, kw_only=True)
class CellAssignment:
    """A cell to be measured in batches of ``rows`` rows."""

    cell: Cell
    rows: int

    def run(
        self, spec: ReplicaSpec, model: Replica, heartbeat: Heartbeat, computed: Callable[[], None]
    ) -> CellResult | None:
        """Measure the cell, and return its result, or None on ranks that report none.

        Every rank of a replica takes the cell, and rank 0 reports. See `ShardAssignment.run` for the arguments.
        """
        assert model.language_model is not None
        result = measure_cell(model.language_model, self.cell, rows=self.rows, heartbeat=heartbeat)
        return result if model.language_model.reports else None


Assignment = ShardAssignment | CellAssignment
"""Work of one rank for one unit. It is pickled."""


class Worker:
    """Ray actor that is one rank of a replica. It opens a model once, and measures the units that it is given.

    If the replica is a single GPU, Ray calls the actor in two threads: one concludes and writes a shard while the other
    computes the next.

    A background thread reports progress to `HeartbeatMonitor`: layers begun while measuring, seconds while opening, and
    the current activity if it takes long.

    Args:
        umask: that of the driver, as shards are files of whoever runs it. Ray's processes may have another.
    """

    def __init__(self, name: str, threads: int, monitor: ActorHandle, umask: int) -> None:
        torch.set_num_threads(threads)
        os.umask(umask)
        self._name = name
        self._monitor = monitor
        self._count = 0
        self._opening = True
        self._doing: Doing | None = None
        self._spec: ReplicaSpec | None = None
        self._slot = ReplicaSlot()
        self._model: Replica | None = None
        self._computing = threading.Lock()
        threading.Thread(target=self._report, daemon=True).start()

    def _report(self) -> None:
        while True:
            if self._opening:
                self._count += 1
            with suppress(Exception):  # a lost report only makes the worker look slower
                self._monitor.report.remote(self._name, self._count, self._doing)
            time.sleep(BEAT_SECONDS)

    def _heartbeat(self) -> None:
        self._opening = False
        self._count += 1

    def _report_activity(self, what: str, share: float) -> None:
        self._doing = what, share

    def address(self) -> tuple[str, int]:
        """Return the address of this node, and a free port there."""
        with socket.socket() as free:
            free.bind(("", 0))
            return get_node_ip_address(), int(free.getsockname()[1])

    def open(self, spec: ReplicaSpec, rank: int, first: tuple[str, int]) -> None:
        """Open a model, in place of the last one, together with the other ranks. See `runs.work.ReplicaSlot`.

        Args:
            first: the `address` of rank 0.
        """
        self._opening = True
        if spec.placement.ranks > 1 and not torch.distributed.is_initialized():
            from avss_dist.partition.group import join

            join(rank, spec.placement.ranks, first[0], first[1], device=pick_device(spec.settings.device))
        if spec != self._spec:
            self._spec = None
            self._model = None
            checkpoint = resolve_on_node(spec.checkpoint, pickles=spec.settings.allow_pickle)
            self._model = self._slot.open(replace(spec, checkpoint=checkpoint))
            self._spec = spec
        self._opening = False

    def run(self, task: RankTask[Event, T], rank: int, ranks: int, first: tuple[str, int]) -> T:
        """Do a task together with the other ranks, and return this rank's result.

        Args:
            first: the `address` of rank 0.
        """
        from avss_dist.partition.group import join

        sent: ObjectRef | None = None

        def tell(event: Event) -> None:
            nonlocal sent
            sent = self._monitor.tell.remote(self._name, event)

        try:
            join(rank, ranks, first[0], first[1], device=pick_device(task.device), host_tensors=True)
            return task.run(self._heartbeat, tell)
        finally:
            self._opening = True  # counts as progress while other ranks work
            if sent is not None:
                with suppress(Exception):
                    ray.get(sent)  # the driver has all events once it has the result

    def measure_round(self, assignments: Sequence[Assignment]) -> list[UnitResult | None]:
        """Return the results of this rank's assignments in a round, in their order.

        Where an assignment fails, the results before it are returned. The next round begins with it and raises its
        error.
        """
        results: list[UnitResult | None] = []
        for assignment in assignments:
            try:
                results.append(self.measure(assignment))
            except Exception:
                if not results:
                    raise
                break
        return results

    def measure(self, assignment: Assignment) -> UnitResult | None:
        """Return the result of an assignment with the open model."""
        with ExitStack() as stack:
            stack.enter_context(self._computing)
            assert self._spec is not None
            assert self._model is not None
            self._heartbeat()
            stack.callback(setattr, self, "_doing", None)
            stack.enter_context(progress_to(self._report_activity))
            return assignment.run(self._spec, self._model, self._heartbeat, stack.close)


def resolve_on_node(checkpoint: Checkpoint, *, pickles: bool = False) -> Checkpoint:
    """Return the driver's checkpoint as this node has it. One from the hub is downloaded if necessary.

    Args:
        pickles: allow the conversion of weights that are stored as pickles.

    Raises:
        ModelError: a folder or file that this node does not see, or a hub that it cannot reach.
    """
    if Path(checkpoint.path).exists():
        return checkpoint
    if pickles and checkpoint.origin and Path(checkpoint.origin).is_dir():  # The cache is that of another node.
        convert_pickles(checkpoint.origin, trust_remote_code=checkpoint.trust_remote_code)
        converted = resolve(checkpoint.origin, trust_remote_code=checkpoint.trust_remote_code)
        return replace(checkpoint, path=converted.path)
    if checkpoint.source != "hub":
        raise ModelError(
            f"The checkpoint '{checkpoint.path}' does not exist on the worker node {socket.gethostname()}.",
            "Put checkpoints on a disk that all nodes mount under the same path.",
        )
    spec = f"{checkpoint.name}@{checkpoint.revision}"
    if pickles:
        convert_pickles(spec)
    return resolve(spec, trust_remote_code=checkpoint.trust_remote_code)
