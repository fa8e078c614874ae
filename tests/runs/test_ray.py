"""A real Ray cluster on this machine: the same bytes as in one process, whatever dies on the way.

Tests of the default tier take 5 to 10 seconds each where workers start anew; the first one waits 10 to 20 seconds for
the cluster. `test_pool` has the same faults on a simulated cluster, and `test_gangs` has partitions without Ray.
"""

from __future__ import annotations

import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util import placement_group_table
from support.causal_lm import SMALL, random_shard
from support.checkpoints import checkpoint_at
from support.commands import Command
from support.noting import noting
from support.planning import run_spec
from support.processes import Harming, ray_processes, wait_until
from support.ray_cluster import NODES, TWENTY_SHARDS, Cluster
from support.tables import assert_same_evaluations, assert_same_tables, measured_files, run_rows, table_rows

import avss_dist
from avss_dist import ablate, evaluate
from avss_dist.core.errors import ConfigError, RunFailed
from avss_dist.core.intervention import NO_INTERVENTION, Intervention
from avss_dist.core.settings import Settings
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.partition.execution import Execution
from avss_dist.partition.placement import Placement
from avss_dist.runs import merging
from avss_dist.runs.events import RunEvent, ShardMeasured
from avss_dist.runs.in_progress import RunInProgress
from avss_dist.runs.local import Executor, LocalExecutor, open_executor
from avss_dist.runs.planner import Planner
from avss_dist.runs.ray import cluster, gang, queue
from avss_dist.runs.ray.executor import RayExecutor
from avss_dist.runs.ray.worker import ShardAssignment, Worker
from avss_dist.runs.threads import Submissions
from avss_dist.runs.work import Receipt
from avss_dist.tasks.task import Cell, MetricRow
from avss_dist.tasks.text_loss import TextLoss
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.store import Store

ARGUMENTS = ["--max-sequences", "160", "--sequence-length", "64", "--batch-size", "2", "--sequences-per-shard", "8"]


def score(model: Path, out: Path, **changes: Any) -> avss_dist.Run:
    return avss_dist.score(model, warehouse=out, corpus="builtin:pydoc", **{**TWENTY_SHARDS, **changes})


@pytest.fixture(scope="module")
def undisturbed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    assert score(tiny_llama, out, executor="local").num_shards == 20
    return out


@pytest.mark.nightly
@pytest.mark.usefixtures("shared_ray")
def test_any_number_of_workers_gives_the_same_bytes(tiny_llama: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = score(tiny_llama, tmp_path, executor="ray", replicas=2)
    assert run.status == "done"
    assert_same_tables(tmp_path, undisturbed)
    (row,) = run_rows(tmp_path)
    assert row["replicas"] == 2
    assert row["threads"] == 1


@pytest.mark.nightly
@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize("harm", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_lost_worker_is_replaced_and_nothing_counts_twice(
    harm: signal.Signals, tiny_llama: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Takes over 8 seconds for a stopped worker: it begins no layer for as long, and is then killed."""
    harming = Harming({3: harm})
    run = score(tiny_llama, tmp_path, executor="ray", replicas=2, hang_seconds=8, on_event=harming)
    assert len(harming.victims) == 1
    assert run.status == "done"
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

    def __call__(self, model: LanguageModel, intervention: Intervention = NO_INTERVENTION) -> list[MetricRow]:
        with suppress(FileExistsError):
            os.close(os.open(self.mark, os.O_CREAT | os.O_EXCL))
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(model, intervention)


@pytest.mark.usefixtures("shared_ray", "this_module_travels")
def test_cells_give_what_one_process_gives_whoever_is_lost(tiny_llama: Path, tmp_path: Path) -> None:
    settings = Settings(**SMALL)
    shared: dict[str, Any] = {"run_id": "e", "checkpoint": checkpoint_at(tiny_llama), "settings": settings}
    cells = [
        Cell(**shared, task="loss", part=i, measure=DisturbedOnce(random_shard(1 + i % 5), mark=tmp_path / str(i)))
        for i in range(6)
    ]
    for cell in cells[:4]:
        cell.measure.mark.touch()  # type: ignore[attr-defined]

    def samples(executor: Executor) -> dict[int, bytes]:
        with closing(executor):
            outcomes = executor.run_cells(Submissions.of([cells]))
            return {cell.part: rows.rows[0].samples.tobytes() for cell, rows in outcomes}  # type: ignore

    on_ray = samples(RayExecutor(Execution(executor="ray", replicas=2), settings))
    assert len(list(tmp_path.iterdir())) == 6
    assert on_ray == samples(LocalExecutor(settings))


@pytest.mark.nightly
def test_a_stopped_driver_is_resumed(shared_ray: Cluster, tiny_llama: Path, undisturbed: Path, tmp_path: Path) -> None:
    """The partials are kept, the same command finishes what is missing; `test_liveness` presses Ctrl-C."""
    place = ("-w", tmp_path, "--address", shared_ray.address, "--replicas", 2)
    driver = Command("score", tiny_llama, "--corpus", "builtin:pydoc", *place, *ARGUMENTS)
    partials = tmp_path / "shard_stats"
    wait_until(lambda: len(list(partials.rglob("*.parquet"))) >= 1 or not driver.running())
    driver.send(signal.SIGTERM)
    code, _, said = driver.wait()
    assert code == 143, said
    assert "run the same command again" in said
    assert "Traceback" not in said
    kept_shards = len(list(partials.rglob("*.parquet")))
    assert 1 <= kept_shards < 20
    assert not list((tmp_path / "scores").rglob("*.parquet"))
    run = score(tiny_llama, tmp_path, executor="local")
    assert run.status == "done"
    assert run.resumed_shards == kept_shards
    assert_same_tables(tmp_path, undisturbed)


@pytest.mark.nightly
@pytest.mark.usefixtures("shared_ray")
def test_workers_write_and_say_little(tiny_llama: Path, undisturbed: Path, tmp_path: Path) -> None:
    """A partial goes to the warehouse from where it is measured; the driver hears a receipt of it."""
    spec = run_spec(tiny_llama, **TWENTY_SHARDS, executor="ray", replicas=2)
    with closing(open_executor(spec.execution, spec.settings)) as executor:
        store = Store(tmp_path)
        store.storage.create()
        planned = Planner(executor, store).prepare(spec)
        running = RunInProgress(planned, store, fresh=False)
        outcomes = [outcome for _, outcome in executor.run(Submissions.of([running.shards]))]
    assert sorted(outcome.shard_id for outcome in outcomes if isinstance(outcome, Receipt)) == list(range(20))
    assert max(len(pickle.dumps(outcome)) for outcome in outcomes) < 2000
    assert not any(outcome.files for outcome in outcomes if isinstance(outcome, Receipt))
    assert len(list((tmp_path / "shard_stats").rglob("*.parquet"))) == 20
    assert [file.name for file in (tmp_path / "runs").iterdir()] == [f".plan-{planned.run_id}"]  # no mark is left
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
    command = [sys.executable, "-m", "avss_dist", "score", str(tiny_llama), "--corpus", "builtin:pydoc", *ARGUMENTS]
    command += ["-w", str(folder), "--partition", "single", "--address", ray.get_runtime_context().gcs_address]
    inside = f"mount -t tmpfs none {folder} && {shlex.join(command)} && cp -r {folder} {tmp_path}/copy"
    subprocess.run(["unshare", "--mount", "sh", "-c", inside], check=True)
    assert list(folder.iterdir()) == []
    copy = tmp_path / "copy"
    (run,) = run_rows(copy)
    assert "some workers do not reach the warehouse: the driver wrote for them" in run["notes"]
    assert measured_files(copy) == measured_files(undisturbed)


@pytest.mark.nightly
@pytest.mark.usefixtures("shared_ray")
def test_tasks_merge_to_the_same_bytes(
    tiny_llama: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks are merged on the cluster, while a worker of the next run holds its CPU; damage is told from there too."""
    monkeypatch.setattr(merging, "MERGED_HERE", 0)
    applied: list[range] = []
    own = RayExecutor.apply

    def spy(self: RayExecutor, function: Any, items: Any) -> Iterator[Any]:
        applied.extend(items)
        return own(self, function, items)

    monkeypatch.setattr(RayExecutor, "apply", spy)
    whole = tmp_path / "whole"
    score(tiny_llama, whole, executor="ray", replicas=1)
    assert len(applied) == 20
    assert_same_tables(whole, undisturbed)
    damaged = tmp_path / "damaged"
    with pytest.raises(RunFailed, match="is damaged or missing"):
        score(tiny_llama, damaged, executor="ray", on_event=Damaging(damaged))


class Damaging:
    """Flips a bit of a partial after its receipt has come."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._arrived = 0

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
    assert not ray.is_initialized()
    assert "(raylet)" not in capsys.readouterr().out
    (row,) = run_rows(tmp_path)
    assert row["status"] == "failed"
    assert re.search(message, row["error"])
    run = score(tiny_llama, tmp_path, executor="local")
    assert run.status == "done"
    assert run.resumed_shards >= 1
    assert_same_tables(tmp_path, undisturbed)


@pytest.mark.nightly
@pytest.mark.usefixtures("shared_ray")
def test_a_zero3_gang_gives_the_same_bytes(tiny_llama: Path, undisturbed: Path, tmp_path: Path) -> None:
    """`test_gangs` has an uneven end, too."""
    score(tiny_llama, tmp_path, partition="zero3", ranks=2)
    assert_same_tables(tmp_path, undisturbed)
    assert Warehouse(tmp_path).runs()["partition"].to_pylist() == ["zero3"]


@pytest.mark.nightly
@pytest.mark.usefixtures("shared_ray")
def test_a_gang_that_loses_ranks_is_replaced_as_one(tiny_llama: Path, undisturbed: Path, tmp_path: Path) -> None:
    """One rank killed in mid-shard, another stopped, which is a hang: the run still ends, each shard counts once."""
    harming = Harming({1: signal.SIGKILL, 3: signal.SIGSTOP})
    run = score(tiny_llama, tmp_path, partition="fsdp", ranks=2, hang_seconds=12, on_event=harming)
    assert run.status == "done"
    assert harming.arrived == 20
    assert len(harming.victims) == 2
    assert_same_tables(tmp_path, undisturbed)
    wait_until(lambda: not any(victim.is_running() for victim in harming.victims))


@pytest.mark.nightly
@pytest.mark.parametrize("partition", ["fsdp", "tensor_parallel"])
def test_ranks_evaluate(partition: str, shared_ray: Cluster, tiny_llama: Path, tmp_path: Path) -> None:
    """The rows of `single`, and of ranks that split matrices values that are near."""
    options = {**TWENTY_SHARDS, "max_sequences": 10, "sequence_length": 32}
    for name, place in (
        ("single", {"executor": "local"}),
        ("ranks", {"address": shared_ray.address, "partition": partition, "ranks": 2}),
    ):
        given = {**options, **place, "warehouse": tmp_path / name}
        evaluate([tiny_llama], tasks=["perplexity:builtin:pydoc"], **given)
        ablate(str(tiny_llama), corpus="builtin:pydoc", shapley=1, gradients=True, **given)
    single = tmp_path / "single"
    ranks = tmp_path / "ranks"
    if partition == "fsdp":
        assert_same_evaluations(ranks, single)
        return
    near = evaluated_values(ranks)
    wanted = evaluated_values(single)
    assert near.keys() == wanted.keys()
    for key, value in wanted.items():
        assert abs(near[key] - value) <= 1e-4 * max(1.0, abs(value))


def evaluated_values(warehouse: Path) -> dict[tuple[Any, ...], float]:
    """Return the values of all evaluations by task, metric, removed layers and layer."""
    values = {}
    for row in table_rows(warehouse, "evaluations"):
        values[row["task"], row["metric"], tuple(row["drop"]), row["layer"]] = row["value"]
    return values


@pytest.fixture
def three_nodes(ray_cluster: Cluster) -> Cluster:
    """Three nodes, whatever the last test has left."""
    draining = ray_cluster.draining()
    for i, node in enumerate(ray_cluster.nodes):
        if i >= NODES or node.node_id in draining:
            ray_cluster.kill_node(node)
    ray_cluster.restore()
    return ray_cluster


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """For notes; no worker is helped because it is late."""
    monkeypatch.setattr(queue, "LATE_SECONDS", 3600.0)
    notes = tmp_path / "notes"
    notes.mkdir()
    return notes


@pytest.mark.nightly
def test_three_nodes_grow_to_five_and_lose_two_in_one_run(
    three_nodes: Cluster,
    folder: Path,
    tiny_llama: Path,
    undisturbed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two replicas join in mid-run, and two are lost without notice: only the shards that they had are done again.

    A line for each lost node says which, on standard error and among the notes of the run.
    """
    lost: list[str] = []
    warehouse = tmp_path / "w"
    with noting(folder, {8: "grown", 13: "shrunk"}) as notes:

        def happens() -> None:
            wait_until(lambda: len(notes.shards) >= 3)
            for _ in range(2):
                three_nodes.grow()
            wait_until(lambda: len({note.node for note in notes.shards}) == 5)
            notes.open("grown")
            wait_until(lambda: len(notes.shards) == 18)  # 13 are done, five wait
            for node in three_nodes.nodes[1:3]:
                lost.append(node.node_id)
                three_nodes.kill_node(node)
            notes.open("shrunk")

        meanwhile = threading.Thread(target=happens, daemon=True)
        meanwhile.start()
        run = score(tiny_llama, warehouse, executor="ray", address=three_nodes.address, replicas="2..5")
        meanwhile.join()
    assert run.status == "done"
    assert run.resumed_shards == 0
    assert_same_tables(warehouse, undisturbed)
    begun = Counter(note.what for note in notes.shards)
    in_flight = {note.what for note in notes.shards if note.node in lost and int(note.what) >= 13}
    assert len(in_flight) == 2
    assert len(begun) == 20
    assert {shard for shard, times in begun.items() if times > 1} == in_flight
    told = re.compile(r"he node [\d.]+ \((\w{8})\) was lost; shard (\d+) is measured again")
    had = {note.node[:8]: note.what for note in notes.shards if note.node in lost and int(note.what) >= 13}
    row = Warehouse(warehouse).run(run.run_id)
    assert row is not None
    assert dict(told.findall("\n".join(row["notes"]))) == had
    assert dict(told.findall(capsys.readouterr().err)) == had


@pytest.mark.nightly
def test_by_default_each_node_holds_a_replica(
    three_nodes: Cluster,
    folder: Path,
    tiny_llama: Path,
    undisturbed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """That is said before anything else."""
    warehouse = tmp_path / "w"
    with noting(folder, {}) as notes:
        run = score(tiny_llama, warehouse, executor="ray", address=three_nodes.address)
    assert {note.node for note in notes.opens} == {node.node_id for node in three_nodes.nodes}
    row = Warehouse(warehouse).run(run.run_id)
    assert row is not None
    assert row["replicas"] == NODES
    assert " 3 replicas will work, one on each node with 1 CPU;" in capsys.readouterr().err.splitlines()[0]
    assert_same_tables(warehouse, undisturbed)


@pytest.mark.nightly
def test_work_goes_to_nodes_with_the_labels(
    three_nodes: Cluster, folder: Path, tiny_llama: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Of one worker as of a group. What lacks is counted on these nodes alone."""
    where: dict[str, Any] = {"executor": "ray", "address": three_nodes.address, "node_labels": ["zone=a"]}
    labelled = {three_nodes.grow(zone="a").node_id, three_nodes.grow(zone="a").node_id}
    for name, placement in (("one", {"replicas": 1}), ("group", {"partition": "zero3", "ranks": 2, "replicas": 1})):
        with noting(folder, {}) as notes:
            assert score(tiny_llama, tmp_path / name, **where, **placement).status == "done"
        assert {note.node for note in notes.opens} <= labelled
        assert len({note.node for note in notes.opens}) == placement.get("ranks", 1)
        assert_same_tables(tmp_path / name, undisturbed)
    with pytest.raises(ConfigError, match=r"No node .* `node_labels` zone=b\.\nLabels of its nodes: zone=a") as caught:
        score(tiny_llama, tmp_path / "none", **{**where, "node_labels": ["zone=b"]})
    assert caught.value.exit_code == 2
    few = r"3 seconds\. A worker needs 1 CPUs; \d of 2 CPUs are free on nodes with zone=a"
    with pytest.raises(RunFailed, match=few):
        score(tiny_llama, tmp_path / "few", **where, replicas="3..3", placement_seconds=3)


@dataclass(frozen=True)
class Sum:
    """Sums the ranks' numbers, after an event of each."""

    device: str = "cpu"

    def run(self, heartbeat: Callable[[], None], on_event: Callable[[Any], None]) -> Any:
        import torch
        from torch import distributed

        rank = distributed.get_rank()
        heartbeat()
        on_event(f"rank {rank} begins")
        number = torch.tensor([float(10 + rank)])
        distributed.all_reduce(number)
        on_event(number.item())
        return rank, number.item()


@pytest.mark.nightly
@pytest.mark.usefixtures("warm_workers", "this_module_travels")
def test_ranks_on_a_real_cluster() -> None:
    """The first rank is heard. Ranks that divide a shard are kept on one node that has room, and none is left."""
    events: list[Any] = []
    with closing(RayExecutor(Execution(placement_seconds=8.0), Settings(device="cpu"))) as executor:
        assert executor.run_ranks(Sum(), 2, threads=1, on_event=events.append) == (0, 21.0)
        assert events == ["rank 0 begins", 21.0]
        with pytest.raises(RunFailed, match=r"not placed in 8 seconds.*needs 50 workers of 1 CPUs"):
            executor.run_ranks(Sum(), 50, threads=1, on_event=events.append)
        for partition, threads, strategy in (
            ("tensor_parallel", 1, "STRICT_PACK"),
            ("tensor_parallel", 2048, "PACK"),
            ("fsdp", 1, "PACK"),
        ):
            gang = executor._new_gang(Placement(partition=partition, ranks=2), threads=threads)
            assert placement_group_table(gang._group)["strategy"] == strategy
            gang.stop()
        wait_until(lambda: not ray_processes())
