"""What the end of a large run costs: thousands of partials, merged by tasks on this machine, without a model.

    python tests/benchmarks/merge.py [--partials 10000] [--layers 8] [--units 1024] [--whole] [--out FOLDER]

Partials are as of `tests/benchmarks/driver.py`: bfloat16, five sites. Their statistics are a few that repeat, each
under its own shard; files, decoding and merging are the real ones. Prints seconds and the highest memory of the driver
and of a task, in which pages of the object store are, beside those of one process without tasks for as many partials as
a run merges itself; with ``--whole``, for all.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np  # noqa: E402
import psutil  # noqa: E402
from driver import RUN, layer_stats  # noqa: E402

from avss_dist.core.settings import SITES, Execution, Settings  # noqa: E402
from avss_dist.executors.ray.executor import RayExecutor  # noqa: E402
from avss_dist.runs.partials import MERGED_HERE, merge_partials  # noqa: E402
from avss_dist.stats.layer_stats import ShardResult  # noqa: E402
from avss_dist.system.memory import peak_memory, reset_peak_memory  # noqa: E402
from avss_dist.warehouse.sharing import shared  # noqa: E402
from avss_dist.warehouse.store import Store  # noqa: E402

DIFFERENT = 4  # results that are made
WRITERS = 2


def results(layers: int, units: int) -> list[ShardResult]:
    """A few results, of shard 0."""
    rng = np.random.default_rng(1)
    return [
        ShardResult(
            shard_id=0,
            content_hash="",
            layers=tuple(f"model.layers.{i}" for i in range(layers)),
            stats={(layer, site): layer_stats(rng, site, units) for layer in range(layers) for site in SITES},
            num_tokens=65536,
            seconds=1.0,
            model={"family": RUN.family, "notes": []},
        )
        for _ in range(DIFFERENT)
    ]


def write(layers: int, units: int, root: str, ids: range) -> None:
    """Write partials, in a process of its own: what it takes is none of the driver's memory."""
    store, made = Store(root), results(layers, units)
    for i in ids:
        store.write_shard(RUN, replace(made[i % DIFFERENT], shard_id=i, content_hash=f"{i:064x}"))


def peak_of(process: psutil.Process) -> int:
    """The highest resident memory of a Ray worker, in kB; 0 of other processes."""
    if not process.name().startswith("ray::"):
        return 0
    status = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0])


def measure(store: Store, number: int, apply: Callable[..., Iterable[Any]] | None) -> str:
    """Merge so many partials."""
    expected = {i: f"{i:064x}" for i in range(number)}
    reset_peak_memory()
    with shared(store) as warehouse:
        begun = time.perf_counter()
        merge_partials(store, warehouse, RUN.run_id, expected, apply)
        seconds = time.perf_counter() - begun
    highest = max((peak_of(process) for process in psutil.Process().children(recursive=True)), default=0)
    line = f"{number:>9}{'tasks' if apply else 'one process':>13}{seconds:>9.1f}{1e3 * seconds / number:>12.2f}"
    return f"{line}{peak_memory() / 1e6:>12.0f}{highest / 1e3 if apply else 0:>12.0f}"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--partials", type=int, default=10_000)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--units", type=int, default=1024)
    parser.add_argument("--whole", action="store_true", help="see above")
    parser.add_argument("--out", help="folder of the warehouse; a temporary one if left out")
    arguments = parser.parse_args()
    executor = RayExecutor(Execution(executor="ray"), Settings(device="cpu"))
    with (
        tempfile.TemporaryDirectory(dir=arguments.out) as folder,
        closing(executor),
    ):
        store = Store(folder)
        store.create()
        write_all = partial(write, arguments.layers, arguments.units, folder)
        writers = 1 if arguments.partials < 100 else WRITERS
        with ProcessPoolExecutor(writers, multiprocessing.get_context("spawn")) as processes:
            list(processes.map(write_all, [range(i, arguments.partials, writers) for i in range(writers)]))
        executor.connect()
        files = list(Path(folder).rglob("shard_stats/**/*.parquet"))
        print(f"{len(files)} partials of {files[0].stat().st_size / 1e6:.2f} MB, {executor.devices.cpus} CPUs")
        print(f"{'partials':>9}{'by':>13}{'seconds':>9}{'ms each':>12}{'driver MB':>12}{'a task MB':>12}")
        most = arguments.partials if arguments.whole else MERGED_HERE
        print(measure(store, min(most, arguments.partials), None), flush=True)
        print(measure(store, arguments.partials, executor.apply), flush=True)


if __name__ == "__main__":
    main()
