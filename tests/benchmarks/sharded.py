"""Memory, time and messages of the partitions that share a model's weights between ranks, in one run.

    python tests/benchmarks/sharded.py MODEL [--ranks 2] [--rows 16] [--length 256] [--rounds 3] [--partition fsdp ...]

Ranks are processes on this machine, over gloo, with a thread each, which open one partition after the other. A rank of
`fsdp` or `zero3` measures rows of its own, those of `tensor_parallel` and `expert_parallel` all rows together. Printed
are, for the rank with the most of each: the bytes of layers' weights that it holds between passes, the peak of its
memory beyond what it holds then, the seconds of the fastest pass over all rows, and the calls of collectives in a pass
with the bytes of their tensors in float32.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)  # beside this file is a coverage.py, which numba would import

import numpy as np
import torch
from support.rank_processes import Gang
from support.warm_workers import warm_server
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from avss_dist.core.registry import PARTITIONS
from avss_dist.core.settings import Settings
from avss_dist.corpus.shards import Shard
from avss_dist.measure.shard import analyze_shard
from avss_dist.models.checkpoints import resolve
from avss_dist.partition.base import Placement
from avss_dist.partition.open import open_replica
from avss_dist.system.memory import peak_memory, reset_peak_memory, resident_memory

SHARED = [name for name, info in PARTITIONS.items() if info.gang]


class Cost(NamedTuple):
    """Cost of a partition on one rank."""

    weight_bytes: int
    peak_bytes: int
    seconds: float
    calls: int
    exchanged_bytes: int


def measured(partition: str, folder: str, rows: int, length: int, rounds: int) -> Cost:
    """Return what a rank measures of its part of a replica. All ranks call this."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    settings = Settings(batch_size=4, sequence_length=length, dtype="float32", device="cpu")
    replica = open_replica(resolve(folder), settings, Placement(partition=partition, ranks=world))
    held = sum(_held_bytes(p) for layer in replica.layers for p in layer.module.parameters())
    own = rows // world if PARTITIONS[partition].splits_data else rows
    random = np.random.default_rng(rank if own < rows else 0)
    ids = random.integers(3, 250, (own, length)).astype(np.int32)
    lengths = np.full(own, length, np.int32)
    shard = Shard(shard_id=0, input_ids=ids, lengths=lengths, skip_first_tokens=0, content_hash="random")
    analyze_shard(replica, shard, settings)
    before = resident_memory()
    reset_peak_memory()
    times = []
    for _ in range(rounds):
        torch.distributed.barrier()
        started = time.perf_counter()
        analyze_shard(replica, shard, settings)
        torch.distributed.barrier()
        times.append(time.perf_counter() - started)
    peak = peak_memory() - before
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        analyze_shard(replica, shard, settings)
    calls = [event for event in profiled.events() if event.name.startswith("c10d::")]
    exchanged = sum(max((_numel(shape) for shape in event.input_shapes), default=0) for event in calls)
    replica.close()
    return Cost(held, max(0, peak), min(times), len(calls), 4 * exchanged)


def _held_bytes(parameter: torch.nn.Parameter) -> int:
    """Return the bytes of a parameter that this process holds."""
    held = parameter.to_local() if isinstance(parameter, DTensor) else getattr(parameter, "ds_tensor", parameter)
    return int(held.numel() * held.element_size())


def _numel(shape: Any) -> int:
    """Return the elements of a tensor or of a list of tensors, from the shape that the profiler recorded."""
    if shape and isinstance(shape[0], (list, tuple)):
        return sum(map(_numel, shape))
    return prod(shape) if shape else 0


def main() -> None:
    import benchmarks.sharded as this  # a module that ranks can import, where this file runs as a program

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--partition", nargs="+", choices=SHARED, default=["fsdp", "zero3"])
    options = parser.parse_args()
    print(f"{'partition':16} {'weights MB':>11} {'peak MB':>8} {'seconds':>8} {'calls':>6} {'exchanged MB':>13}")
    with tempfile.TemporaryDirectory() as name, warm_server(Path(name)):
        gang = Gang(options.ranks, Path(name))
        try:
            for partition in options.partition:
                given = (partition, str(options.model), options.rows, options.length, options.rounds)
                cost = Cost(*map(max, zip(*gang.run(this.measured, *given), strict=True)))
                print(
                    f"{partition:16} {cost.weight_bytes / 1e6:11,.1f} {cost.peak_bytes / 1e6:8,.1f} "
                    f"{cost.seconds:8.3f} {cost.calls:6} {cost.exchanged_bytes / 1e6:13,.1f}",
                    flush=True,
                )
        finally:
            gang.stop()


if __name__ == "__main__":
    main()
