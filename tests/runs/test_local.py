"""Shards measured at once in one process, and the threads that compute: neither changes a number."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from support.causal_lm import SMALL, opened, random_shard
from support.checkpoints import checkpoint_at
from support.tables import assert_same_tables, run_rows

import avss_dist
from avss_dist.core import devices
from avss_dist.core.errors import AvssError, BatchTooLarge, ModelError
from avss_dist.core.intervention import NO_INTERVENTION, Intervention
from avss_dist.core.settings import Settings
from avss_dist.measure import shard as measuring
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.checkpoint.locate import Checkpoint
from avss_dist.partition.placement import Placement
from avss_dist.runs import local
from avss_dist.runs.local import Executor, LocalExecutor
from avss_dist.runs.threads import Submissions
from avss_dist.runs.work import ReplicaSpec, RunShards
from avss_dist.tasks.task import Cell, Measure, MetricRow, measure_cell
from avss_dist.tasks.text_loss import TextLoss

OPTIONS: dict[str, Any] = {
    "corpus": "builtin:pydoc",
    "max_sequences": 24,
    "sequence_length": 32,
    "batch_size": 2,
    "sequences_per_shard": 4,
    "device": "cpu",
}


def score(model: Path, out: Path, **changes: Any) -> avss_dist.Run:
    return avss_dist.score(model, warehouse=out, **{**OPTIONS, "executor": "local", "partition": "single", **changes})


@pytest.fixture(scope="module")
def undisturbed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One shard at a time."""
    out = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "free_cores", lambda: 1)
        assert score(tiny_llama, out).num_shards == 6
    return out


@pytest.fixture
def two_threads() -> Iterator[None]:
    """torch computes with two threads where nobody says otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """(threads that torch computes with, name of Python's thread) of every shard that is measured."""
    seen: list[tuple[int, str]] = []
    measure = measuring._measure

    def spy(*args: Any) -> Any:
        seen.append((torch.get_num_threads(), threading.current_thread().name))
        return measure(*args)

    monkeypatch.setattr(measuring, "_measure", spy)
    return seen


def test_shards_at_once_give_the_same_bytes(
    tiny_llama: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many run at once as there are cores: the first ones wait for each other."""
    monkeypatch.setattr(local, "free_cores", lambda: 3)
    together = threading.Barrier(3)
    analyze = local.analyze_shard

    def meet(replica: Any, shard: Any, *args: Any, **options: Any) -> Any:
        if shard.shard_id < 3:
            together.wait(timeout=500)
        return analyze(replica, shard, *args, **options)

    monkeypatch.setattr(local, "analyze_shard", meet)
    score(tiny_llama, tmp_path)
    assert_same_tables(tmp_path, undisturbed)


@pytest.mark.nightly
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("cores_free", "threads"), [(2, 1), (4, 2)])
def test_every_shard_computes_with_the_threads_of_the_settings(
    cores_free: int,
    threads: int,
    seen: list[tuple[int, str]],
    tiny_llama: Path,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(local, "free_cores", lambda: cores_free)
    run = score(tiny_llama, tmp_path, threads=threads)
    assert len(seen) == 6
    assert {count for count, _ in seen} == {threads}
    assert len({name for _, name in seen}) <= cores_free // threads
    (row,) = run_rows(tmp_path)
    assert row["run_id"] == run.run_id
    assert row["threads"] == threads
    (other,) = run_rows(undisturbed)
    assert (other["run_id"] == run.run_id) == (threads == 1), "threads are part of a run"
    assert torch.get_num_threads() == 2, "the caller's number is as it was"


@pytest.mark.nightly
def test_the_environment_changes_no_byte(
    tiny_llama: Path, undisturbed: Path, tmp_path: Path, run_avss: Callable[..., Any]
) -> None:
    """`OMP_NUM_THREADS` is what torch would compute with; NumPy's and numba's are set to the same."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
    options = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
    given = ["--executor", "local", "--partition", "single"]
    done = run_avss("score", tiny_llama, "-w", tmp_path, *options, *given, env=dict.fromkeys(names, "2"))
    assert done.returncode == 0, done.stderr
    assert_same_tables(tmp_path, undisturbed)


@pytest.mark.nightly
def test_ray_workers_compute_with_the_threads_of_the_settings(
    tiny_llama: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that imports torch itself, with the variable that torch reads then."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    run = score(tiny_llama, tmp_path, executor="ray", replicas=1)
    (row,) = run_rows(tmp_path)
    assert row["run_id"] == run.run_id
    assert row["threads"] == 1
    assert_same_tables(tmp_path, undisturbed)


@pytest.mark.usefixtures("two_threads")
def test_tasks_compute_with_the_threads_of_the_settings(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    losses = LanguageModel.losses

    def spy(self: Any, batch: Any) -> Any:
        counts.append(torch.get_num_threads())
        return losses(self, batch)

    monkeypatch.setattr(LanguageModel, "losses", spy)
    from avss_dist import evaluate

    options = {name: value for name, value in OPTIONS.items() if name != "corpus"}
    evaluate([tiny_llama], tasks=["perplexity:builtin:pydoc"], warehouse=tmp_path, executor="local", **options)
    assert counts
    assert set(counts) == {1}
    assert torch.get_num_threads() == 2


def run_one(model: Path, analyze: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The outcomes of one run on three cores, with another `analyze_shard`."""
    from avss_dist.corpus.shards import tokenize_corpus
    from avss_dist.models.checkpoint.loading import load_tokenizer

    checkpoint = checkpoint_at(model)
    settings = Settings(**{name: value for name, value in OPTIONS.items() if name != "corpus"})
    shards = tokenize_corpus("builtin:pydoc", load_tokenizer(checkpoint), settings).shards
    monkeypatch.setattr(local, "free_cores", lambda: 3)
    monkeypatch.setattr(local, "analyze_shard", analyze)
    spec = ReplicaSpec(checkpoint=checkpoint, settings=settings, placement=Placement())
    with closing(local.LocalExecutor(settings)) as executor:
        return list(executor.run(Submissions.of([RunShards(run_id="run", replica_spec=spec, shards=shards)])))


def test_an_error_of_one_shard_ends_the_others(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that run meanwhile are stopped at their next layer, and do not keep the process waiting."""
    analyze = local.analyze_shard
    begun = threading.Event()

    def go_wrong(
        replica: Any, shard: Any, settings: Any, *, heartbeat: Callable[[], None], hooks: Any, **_: Any
    ) -> Any:
        if shard.shard_id == 0:
            begun.wait(timeout=500)
            raise RuntimeError("the first shard is broken")
        begun.set()
        while True:  # until it is stopped
            analyze(replica, shard, settings, heartbeat=heartbeat, hooks=hooks)

    ((work, error),) = run_one(tiny_llama, go_wrong, monkeypatch)
    assert work.run_id == "run"
    assert isinstance(error, AvssError)
    assert "the first shard is broken" in str(error)


def test_results_come_in_the_order_of_the_shards(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = run_one(tiny_llama, local.analyze_shard, monkeypatch)
    assert [result.shard_id for _, result in outcomes] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("available", "expected"), [(1, 1), (lambda shard: shard * 3, 2), (lambda shard: shard * 100, 8)]
)
def test_shards_at_once_fit_into_memory(
    available: Any, expected: int, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from avss_dist.models.checkpoint.size import footprint
    from avss_dist.partition.replica import open_replica

    settings = Settings(device="cpu", sequence_length=64)
    spec = ReplicaSpec(checkpoint=checkpoint_at(tiny_llama), settings=settings, placement=Placement())
    size = footprint(spec.checkpoint, settings)
    shard = size.activation_bytes(settings.batch_size, 64) + local.counter_bytes(size, settings)
    monkeypatch.setattr(local, "free_cores", lambda: 8)
    monkeypatch.setattr(local, "available_memory", lambda: available(shard) if callable(available) else available)
    replica = open_replica(spec.checkpoint, settings, spec.placement)
    assert local.shards_at_once(replica, spec) == expected
    replica.close()


@pytest.mark.parametrize(
    ("affinity", "quota", "percent", "free"),
    [
        (8, "max 100000", 0.0, 8),
        (8, "max 100000", 50.0, 4),
        (8, "max 100000", 100.0, 1),
        (4, "max 100000", 50.0, 4),
        (8, "250000 100000", 0.0, 2),
        (8, "50000 100000", 0.0, 1),
        (2, None, 0.0, 2),
    ],
)
def test_free_cores_are_those_that_this_process_may_use_and_nobody_does(
    affinity: int, quota: str | None, percent: float, free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a machine of eight cores."""
    if quota:
        (tmp_path / "cpu.max").write_text(quota + "\n")
    monkeypatch.setattr(devices, "_CGROUP", tmp_path)
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda _: set(range(affinity)))
    monkeypatch.setattr(psutil, "cpu_count", lambda: 8)
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: percent)
    assert devices.free_cores() == free


PARTS = 6
SETTINGS = Settings(**SMALL)


class Loss(TextLoss):
    """The loss of random text, of which `disturb` may prevent the computation."""

    @property
    def key(self) -> str:
        return type(self).__name__

    def __call__(self, model: LanguageModel, intervention: Intervention = NO_INTERVENTION) -> list[MetricRow]:
        self.disturb(model)
        return super().__call__(model, intervention)

    def disturb(self, model: LanguageModel) -> None: ...


class FitsWithOneRow(Loss):
    def disturb(self, model: LanguageModel) -> None:
        if model.settings.batch_size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")


class FitsNever(Loss):
    def disturb(self, model: LanguageModel) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")


def cells(folder: Path, measures: Sequence[Measure], drop: tuple[int, ...] = ()) -> list[Cell]:
    checkpoint = checkpoint_at(folder)
    shared: dict[str, Any] = {"run_id": "e", "checkpoint": checkpoint, "settings": SETTINGS, "task": "loss"}
    return [
        Cell(**shared, part=part, measure=measure, intervention=Intervention(removed=drop))
        for part, measure in enumerate(measures)
    ]


def losses(number: int = PARTS) -> list[Loss]:
    return [Loss(random_shard(rows=1 + part % 5)) for part in range(number)]


def outcomes(executor: Executor, asked: Sequence[Cell]) -> dict[int, Any]:
    """What each part gave: its samples as bytes, or an error; no part comes twice."""
    outcome_of: dict[int, Any] = {}
    with closing(executor):
        for cell, result in executor.run_cells(Submissions.of([asked])):
            assert cell in asked
            assert cell.part not in outcome_of
            if isinstance(result, AvssError):
                outcome_of[cell.part] = result
            else:
                outcome_of[cell.part] = result.rows[0].samples.tobytes()
    return outcome_of


def test_a_cell_that_does_not_fit_is_measured_with_half_the_rows(tiny_llama: Path) -> None:
    """Four rows, two, one; where one does not fit either, that cell fails. The next has four again."""
    shard = random_shard()
    outcome_of = outcomes(
        LocalExecutor(SETTINGS), cells(tiny_llama, [FitsWithOneRow(shard), FitsNever(shard), Loss(shard)])
    )
    model = opened(tiny_llama, batch_size=1)
    (alone,) = Loss(shard)(model)
    assert outcome_of[0] == alone.samples.tobytes()
    assert isinstance(outcome_of[1], BatchTooLarge)
    assert "1 x 32 tokens do not fit in memory" in str(outcome_of[1])
    assert isinstance(outcome_of[2], bytes)


def test_an_error_is_of_its_cell_or_of_its_model(tiny_llama: Path, tmp_path: Path) -> None:
    (bad,) = cells(tiny_llama, losses(1), drop=(99,))
    gone = [
        Cell(run_id="e", checkpoint=absent(tmp_path), settings=SETTINGS, task="loss", part=i, measure=bad.measure)
        for i in (1, 2)
    ]
    good = cells(tiny_llama, losses(4))[3]
    assert good.part == 3
    outcome_of = outcomes(LocalExecutor(SETTINGS), [bad, *gone, good])
    assert isinstance(outcome_of[0], ModelError)
    assert "There is no layer 99" in str(outcome_of[0])
    for part in (1, 2):
        assert isinstance(outcome_of[part], ModelError)
        assert "gone" in str(outcome_of[part])
    assert isinstance(outcome_of[3], bytes)


def absent(tmp_path: Path) -> Checkpoint:
    return Checkpoint(name="gone", source="folder", path=str(tmp_path / "gone"), revision="0")


def test_every_run_of_a_model_that_cannot_be_opened_has_an_error_of_its_own(tmp_path: Path) -> None:
    spec = ReplicaSpec(checkpoint=absent(tmp_path), settings=SETTINGS, placement=Placement())
    runs = [RunShards(run_id=name, replica_spec=spec, shards=[random_shard()]) for name in "ab"]
    with closing(LocalExecutor(SETTINGS)) as executor:
        (_, first), (_, second) = executor.run(Submissions.of(runs))
    first.add_note("a note")
    assert str(first) == str(second)
    assert not hasattr(second, "__notes__")


def test_every_cell_of_a_model_that_cannot_be_opened_has_an_error_of_its_own(tiny_llama: Path, tmp_path: Path) -> None:
    asked = [replace(cell, checkpoint=absent(tmp_path)) for cell in cells(tiny_llama, losses(2))]
    first, second = outcomes(LocalExecutor(SETTINGS), asked).values()
    first.add_note("a note")
    assert not hasattr(second, "__notes__")


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
