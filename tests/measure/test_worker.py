"""A batch that does not fit in memory is halved: the same counts, the same moments but for the last digits."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch
from support.oracle import FLOAT_FIELDS

from avss_dist.core.errors import BatchTooLarge
from avss_dist.core.settings import Settings
from avss_dist.corpus.shards import Batch, Shard, tokenize_corpus
from avss_dist.executors.interface import ReplicaSpec
from avss_dist.executors.ray.worker import ShardAssignment, Worker
from avss_dist.measure.observer import Observer
from avss_dist.measure.shard import analyze_shard, follow
from avss_dist.models.checkpoints import resolve
from avss_dist.models.loading import load_tokenizer
from avss_dist.partition.replica import BatchContext, Placement, dummy_batch
from avss_dist.partition.single import SingleReplica
from avss_dist.stats.layer_stats import ShardResult

SETTINGS = Settings(max_sequences=13, sequence_length=32, batch_size=8, sequences_per_shard=13, device="cpu")


class SmallDevice(SingleReplica):
    """A device that runs out of memory beyond ``most`` rows, halfway through the layers."""

    most = 8

    def forward(self, batches: Sequence[Batch], context: BatchContext) -> None:
        for batch in batches:
            if len(batch.input_ids) > self.most:
                handle = self.layers[1].module.register_forward_pre_hook(self._fail)
                try:
                    super().forward([batch], context)
                finally:
                    handle.remove()
            super().forward([batch], context)

    def _fail(self, *_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


@pytest.fixture(scope="module")
def replica(tiny_llama: Path) -> SmallDevice:
    return SmallDevice(resolve(str(tiny_llama)), SETTINGS)


@pytest.fixture(scope="module")
def shard(tiny_llama: Path) -> Shard:
    return tokenize_corpus("builtin:pydoc", load_tokenizer(resolve(str(tiny_llama))), SETTINGS).shards[0]


@pytest.mark.parametrize("most", [7, 3, 1])
def test_a_batch_that_does_not_fit_is_halved(
    most: int, replica: SmallDevice, shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = analyze_shard(replica, shard, SETTINGS)
    monkeypatch.setattr(replica, "most", most)
    halved = analyze_shard(replica, shard, SETTINGS)
    assert halved.stats.keys() == whole.stats.keys() and len(whole.stats) == 5 * len(replica.layers)
    for key, stats in whole.stats.items():
        seen = halved.stats[key]
        for name in ("count", "sequence_count", "token_count", "unit_count", "nonfinite_count"):
            assert getattr(seen, name) == getattr(stats, name), name
        for name in FLOAT_FIELDS:
            np.testing.assert_allclose(getattr(seen, name), getattr(stats, name), rtol=1e-4, atol=1e-6, err_msg=name)
    rows = {7: 4, 3: 2, 1: 1}[most]
    assert halved.model["notes"][-1] == f"8 rows did not fit in memory at once; some batches had {rows}"
    assert whole.model["notes"] == []


def test_a_row_that_does_not_fit_fails_with_advice(
    replica: SmallDevice, shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica, "most", 0)
    with pytest.raises(BatchTooLarge, match=r"1 x 32 tokens do not fit in memory(.|\n)*streaming"):
        analyze_shard(replica, shard, SETTINGS)
    monkeypatch.undo()
    assert analyze_shard(replica, shard, SETTINGS).stats


def test_ranks_that_wait_for_each_other_do_not_halve_alone(
    replica: SmallDevice, shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica, "most", 4)
    monkeypatch.setattr(replica, "model", {**replica.model, "partition": "zero3"})
    with pytest.raises(BatchTooLarge, match="8 x 32 tokens"):
        analyze_shard(replica, shard, SETTINGS)
    assert analyze_shard(replica, shard, SETTINGS, rows=4).stats


def test_a_shard_is_concluded_while_the_next_one_is_computed(
    replica: SmallDevice, shard: Shard, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a worker with a GPU does it, in two threads: an error of the first one is its own, and the other's comes."""
    expected = analyze_shard(replica, shard, SETTINGS)
    spec = ReplicaSpec(checkpoint=resolve(str(tiny_llama)), settings=SETTINGS, placement=Placement())
    worker = Worker("rank 0", SETTINGS.threads, None)
    monkeypatch.setattr(worker, "_spec", spec)
    monkeypatch.setattr(worker, "_model", replica)
    outside = SimpleNamespace(is_canceled=lambda: False)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: outside)  # Ray's own would start a Ray here
    strata, first, second = Observer.strata, threading.Event(), threading.Event()

    def conclude(self: Observer) -> Any:
        if not first.is_set():
            first.set()
            assert second.wait(timeout=500), "the next shard was not begun"
            raise RuntimeError("it cannot be concluded")
        return strata(self)

    monkeypatch.setattr(Observer, "strata", conclude)

    def heartbeat() -> None:
        if first.is_set():
            second.set()

    monkeypatch.setattr(worker, "_heartbeat", heartbeat)
    assignment = ShardAssignment(shard=shard, rows=SETTINGS.batch_size, forwards=0, run_id="run")
    with ThreadPoolExecutor(2) as threads:
        failing = threads.submit(worker.measure, assignment)
        assert first.wait(timeout=500)
        result = threads.submit(worker.measure, assignment).result()
    assert "it cannot be concluded" in str(failing.exception())
    assert isinstance(result, ShardResult) and len(result.stats) == len(expected.stats)
    assert all(result.stats[key].equals(stats) for key, stats in expected.stats.items())


def test_fillers_count_for_nothing(replica: SmallDevice, shard: Shard) -> None:
    alone = analyze_shard(replica, shard, SETTINGS)
    beats: list[int] = []
    filled = analyze_shard(replica, shard, SETTINGS, forwards=5, heartbeat=lambda: beats.append(1))
    assert all(filled.stats[key].equals(stats) for key, stats in alone.stats.items())
    assert len(beats) == 5 * len(replica.layers), "two batches and three dummy batches, each through every layer"
    follow(replica, 2)
    assert not dummy_batch().observed.any() and dummy_batch().attention_mask.all()
