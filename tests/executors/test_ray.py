"""A real Ray cluster on this machine: the same bytes as in one process, whatever dies on the way.

Tests of the default tier take 5 to 10 seconds each where workers start anew; the first one waits 15 to 30 seconds for
the cluster. `test_pool` has the same faults on a simulated cluster.
"""

from __future__ import annotations

import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from support.causal_lm import SMALL, random_shard
from support.commands import Command
from support.processes import Harming, ray_processes, wait_until
from support.ray_cluster import TWENTY_SHARDS, Cluster
from support.tables import assert_same_tables, measured_files

import avss_dist
from avss_dist.core.errors import RunFailed
from avss_dist.core.intervention import NO_INTERVENTION, Intervention
from avss_dist.core.settings import Execution, Settings
from avss_dist.executors.interface import Executor
from avss_dist.executors.local import LocalExecutor, open_executor
from avss_dist.executors.ray import cluster, gang, queue
from avss_dist.executors.ray.executor import RayExecutor
from avss_dist.executors.ray.worker import ShardAssignment, Worker
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.checkpoints import resolve
from avss_dist.runs import run as partials
from avss_dist.runs.events import RunEvent, ShardMeasured
from avss_dist.runs.job_file import RunSpec
from avss_dist.runs.planner import Planner
from avss_dist.runs.run import RunInProgress
from avss_dist.tasks.cells import Cell
from avss_dist.tasks.task import Row
from avss_dist.tasks.text_loss import TextLoss
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.store import Receipt, Store, shared


def score(model: Path, out: Path, **changes: Any) -> avss_dist.Run:
    return avss_dist.score(model, warehouse=out, corpus="builtin:pydoc", **{**TWENTY_SHARDS, **changes})


@pytest.fixture(scope="module")
def undisturbed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    assert score(tiny_llama, out, executor="local").num_shards == 20
    return out


@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize("sent_bytes", [0, queue.SENT_BYTES])
def test_any_number_of_workers_gives_the_same_bytes(
    sent_bytes: int, tiny_llama: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens of large shards come from the object store, those of small ones with the call."""
    monkeypatch.setattr(queue, "SENT_BYTES", sent_bytes)
    run = score(tiny_llama, tmp_path, executor="ray", replicas=2)
    assert run.status == "done"
    assert_same_tables(tmp_path, undisturbed)
    (row,) = Warehouse(tmp_path).runs().to_pylist()
    assert (row["replicas"], row["threads"]) == (2, 1)


@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize("harm", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_lost_worker_is_replaced_and_nothing_counts_twice(
    harm: signal.Signals, tiny_llama: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Takes over 8 seconds for a stopped worker: it begins no layer for as long, and is then killed."""
    harming = Harming({3: harm})
    run = score(tiny_llama, tmp_path, executor="ray", replicas=2, hang_seconds=8, on_event=harming)
    assert len(harming.victims) == 1 and run.status == "done"
    assert harming.arrived == 20
    assert_same_tables(tmp_path, undisturbed)
    wait_until(lambda: not harming.victims[0].is_running())


@dataclass(frozen=True, eq=False)
class DisturbedOnce(TextLoss):
    """A loss whose first worker kills itself."""

    mark: Path = Path()

    @property
    def key(self) -> str:
        return "loss"

    def __call__(self, model: LanguageModel, intervention: Intervention = NO_INTERVENTION) -> list[Row]:
        with suppress(FileExistsError):
            os.close(os.open(self.mark, os.O_CREAT | os.O_EXCL))
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(model, intervention)


@pytest.mark.usefixtures("shared_ray", "this_module_travels")
def test_cells_give_what_one_process_gives_whoever_is_lost(tiny_llama: Path, tmp_path: Path) -> None:
    settings = Settings(**SMALL)
    shared: dict[str, Any] = {"run_id": "e", "checkpoint": resolve(str(tiny_llama)), "settings": settings}
    cells = [
        Cell(**shared, task="loss", part=i, measure=DisturbedOnce(random_shard(1 + i % 5), mark=tmp_path / str(i)))
        for i in range(6)
    ]
    for cell in cells[:4]:
        cell.measure.mark.touch()  # type: ignore[attr-defined]

    def samples(executor: Executor) -> dict[int, bytes]:
        with closing(executor):
            return {cell.part: rows.rows[0].samples.tobytes() for cell, rows in executor.run_cells(iter([cells]))}  # type: ignore

    on_ray = samples(RayExecutor(Execution(executor="ray", replicas=2), settings))
    assert len(list(tmp_path.iterdir())) == 6 and on_ray == samples(LocalExecutor(settings))


def test_a_stopped_driver_is_resumed(shared_ray: Cluster, tiny_llama: Path, undisturbed: Path, tmp_path: Path) -> None:
    """The partials are kept, the same command finishes what is missing; `test_liveness` presses Ctrl-C."""
    arguments = ["--max-sequences", "160", "--sequence-length", "64", "--batch-size", "2", "--sequences-per-shard", "8"]
    place = ("-w", tmp_path, "--address", shared_ray.address, "--replicas", 2)
    driver = Command("score", tiny_llama, "--corpus", "builtin:pydoc", *place, *arguments)
    partials = tmp_path / "shard_stats"
    wait_until(lambda: len(list(partials.rglob("*.parquet"))) >= 1 or not driver.running())
    driver.send(signal.SIGTERM)
    code, _, said = driver.wait()
    assert code == 143, said
    assert "run the same command again" in said and "Traceback" not in said
    kept = len(list(partials.rglob("*.parquet")))
    assert 1 <= kept < 20 and not list((tmp_path / "scores").rglob("*.parquet"))
    run = score(tiny_llama, tmp_path, executor="local")
    assert (run.status, run.resumed_shards) == ("done", kept)
    assert_same_tables(tmp_path, undisturbed)


@pytest.mark.usefixtures("shared_ray")
def test_workers_write_and_say_little(tiny_llama: Path, undisturbed: Path, tmp_path: Path) -> None:
    """A partial goes to the warehouse from where it is measured; the driver hears a receipt of it."""
    settings, execution = Settings(**TWENTY_SHARDS), Execution(executor="ray", replicas=1)
    with closing(open_executor(execution, settings)) as executor:
        store = Store(tmp_path)
        store.create()
        spec = RunSpec(
            model=str(tiny_llama), corpus="builtin:pydoc", settings=settings, execution=execution, title="", name=""
        )
        planned = Planner(executor, store).prepare(spec)
        with shared(store) as warehouse:
            running = RunInProgress(planned, store, fresh=False, shared=warehouse)
            outcomes = [outcome for _, outcome in executor.run(iter([running.shards]))]
    assert sorted(outcome.shard_id for outcome in outcomes if isinstance(outcome, Receipt)) == list(range(20))
    assert max(len(pickle.dumps(outcome)) for outcome in outcomes) < 2000
    sizes = {file.stat().st_size for file in (tmp_path / "shard_stats").rglob("*.parquet")}
    assert {outcome.size for outcome in outcomes if isinstance(outcome, Receipt)} == sizes
    assert [file.name for file in (tmp_path / "runs").iterdir()] == [f".plan-{planned.run.run_id}"]  # no mark is left
    run = score(tiny_llama, tmp_path, executor="local")
    assert run.resumed_shards == 20
    assert_same_tables(tmp_path, undisturbed)


@pytest.mark.nightly
@pytest.mark.usefixtures("shared_ray")
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system takes root")
def test_a_warehouse_that_workers_do_not_see_is_written_by_the_driver(
    tiny_llama: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """The folder is a file system that the driver alone has; the workers live outside, and the run's notes say so."""
    folder = tmp_path / "warehouse"
    folder.mkdir()
    arguments = ["--max-sequences", "160", "--sequence-length", "64", "--batch-size", "2", "--sequences-per-shard", "8"]
    command = [sys.executable, "-m", "avss_dist", "score", str(tiny_llama), "--corpus", "builtin:pydoc", *arguments]
    command += ["-w", str(folder), "--partition", "single", "--address", ray.get_runtime_context().gcs_address]
    inside = f"mount -t tmpfs none {folder} && {shlex.join(command)} && cp -r {folder} {tmp_path}/copy"
    subprocess.run(["unshare", "--mount", "sh", "-c", inside], check=True)
    assert list(folder.iterdir()) == []
    (run,) = Warehouse(tmp_path / "copy").runs().to_pylist()
    assert "some workers do not reach the warehouse: the driver wrote for them" in run["notes"]
    assert measured_files(tmp_path / "copy") == measured_files(undisturbed)


@pytest.mark.nightly
@pytest.mark.usefixtures("shared_ray")
def test_tasks_merge_to_the_same_bytes(
    tiny_llama: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks are merged on the cluster, while a worker of the next run holds its CPU; damage is told from there too."""
    monkeypatch.setattr(partials, "MERGED_HERE", 0)
    applied: list[range] = []
    own = RayExecutor.apply

    def spy(self: RayExecutor, function: Any, items: Any) -> Iterator[Any]:
        applied.extend(items)
        return own(self, function, items)

    monkeypatch.setattr(RayExecutor, "apply", spy)
    score(tiny_llama, tmp_path / "whole", executor="ray", replicas=1)
    assert len(applied) == 20
    assert_same_tables(tmp_path / "whole", undisturbed)
    with pytest.raises(RunFailed, match="is damaged or missing"):
        score(tiny_llama, tmp_path / "damaged", executor="ray", on_event=Damaging(tmp_path / "damaged"))


class Damaging:
    """Flips a bit of a partial after its receipt has come."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._arrived = folder, 0

    def __call__(self, event: RunEvent) -> None:
        self._arrived += isinstance(event, ShardMeasured)
        if self._arrived == 3 and isinstance(event, ShardMeasured):
            file = sorted((self._folder / "shard_stats").rglob("*.parquet"))[0]
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 1
            file.write_bytes(data)


class WaitsBeforeShardTen(Worker):
    """A run that does not end before what happens to it is seen."""

    def measure(self, assignment: ShardAssignment) -> Any:
        if assignment.shard and assignment.shard.shard_id >= 10:
            time.sleep(3600)
        return super().measure(assignment)


@pytest.fixture
def this_module_travels() -> Iterator[None]:
    """Workers cannot import a test module: its classes go to them by value."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.mark.nightly
@pytest.mark.usefixtures("warm_workers", "this_module_travels")
@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("ray::DashboardAgent", r"(?s)The Ray node of this process has died.*dashboard_agent.log"),
        ("gcs_server", r"(?s)The Ray cluster is lost: its head.*Run the same command again"),
    ],
)
def test_a_run_ends_with_its_cluster_and_says_so(
    part: str,
    message: str,
    tiny_llama: Path,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without its dashboard agent, Ray takes a node down; without the GCS, it would end this process after a minute."""
    monkeypatch.setattr(cluster, "HEAD_SECONDS", 1.0)
    monkeypatch.setattr(gang, "Worker", WaitsBeforeShardTen)

    def kill(event: RunEvent) -> None:
        for process in ray_processes(part) if isinstance(event, ShardMeasured) else ():
            process.kill()

    with pytest.raises(RunFailed, match=message):
        score(tiny_llama, tmp_path, executor="ray", replicas=2, placement_seconds=3600, on_event=kill)
    assert not ray.is_initialized() and "(raylet)" not in capsys.readouterr().out
    (row,) = Warehouse(tmp_path).runs().to_pylist()
    assert row["status"] == "failed" and re.search(message, row["error"])
    run = score(tiny_llama, tmp_path, executor="local")
    assert run.status == "done" and run.resumed_shards >= 1
    assert_same_tables(tmp_path, undisturbed)
