"""Time of a run without a benchmark, from the speed of a similar run or of a matrix product."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch.nn.functional import linear

from avss_dist.core.settings import Settings
from avss_dist.models.size import Footprint
from avss_dist.system.cores import computing_threads
from avss_dist.system.devices import pick_device

ENOUGH_SECONDS = 0.05  # of one product, to tell its speed
FEWEST_ROWS = 8
OVERHEAD = 1.25  # time of a run, statistics included, in multiples of the time of its products: roughly
ALIKE = ("num_layers", "hidden_size", "num_parameters", "dtype", "partition")
COLUMNS = (*ALIKE, "run_id", "status", "device", "replicas", "tokens_per_second", "created_at")
"""Columns of ``runs`` that `speed_of_similar_run` reads."""


def speed_of_similar_run(
    runs: Sequence[Mapping[str, Any]], size: Footprint, partition: str, device: str
) -> tuple[float, str] | None:
    """Return the tokens per second of each replica in the newest finished run of the same shape, and its run id.

    Args:
        runs: rows of ``runs`` with the `COLUMNS`.
        device: ``cpu`` or ``cuda``.
    """
    wanted = (size.num_layers, size.hidden_size, size.num_parameters, size.dtype, partition)
    for run in sorted(runs, key=lambda run: run["created_at"], reverse=True):
        alike = tuple(run[name] for name in ALIKE) == wanted and (run["device"] == "cpu") == (device == "cpu")
        if alike and run["status"] == "done" and run["tokens_per_second"]:
            return run["tokens_per_second"] / (run["replicas"] or 1), run["run_id"]
    return None


def multiplication_speed(size: Footprint, settings: Settings) -> float:
    """Return the floating-point operations per second of a linear map as wide as the model, in its dtype.

    The number of rows is doubled until a product takes long enough or has all rows of a batch.
    """
    device, dtype = pick_device(settings.device), getattr(torch, size.dtype)
    weight = torch.ones(max(size.mlp_width // 3, size.hidden_size), size.hidden_size, dtype=dtype, device=device)
    batch_tokens = settings.batch_size * settings.sequence_length
    speed = 1.0
    with computing_threads(settings.threads), torch.inference_mode():
        for rows in takewhile(lambda rows: rows < 2 * batch_tokens, _doubled(FEWEST_ROWS)):
            states = torch.ones(min(rows, batch_tokens), size.hidden_size, dtype=dtype, device=device)
            seconds = min(_seconds(states, weight) for _ in range(2))  # the first is slower
            speed = 2 * states.numel() * len(weight) / seconds
            if seconds > ENOUGH_SECONDS:
                break
    return speed


def run_seconds(size: Footprint, settings: Settings, speed: float, num_sequences: int) -> float:
    """Return roughly the seconds in which one replica measures rows of tokens, at a speed of multiplication."""
    return OVERHEAD * size.forward_flops(num_sequences, settings.sequence_length) / speed


def _doubled(number: int) -> Iterator[int]:
    while True:
        yield number
        number *= 2


def _seconds(states: torch.Tensor, weight: torch.Tensor) -> float:
    start = time.perf_counter()
    linear(states, weight)
    if states.is_cuda:
        torch.cuda.synchronize(states.device)
    return time.perf_counter() - start
