"""Tasks of several ranks on Ray: the first rank's result and events, and the error of the rank that failed first."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import pytest
from ray import cloudpickle
from ray.util import placement_group_table
from support.processes import ray_processes, wait_until

from avss_dist.core.errors import ModelError, RunFailed
from avss_dist.core.settings import Execution, Settings
from avss_dist.executors.ray.executor import RayExecutor
from avss_dist.partition.base import Placement

pytestmark = [pytest.mark.nightly, pytest.mark.usefixtures("warm_workers")]


@dataclass(frozen=True)
class Sum:
    """Sums the ranks' numbers, after an event for each; ``harm`` is done on rank 1 first."""

    harm: str = ""
    device: str = "cpu"

    def run(self, heartbeat: Callable[[], None], on_event: Callable[[Any], None]) -> Any:
        import torch
        from torch import distributed

        rank = distributed.get_rank()
        heartbeat()
        on_event(f"rank {rank} begins")
        if rank == 1:
            self._harm()
        number = torch.tensor([float(10 + rank)])
        distributed.all_reduce(number)
        on_event(number.item())
        return rank, number.item()

    def _harm(self) -> None:
        match self.harm:
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "raises":
                raise KeyError("nothing there")
            case "refuses":
                raise ModelError("The model is odd.", "Take another.")
            case "hangs":
                time.sleep(600)


@pytest.fixture(scope="module")
def executor() -> Iterator[RayExecutor]:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import it
    with closing(RayExecutor(Execution(hang_seconds=3.0, placement_seconds=8.0), Settings(device="cpu"))) as started:
        yield started
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def run(executor: RayExecutor, task: Any, ranks: int = 2) -> tuple[Any, list[Any]]:
    events: list[Any] = []
    try:
        return executor.run_ranks(task, ranks, threads=1, on_event=events.append), events
    finally:
        wait_until(lambda: not ray_processes())


@pytest.mark.parametrize(
    ("partition", "ranks", "strategy"),
    [("tensor_parallel", 2, "STRICT_PACK"), ("tensor_parallel", 4096, "PACK"), ("fsdp", 2, "PACK")],
)
def test_ranks_that_divide_a_shard_are_kept_on_one_node_that_has_room(
    executor: RayExecutor, partition: str, ranks: int, strategy: str
) -> None:
    executor.connect()
    placement = Placement(partition=partition, ranks=min(ranks, 2))
    gang = executor._new_gang(placement, threads=max(1, ranks // 2))
    assert placement_group_table(gang._group)["strategy"] == strategy
    gang.stop()
    wait_until(lambda: not ray_processes())


def test_the_first_rank_is_heard(executor: RayExecutor) -> None:
    assert run(executor, Sum()) == ((0, 21.0), ["rank 0 begins", 21.0])


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        ("killed", "Rank 1 was lost"),
        ("raises", "Rank 1 failed: KeyError: 'nothing there'"),
        ("hangs", r"Rank [01] made no progress in \d+ seconds"),
    ],
)
def test_the_rank_that_fails_is_named(executor: RayExecutor, harm: str, words: str) -> None:
    """And no process of the others is left."""
    with pytest.raises(RunFailed, match=words) as caught:
        run(executor, Sum(harm))
    assert caught.value.exit_code == 1


def test_a_mistake_that_a_rank_finds_is_that_of_the_user(executor: RayExecutor) -> None:
    with pytest.raises(ModelError, match="The model is odd") as caught:
        run(executor, Sum("refuses"))
    assert caught.value.exit_code == 2


def test_ranks_without_a_place_are_not_waited_for_forever(executor: RayExecutor) -> None:
    with pytest.raises(RunFailed, match=r"not placed in 8 seconds.*needs 50 workers of 1 CPUs"):
        run(executor, Sum(), ranks=50)
