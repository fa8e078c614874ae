"""Every partition against `single`, end to end: real models, a real Ray cluster, real processes, the same numbers."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from support.checkpoints import host_limit
from support.families import tiny_model
from support.processes import FreezesAtStart, Harming, wait_until
from support.ray_cluster import Cluster
from support.tables import assert_same_evaluations, assert_same_tables, measured_files

import avss_dist
from avss_dist import ablate, evaluate
from avss_dist.core.errors import ConfigError
from avss_dist.core.registry import PARTITIONS
from avss_dist.warehouse.reader import Warehouse

FAMILIES = ("llama", "gemma3_text")  # more in test_gangs, test_device_map and test_streaming
OPTIONS: dict[str, Any] = {"max_sequences": 26, "sequence_length": 32, "batch_size": 2, "sequences_per_shard": 4}
SHARDS = 7


@pytest.fixture(scope="module")
def cluster(warm_workers: None) -> Iterator[None]:
    """A private Ray with four CPUs, whatever this machine has: gangs of two and three, and two gangs of two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        patch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
        yield
        ray.shutdown()
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, save_checkpoint: Callable[[Any, Path], Path]) -> list[str]:
    """A tiny random checkpoint of each family, float32."""
    folder = tmp_path_factory.mktemp("families")
    saved = []
    for family in FAMILIES:
        model = tiny_model("causal", family)
        model.resize_token_embeddings(320)  # the tokenizer's
        saved.append(str(save_checkpoint(model, folder / family)))
    return saved


@pytest.fixture(scope="module")
def single(models: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one device measures."""
    out = tmp_path_factory.mktemp("single")
    runs = score(models, out, partition="single", executor="local")
    assert {run.num_shards for run in runs} == {SHARDS}
    return out


def score(models: list[str], out: Path, **options: Any) -> list[avss_dist.Run]:
    runs = avss_dist.score_all(models, corpus="builtin:pydoc", warehouse=out, **{**OPTIONS, **options})
    assert [(run.model, run.error) for run in runs if run.status != "done"] == []
    return runs


def test_a_zero3_gang_gives_the_same_bytes(shared_ray: Cluster, tiny_llama: Path, tmp_path: Path) -> None:
    """Seven shards over two ranks: the end is uneven."""
    score([str(tiny_llama)], tmp_path / "single", partition="single", executor="local")
    score([str(tiny_llama)], tmp_path / "zero3", partition="zero3", ranks=2)
    got, wanted = measured_files(tmp_path / "zero3"), measured_files(tmp_path / "single")
    assert got == {path: wanted[path] for path in got} and len(got) == 2
    (run,) = Warehouse(tmp_path / "zero3").runs().to_pylist()
    assert (run["partition"], run["num_shards"]) == ("zero3", SHARDS)


def on_four_cpus(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test of the nightly tier, with a cluster of its own."""
    marked: Callable[..., None] = pytest.mark.nightly(pytest.mark.usefixtures("cluster")(test))
    return marked


@on_four_cpus
@pytest.mark.parametrize(("partition", "ranks", "replicas"), [("fsdp", 3, 1), ("zero3", 2, 2), ("streaming", None, 2)])
def test_replicas_give_the_same_bytes(
    partition: str, ranks: int | None, replicas: int, models: list[str], single: Path, tmp_path: Path
) -> None:
    """Seven shards over three ranks, and over two gangs of two; streaming has room for a layer and no hidden state."""
    limit = {"cpu": max(host_limit(model, 250_000, head=False, **OPTIONS) for model in models)}
    max_memory = limit if partition == "streaming" else {}
    chosen = models[:replicas]
    score(chosen, tmp_path, executor="ray", partition=partition, ranks=ranks, replicas=replicas, max_memory=max_memory)
    got, wanted = measured_files(tmp_path), measured_files(single)
    assert got == {path: wanted[path] for path in got} and len(got) == 2 * replicas
    runs = Warehouse(tmp_path).runs()
    assert set(runs["partition"].to_pylist()) == {partition} and set(runs["replicas"].to_pylist()) == {replicas}


def ask(model: str, out: Path, **options: Any) -> None:
    """Losses, leave one out, Shapley values and gradients."""
    common = {**OPTIONS, "max_sequences": 10, **options, "warehouse": out}
    evaluate([model], tasks=["perplexity:builtin:pydoc"], **common)
    ablate(model, corpus="builtin:pydoc", shapley=1, gradients=True, **common)


@pytest.fixture(scope="module")
def single_asked(models: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process answers."""
    out = tmp_path_factory.mktemp("asked")
    ask(models[0], out, executor="local")
    return out


@on_four_cpus
@pytest.mark.parametrize("partition", ["fsdp", "tensor_parallel"])
def test_ranks_evaluate(partition: str, models: list[str], single_asked: Path, tmp_path: Path) -> None:
    """The rows of `single`, and of ranks that split matrices values that are near."""
    ask(models[0], tmp_path, executor="ray", partition=partition, ranks=2)
    if partition == "fsdp":
        assert_same_evaluations(tmp_path, single_asked)
        return
    near, wanted = ({key(row): row["value"] for row in values(of)} for of in (tmp_path, single_asked))
    assert near.keys() == wanted.keys()
    assert all(abs(near[k] - wanted[k]) <= 1e-4 * max(1.0, abs(wanted[k])) for k in near)


def values(warehouse: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = Warehouse(warehouse).table("evaluations").to_pylist()
    return rows


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["task"], row["metric"], tuple(row["drop"]), row["layer"]


@on_four_cpus
@pytest.mark.parametrize("partition", ["fsdp", "tensor_parallel"])
def test_a_gang_that_loses_ranks_is_replaced_as_one(
    partition: str, models: list[str], single: Path, tmp_path: Path
) -> None:
    """One rank killed in mid-shard, another stopped, which is a hang: the run still ends, each shard counts once."""
    harming = Harming({1: signal.SIGKILL, 3: signal.SIGSTOP})
    options = {**OPTIONS, "corpus": "builtin:pydoc", "partition": partition, "ranks": 2, "hang_seconds": 12}
    run = avss_dist.score(models[0], warehouse=tmp_path / "disturbed", on_event=harming, **options)
    assert (run.status, harming.arrived, len(harming.victims)) == ("done", SHARDS, 2)
    if PARTITIONS[partition].splits_data:  # their bytes are those of one device
        got, wanted = measured_files(tmp_path / "disturbed"), measured_files(single)
        assert got == {path: wanted[path] for path in got} and len(got) == 2
    else:
        avss_dist.score(models[0], warehouse=tmp_path / "undisturbed", **options)
        assert_same_tables(tmp_path / "disturbed", tmp_path / "undisturbed")
    wait_until(lambda: not any(victim.is_running() for victim in harming.victims))


@on_four_cpus
def test_a_gang_of_which_a_rank_freezes_before_it_reports_is_replaced(
    models: list[str], single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = FreezesAtStart(1, monkeypatch)
    options = {**OPTIONS, "partition": "zero3", "ranks": 2, "hang_seconds": 12, "placement_seconds": 3600}
    run = avss_dist.score(models[0], corpus="builtin:pydoc", warehouse=tmp_path, **options)
    frozen.join()
    assert frozen.were_starting and run.status == "done"
    got, wanted = measured_files(tmp_path), measured_files(single)
    assert got == {path: wanted[path] for path in got}


@on_four_cpus
def test_more_ranks_than_devices_are_refused(
    models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS")
    with pytest.raises(ConfigError, match=r"1 replicas of 4096 ranks need 4096 CPUs; there are \d+"):
        avss_dist.score(models[0], corpus="builtin:pydoc", warehouse=tmp_path, **OPTIONS, partition="zero3", ranks=4096)
