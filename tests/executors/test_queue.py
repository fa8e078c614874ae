"""Units on their way through a pool: each counts once, failures are counted, errors end what they should end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import ray
from support.units import SETTINGS, cell_queue, shard_queue

from avss_dist.core.errors import ModelError
from avss_dist.executors.ray import queue as queue_module
from avss_dist.executors.ray.queue import ATTEMPTS, BLOCK_SHARDS, LATE_SECONDS, ShardQueue


@pytest.fixture(autouse=True)
def no_object_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """References are what would be put there."""
    monkeypatch.setattr(ray, "put", lambda value: value)


def assignments(queue: ShardQueue, units: Sequence[int]) -> list[Any]:
    """What the workers of a gang do in a round, one after the other."""
    return [assignment.resolved(blocks) for some, blocks in queue.parts(units) for assignment in some]


@dataclass(frozen=True)
class Patch:
    """What a repair leaves in a file."""

    key: str

    def read(self) -> bytes:
        return self.key.encode()


def test_a_result_counts_once() -> None:
    queue, run = shard_queue(2)
    (first,) = queue.next_units()
    queue.speculate([first])
    assert list(queue.pending) == [0, 1]
    assert queue.finish(first, "a result") == [(run, "a result")]
    assert list(queue.pending) == [1], "who is late need not begin any more"
    assert queue.finish(first, "the same result") == []
    assert queue.unfinished == {1}


def test_a_result_costs_the_same_however_many_units_are_pending() -> None:
    queue, _ = shard_queue(3)
    pending = queue.pending
    queue.finish(*queue.next_units(), "a result")
    assert queue.pending is pending, "it was built anew"
    assert list(pending) == [1, 2]


def test_a_cell_fails_alone_and_a_model_with_all_of_its_cells() -> None:
    queue, cells = cell_queue(["loss"] * 4)
    error = ModelError("no such layer")
    assert queue.fail(queue.next_units(), error) == [(cells[0], error)]
    queue.finish(2, "a result")
    for _ in range(ATTEMPTS - 1):
        assert queue.put_back([], "out of reach") == []
    outcomes = queue.put_back([], "out of reach")
    assert [cell for cell, _ in outcomes] == [cells[1], cells[3]]
    assert all("Opening the model failed" in str(failure) for _, failure in outcomes)
    assert not queue.is_active


def test_gangs_that_open_a_model_at_once_fail_at_once() -> None:
    """Half of the nodes may be lost while all of them open it; what counts is how often one after the other failed."""
    queue, run = shard_queue(3)
    together = time.monotonic()
    for _ in range(5):
        assert queue.put_back([], "its node was lost", together) == []
    assert queue.put_back([], "again", time.monotonic()) == []
    queue.note_opened()
    for _ in range(ATTEMPTS - 1):
        assert queue.put_back([], "it died", time.monotonic()) == [], "it can be opened: what was before counts no more"
    assert queue.put_back([], None) == [], "no failure of the model"
    ((source, error),) = queue.put_back([], "it died", time.monotonic())
    assert source is run and "Opening the model failed 3 times; the last time: it died" in str(error)


def test_a_unit_that_fails_is_no_model_that_cannot_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it hide failures to open the model that began before it; those that began at a failure are new ones."""
    queue, _ = shard_queue(3)
    queue.clock = lambda: 10.0
    assert queue.put_back(queue.next_units(), "it died") == []
    for begun in (5.0, 10.0):
        assert queue.put_back([], "out of reach", begun) == []
    assert queue.put_back([], "its node was lost", 9.0) == [], "it was being opened at the first failure"
    (outcome,) = queue.put_back([], "out of reach", 10.0)
    assert "Opening the model failed 3 times" in str(outcome[1])


def test_what_was_measured_meanwhile_is_not_put_back() -> None:
    queue, _ = shard_queue(4)
    queue.note_duration([0], 0.01)
    assert queue.next_units() == [0] and queue.next_units() == [1]
    queue.finish(0, "a result")
    assert queue.put_back([0, 1], None) == []
    assert list(queue.pending) == [1, 2, 3] and queue.unfinished == {1, 2, 3}
    assert shard_queue(1)[0].next_units() == [0]


def test_every_rank_takes_the_cell_with_its_patch() -> None:
    queue, cells = cell_queue(["loss"], partition="tensor_parallel", ranks=2)
    parts = [assignment for some, _ in queue.parts([0]) for assignment in some]
    assert [(one.cell, one.rows) for one in parts] == [(cells[0], SETTINGS.batch_size)] * 2
    queue, cells = cell_queue(["loss", "loss"], Patch("k"))
    (((assignment,), blocks),) = queue.parts([1])
    assert assignment.resolved(blocks) is assignment
    assert assignment.cell.part == 1 and assignment.cell.intervention.patch.data == b"k"
    assert cells[1].intervention.patch == Patch("k")


def test_ranks_that_take_different_shards_take_as_long_as_one() -> None:
    """And are never late: nobody measures their shards beside them."""
    queue, _ = shard_queue(9, partition="zero3", ranks=2)
    queue.note_duration(queue.next_units(), 3.0)
    assert queue.usual_seconds(0) == 3.0
    assert not queue.is_late(queue.next_units(), 1e9)


def test_gangs_of_ranks_that_share_shards_take_one_after_the_other() -> None:
    queue, _ = shard_queue(100, partition="tensor_parallel", ranks=2)
    queue.note_duration(queue.next_units(), 0.01)
    assert queue.next_units() == [1]
    assert [part.forwards for part in assignments(queue, [4])] == [2, 2]  # 5 rows, 4 in a batch
    assert [part.forwards for part in assignments(shard_queue()[0], [4])] == [0], "it waits for nobody"


def test_only_units_of_one_kind_say_what_is_late() -> None:
    queue, _ = cell_queue(["loss", "loss", "shapley"])
    assert not queue.is_late([1], 1e9), "nothing to compare it with"
    queue.note_duration([0], 1.0)
    assert queue.is_late([1], 3.0) and not queue.is_late([1], LATE_SECONDS)
    assert not queue.is_late([2], 1e9), "of another task"
    assert not queue.is_late([], 1e9), "a model that is being opened"
    queue.speculate([1])
    assert not queue.is_late([1], 1e9), "no third time"


def test_ranks_share_a_shard_or_take_one_each() -> None:
    """ZeRO-3 ranks take different shards, and run equal numbers of forward passes; tensor-parallel ones share."""
    queue, run = shard_queue(5, partition="zero3", ranks=3)
    assert queue.pending_rounds == 2
    queue.next_units()
    last = queue.next_units()
    assert last == [3, 4] and queue.by_rank(last) == [[3], [4], []]
    parts = assignments(queue, last)
    assert [part.shard for part in parts] == [run.shards[3], run.shards[4], None]
    assert {part.forwards for part in parts} == {2}  # 5 rows, 4 in a batch
    queue, run = shard_queue(2, partition="tensor_parallel", ranks=2)
    assert queue.by_rank(queue.next_units()) == [[0], [0]]
    assert [part.shard for part in assignments(queue, [1])] == [run.shards[1]] * 2


def test_a_gang_has_its_next_round_beforehand_while_there_are_enough() -> None:
    queue, _ = shard_queue(5)
    queue.next_units()
    assert queue.runs_ahead(3) and not queue.runs_ahead(4), "others would have none"
    queue.put_back([0], None)
    assert not queue.runs_ahead(3), "what is measured again is measured alone"
    queue.finish(*queue.next_units(), "a result")
    assert queue.runs_ahead(3)
    assert not shard_queue(5, partition="zero3", ranks=2)[0].runs_ahead(1), "ranks keep one order"
    assert not cell_queue(["loss"] * 5)[0].runs_ahead(1), "cells take very different times"


def test_short_shards_share_a_round_until_one_of_them_fails() -> None:
    """As many as take a second, and a sixteenth of a gang's part of what is left; who may be to blame goes alone."""
    queue, run = shard_queue(100)
    assert queue.next_units(2) == [0], "how long they take is not known"
    queue.note_duration([0], 0.01)
    assert queue.next_units(2) == [1, 2, 3]
    assert [part.shard for part in assignments(queue, [15, 16, 17])] == [*run.shards[15:18]]
    queue.note_duration([1, 2, 3], 1.5)
    assert queue.usual_seconds(0) == 0.5
    assert queue.next_units(2) == [4, 5]
    assert not queue.is_late([4, 5, 6], 2.9) and queue.is_late([4, 5, 6], 3.1), "twice as long as three take"
    for _ in range(ATTEMPTS):
        assert queue.put_back([4, 5], "it died") == [], "of neither alone"
    assert [queue.next_units(2), queue.next_units(2), queue.next_units(2)] == [[4], [5], [6, 7]]
    assert queue.put_back([4], "it died") == queue.put_back([4], "it died") == []
    ((source, error),) = queue.put_back([4], "it died")
    assert source is run and "Shard 4 failed 3 times" in str(error)


def test_blocks_of_shards_are_shared_once_and_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small shards travel with the call."""
    stored: list[Any] = []
    monkeypatch.setattr(ray, "put", lambda block: stored.append(block[0]) or block)
    queue, run = shard_queue(3 * BLOCK_SHARDS)
    last = BLOCK_SHARDS - 1
    for number, small in ((0, 1 << 20), (2, 0)):
        monkeypatch.setattr(queue_module, "SENT_BYTES", small)
        for units in ([0], [last, last + 1], [last + 1]):
            assert [part.shard for part in assignments(queue, units)] == [run.shards[unit] for unit in units]
        assert len(stored) == number
    for first in (2 * BLOCK_SHARDS, 0):
        queue.parts([first])
    assert stored == [run.shards[i] for i in (0, BLOCK_SHARDS, 2 * BLOCK_SHARDS, 0)]

    def is_full(_: object) -> None:
        raise ray.exceptions.OutOfDiskError

    monkeypatch.setattr(ray, "put", is_full)
    ((_, blocks),) = shard_queue(BLOCK_SHARDS)[0].parts([1])
    assert blocks == [tuple(run.shards[:BLOCK_SHARDS])], "sent with the call"


def test_a_patch_is_shared_once_for_all_of_its_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many workers and cells use it; those that are done are let go."""
    stored: list[bytes] = []
    monkeypatch.setattr(ray, "put", lambda data: stored.append(data) or data)
    queue, cells = cell_queue(["loss"])
    for key in "aababcddcab":
        queue.units = [replace(cells[0], intervention=replace(cells[0].intervention, patch=Patch(key)))]
        ((((assignment,), _)),) = queue.parts([0])
        assert assignment.cell.intervention.patch.data == key.encode()
    assert stored == [b"a", b"b", b"c", b"d", b"a", b"b"]
