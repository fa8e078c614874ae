"""Rates at which memory is copied on this machine, and at which two processes exchange tensors."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch

EXCHANGES = 6  # of which the fastest counts
GATHERED = 32 << 20  # bytes, at most, of one tensor that is put together


def copy_rate() -> float:
    """Return the rate of copies from memory to memory, in bytes per second."""
    source = torch.ones(1 << 25, dtype=torch.uint8)
    target = torch.empty_like(source)
    target.copy_(source)
    start = time.perf_counter()
    for _ in range(4):
        target.copy_(source)
    return 4 * source.numel() / (time.perf_counter() - start)


def sum_seconds(size: int) -> float:
    """Return the seconds in which two ranks sum bfloat16 tensors of ``size`` bytes over gloo."""
    return _exchange_seconds(lambda group, hidden: group.allreduce([hidden]), size)


def gather_rate(size: int) -> float:
    """Return the rate, in bytes per second, at which two ranks gather tensors of ``size`` bytes over gloo."""

    def gather(group: Any, half: torch.Tensor) -> Any:
        return group._allgather_base(half.new_empty(2 * half.numel()), half)

    size = min(size, GATHERED)
    return size / _exchange_seconds(gather, size // 2)


def _exchange_seconds(exchange: Callable[[Any, torch.Tensor], Any], size: int) -> float:
    """Return the seconds of an exchange of ``size`` bytes between two ranks, as two threads of this process."""
    store, seconds = torch.distributed.HashStore(), []

    def rank(number: int) -> None:
        group: Any = torch.distributed.ProcessGroupGloo(store, number, 2, timedelta(seconds=60))
        tensor = torch.zeros(size // 2, dtype=torch.bfloat16)
        for _ in range(EXCHANGES):
            start = time.perf_counter()
            exchange(group, tensor).wait()
            seconds.append(time.perf_counter() - start)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(rank, range(2)))
    return min(seconds)
