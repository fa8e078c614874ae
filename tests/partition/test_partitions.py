"""Gangs of ranks, end to end: a real Ray cluster, real processes, the numbers of `single`.

`test_gangs` has more families and larger groups, without Ray.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from support.processes import Harming, wait_until
from support.ray_cluster import Cluster
from support.tables import assert_same_evaluations, measured_files

import avss_dist
from avss_dist import ablate, evaluate
from avss_dist.warehouse.reader import Warehouse

OPTIONS: dict[str, Any] = {"max_sequences": 26, "sequence_length": 32, "batch_size": 2, "sequences_per_shard": 4}
SHARDS = 7


def score(model: Path, out: Path, **options: Any) -> avss_dist.Run:
    return avss_dist.score(model, corpus="builtin:pydoc", warehouse=out, **{**OPTIONS, **options})


@pytest.fixture(scope="module")
def single(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files that one process measures."""
    out = tmp_path_factory.mktemp("single")
    assert score(tiny_llama, out, partition="single", executor="local").num_shards == SHARDS
    return measured_files(out)


@pytest.mark.usefixtures("shared_ray")
def test_a_zero3_gang_gives_the_same_bytes(tiny_llama: Path, single: dict[str, bytes], tmp_path: Path) -> None:
    """Seven shards over two ranks: the end is uneven."""
    score(tiny_llama, tmp_path, partition="zero3", ranks=2)
    got = measured_files(tmp_path)
    assert got == {path: single[path] for path in got} and len(got) == 2
    (run,) = Warehouse(tmp_path).runs().to_pylist()
    assert (run["partition"], run["num_shards"]) == ("zero3", SHARDS)


@pytest.mark.nightly
@pytest.mark.usefixtures("shared_ray")
def test_a_gang_that_loses_ranks_is_replaced_as_one(tiny_llama: Path, single: dict[str, bytes], tmp_path: Path) -> None:
    """One rank killed in mid-shard, another stopped, which is a hang: the run still ends, each shard counts once."""
    harming = Harming({1: signal.SIGKILL, 3: signal.SIGSTOP})
    run = score(tiny_llama, tmp_path, partition="fsdp", ranks=2, hang_seconds=12, on_event=harming)
    assert (run.status, harming.arrived, len(harming.victims)) == ("done", SHARDS, 2)
    got = measured_files(tmp_path)
    assert got == {path: single[path] for path in got} and len(got) == 2
    wait_until(lambda: not any(victim.is_running() for victim in harming.victims))


def ask(model: Path, out: Path, **options: Any) -> None:
    """Losses, leave one out, Shapley values and gradients."""
    common = {**OPTIONS, "max_sequences": 10, **options, "warehouse": out}
    evaluate([str(model)], tasks=["perplexity:builtin:pydoc"], **common)
    ablate(str(model), corpus="builtin:pydoc", shapley=1, gradients=True, **common)


@pytest.mark.nightly
@pytest.mark.parametrize("partition", ["fsdp", "tensor_parallel"])
def test_ranks_evaluate(partition: str, shared_ray: Cluster, tiny_llama: Path, tmp_path: Path) -> None:
    """The rows of `single`, and of ranks that split matrices values that are near."""
    ask(tiny_llama, tmp_path / "single", executor="local")
    ask(tiny_llama, tmp_path / "ranks", address=shared_ray.address, partition=partition, ranks=2)
    if partition == "fsdp":
        assert_same_evaluations(tmp_path / "ranks", tmp_path / "single")
        return
    near, wanted = ({key(row): row["value"] for row in values(tmp_path / name)} for name in ("ranks", "single"))
    assert near.keys() == wanted.keys()
    assert all(abs(near[k] - wanted[k]) <= 1e-4 * max(1.0, abs(wanted[k])) for k in near)


def values(warehouse: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = Warehouse(warehouse).table("evaluations").to_pylist()
    return rows


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["task"], row["metric"], tuple(row["drop"]), row["layer"]
