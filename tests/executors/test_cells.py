"""Cells on Ray workers: the same rows as in one process, whatever dies, hangs, dawdles or does not fit on the way."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from support.causal_lm import SMALL, opened, random_shard
from support.commands import Command

from avss_dist import sparsify
from avss_dist.core.errors import AvssError, BatchTooLarge, ModelError, RunFailed
from avss_dist.core.intervention import NO_INTERVENTION, Intervention
from avss_dist.core.settings import Execution, Settings
from avss_dist.executors.base import Executor
from avss_dist.executors.local import LocalExecutor
from avss_dist.executors.ray import queue
from avss_dist.executors.ray.executor import RayExecutor
from avss_dist.executors.ray.heartbeats import HeartbeatMonitor
from avss_dist.executors.ray.watch import Watch
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.checkpoints import Checkpoint, resolve
from avss_dist.runs.api import score
from avss_dist.system.devices import devices_here
from avss_dist.system.progress_bar import tracked
from avss_dist.tasks.base import Measure, Row, TextLoss
from avss_dist.tasks.cells import Cell, measure_cell

pytestmark = [pytest.mark.nightly, pytest.mark.usefixtures("warm_workers")]

PARTS = 6
SETTINGS = Settings(**SMALL)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One private Ray, to whose workers the measures of this file travel by value."""
    from ray import cloudpickle

    cpus = devices_here("cpu").cpus
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    ray.shutdown()


class Loss(TextLoss):
    """The loss of random text; what happens to who is asked first is in `disturb`."""

    @property
    def key(self) -> str:
        return type(self).__name__

    def __call__(self, model: LanguageModel, intervention: Intervention = NO_INTERVENTION) -> list[Row]:
        self.disturb(model)
        return super().__call__(model, intervention)

    def disturb(self, model: LanguageModel) -> None: ...


@dataclass(frozen=True, eq=False)
class DisturbedOnce(Loss):
    """Whoever is first to measure it kills itself, freezes or dawdles."""

    mark: Path = Path()
    how: str = ""

    def disturb(self, model: LanguageModel) -> None:
        try:
            os.close(os.open(self.mark, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        if self.how == "dawdle":
            time.sleep(3600)
        os.kill(os.getpid(), signal.SIGKILL if self.how == "die" else signal.SIGSTOP)


@dataclass(frozen=True, eq=False)
class Halfway(Loss):
    """It has done half of what it does, and goes on when that is heard of."""

    heard: Path = Path()

    def disturb(self, model: LanguageModel) -> None:
        for step in tracked(range(4), "Waiting"):
            while step == 2 and not self.heard.exists():
                time.sleep(0.01)


class Poison(Loss):
    def disturb(self, model: LanguageModel) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class FitsWithOneRow(Loss):
    def disturb(self, model: LanguageModel) -> None:
        if model.settings.batch_size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")


class FitsNever(Loss):
    def disturb(self, model: LanguageModel) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")


def cells(folder: Path, measures: Sequence[Measure], drop: tuple[int, ...] = ()) -> list[Cell]:
    checkpoint = resolve(str(folder))
    shared: dict[str, Any] = {"run_id": "e", "checkpoint": checkpoint, "settings": SETTINGS, "task": "loss"}
    return [
        Cell(**shared, part=part, measure=measure, intervention=Intervention(removed=drop))
        for part, measure in enumerate(measures)
    ]


def losses(number: int = PARTS) -> list[Loss]:
    return [Loss(random_shard(rows=1 + part % 5)) for part in range(number)]


def outcomes(executor: Executor, asked: Sequence[Cell]) -> dict[int, Any]:
    """What each part gave: its samples as bytes, or an error; no part comes twice."""
    found: dict[int, Any] = {}
    with closing(executor):
        for cell, result in executor.run_cells(iter([asked])):
            assert cell in asked and cell.part not in found
            found[cell.part] = result if isinstance(result, AvssError) else result.rows[0].samples.tobytes()
    return found


def on_ray(**execution: Any) -> RayExecutor:
    return RayExecutor(Execution(executor="ray", **{"replicas": 2, **execution}), SETTINGS)


@pytest.fixture(scope="module")
def undisturbed(tiny_llama: Path) -> dict[int, bytes]:
    """What one process measures."""
    return outcomes(LocalExecutor(SETTINGS), cells(tiny_llama, losses()))


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("how", [{1: "die", 4: "freeze"}, {4: "dawdle"}], ids=["lost", "late"])
def test_a_disturbed_worker_changes_nothing(
    how: dict[int, str], tiny_llama: Path, undisturbed: dict[int, bytes], tmp_path: Path
) -> None:
    """Who is lost or hangs is replaced, and the cell measured again; the cell of who is late is measured twice."""
    measures = losses()
    for part, what in how.items():
        measures[part] = DisturbedOnce(measures[part].shard, tmp_path / what, what)
    patience = 3600.0 if "dawdle" in how.values() else 5.0
    assert outcomes(on_ray(hang_seconds=patience), cells(tiny_llama, measures)) == undisturbed
    assert {mark.name for mark in tmp_path.iterdir()} == set(how.values())


@pytest.mark.usefixtures("cluster")
def test_a_cell_that_kills_its_workers_fails_alone(tiny_llama: Path, undisturbed: dict[int, bytes]) -> None:
    measures = losses()
    measures[2] = Poison(random_shard())
    found = outcomes(on_ray(replicas=1), cells(tiny_llama, measures))
    error = found.pop(2)
    assert isinstance(error, RunFailed) and f"Part 2 of loss failed {queue.ATTEMPTS} times" in str(error)
    assert found == {part: rows for part, rows in undisturbed.items() if part != 2}


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    "executor", [lambda: LocalExecutor(SETTINGS), lambda: on_ray(replicas=1)], ids=["local", "ray"]
)
def test_a_cell_that_does_not_fit_is_measured_with_half_the_rows(
    executor: Callable[[], Executor], tiny_llama: Path
) -> None:
    """Four rows, two, one; where one does not fit either, that cell fails. The next has four again."""
    shard = random_shard()
    found = outcomes(executor(), cells(tiny_llama, [FitsWithOneRow(shard), FitsNever(shard), Loss(shard)]))
    model = opened(tiny_llama, batch_size=1)
    (alone,) = Loss(shard)(model)
    assert found[0] == alone.samples.tobytes()
    assert isinstance(found[1], BatchTooLarge) and "1 x 32 tokens do not fit in memory" in str(found[1])
    assert isinstance(found[2], bytes)


@pytest.mark.usefixtures("cluster")
def test_an_error_is_of_its_cell_or_of_its_model(tiny_llama: Path, tmp_path: Path) -> None:
    (bad,) = cells(tiny_llama, losses(1), drop=(99,))
    absent = Checkpoint(name="gone", source="folder", path=str(tmp_path / "gone"), revision="0")
    gone = [
        Cell(run_id="e", checkpoint=absent, settings=SETTINGS, task="loss", part=i, measure=bad.measure) for i in (1, 2)
    ]
    (good,) = (cell for cell in cells(tiny_llama, losses(4)) if cell.part == 3)
    found = outcomes(on_ray(replicas=1), [bad, *gone, good])
    assert isinstance(found[0], ModelError) and "There is no layer 99" in str(found[0])
    assert all(
        isinstance(found[part], ModelError) and "does not exist on the worker node" in str(found[part])
        for part in (1, 2)
    )
    assert isinstance(found[3], bytes)


@pytest.mark.usefixtures("cluster")
def test_cells_wait_for_a_place_no_longer_than_said(tiny_llama: Path) -> None:
    @ray.remote(num_cpus=devices_here("cpu").cpus)
    class Occupant:
        def here(self) -> None: ...

    occupant = Occupant.remote()
    ray.get(occupant.here.remote())
    try:
        found = outcomes(on_ray(placement_seconds=2), cells(tiny_llama, losses(3)))
    finally:
        with suppress(ray.exceptions.RayError):
            ray.kill(occupant)
    assert sorted(found) == [0, 1, 2]
    assert all(
        isinstance(error, RunFailed) and "No worker was placed in 2 seconds" in str(error) for error in found.values()
    )


@pytest.mark.usefixtures("cluster")
def test_what_a_worker_does_is_heard_of(tiny_llama: Path, tmp_path: Path) -> None:
    slow, mark = Halfway(random_shard(rows=2), heard=tmp_path / "heard"), tmp_path / "heard"
    heard: list[tuple[int, str, float]] = []

    def underway(cell: Cell, what: str, share: float) -> None:
        heard.append((cell.part, what, share))
        if share == 0.5:
            mark.touch()

    with closing(on_ray(replicas=1)) as executor:
        found = [*executor.run_cells(iter([cells(tiny_llama, [slow, *losses(2)])]), underway)]
    assert not any(isinstance(result, AvssError) for _, result in found) and len(found) == 3
    assert (0, "Waiting", 0.5) in heard


@pytest.mark.usefixtures("cluster")
def test_what_was_said_before_a_round_is_not_said_of_it() -> None:
    monitor: Any = ray.remote(HeartbeatMonitor).options(num_cpus=0).remote()
    gang: Any = SimpleNamespace(names=["g.0"])
    watch, before = Watch(monitor, 60.0), time.monotonic()
    assert watch.listen() and watch.doing(gang, before) is None
    for doing in (("Repairing", 0.25), ("Repairing", 0.5)):
        ray.get(monitor.report.remote("g.0", 1, doing))
        assert watch.listen() and watch.doing(gang, before) == doing
    assert watch.doing(gang, time.monotonic()) is None
    ray.get(monitor.report.remote("g.0", 1))
    assert watch.listen() and watch.doing(gang, before) is None
    ray.kill(monitor)


def test_a_cell_beats_whenever_a_layer_begins_and_leaves_no_trace(tiny_llama: Path) -> None:
    model = opened(tiny_llama)
    (cell,) = cells(tiny_llama, [Loss(random_shard(rows=5))])
    beats: list[None] = []
    with_beat = measure_cell(model, cell, heartbeat=lambda: beats.append(None))
    without = measure_cell(model, cell)
    assert len(beats) == 3 * len(model.layers)  # five rows, two in a batch
    assert with_beat.rows[0].samples.tobytes() == without.rows[0].samples.tobytes()
    assert not any(layer.module._forward_pre_hooks for layer in model.layers)
    assert model.settings.batch_size == 2


KILLED = """
import json, os, signal, sys
from avss_dist import sparsify
from avss_dist.evaluation.events import CellDone

def die(event):
    if isinstance(event, CellDone):
        os.kill(os.getpid(), signal.SIGKILL)

sparsify(0.6, on_event=die, **json.loads(sys.argv[1]))
"""


@pytest.mark.usefixtures("cluster")
def test_two_workers_allocate_sparsity_as_one_process_does_also_after_a_kill(tiny_llama: Path, tmp_path: Path) -> None:
    options = {"max_sequences": 2, "sequence_length": 16, "batch_size": 2, "device": "cpu"}
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    score(tiny_llama, corpus="builtin:pydoc", warehouse=alone, sites=("inputs",), **options)
    shutil.copytree(alone, shared)
    sparsify(0.6, warehouse=alone, method="teal", **options).write(tmp_path / "alone.yaml")
    on_workers = {**options, "warehouse": str(shared), "method": "teal", "executor": "ray", "replicas": 2}
    address = ray.get_runtime_context().gcs_address
    (tmp_path / "killed.py").write_text(KILLED)
    driver = Command(tmp_path / "killed.py", json.dumps({**on_workers, "address": address}), program="python")
    assert driver.wait()[0] == -signal.SIGKILL
    kept = list((shared / "cells").rglob("*.parquet"))
    assert len(kept) == 1
    times = {path: path.stat().st_mtime_ns for path in kept}
    sparsify(0.6, **on_workers).write(tmp_path / "shared.yaml")
    assert (tmp_path / "shared.yaml").read_bytes() == (tmp_path / "alone.yaml").read_bytes()
    assert len(list((shared / "cells").rglob("*.parquet"))) == 3
    assert {path: path.stat().st_mtime_ns for path in kept} == times
