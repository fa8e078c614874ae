"""What one driver bears: shard results/s, CPU, memory and bytes, from 1 to 64 virtual workers, without a model.

    python tests/benchmarks/driver.py [--workers 1 8 64] [--shards 4000] [--alone] [--out FOLDER] [--by WHOM]

The driver is the real one: RayExecutor and its pool, the committer, the warehouse. A virtual worker is a Ray actor
without a CPU that hands out results made beforehand, as of bfloat16 activations: five sites, counts of some 2,400
values, two vectors of the hidden units at `block` and `update`; tokens of 32 x 2048 in each task. ``--by`` says who
does what: `receipts`, workers have written and send receipts (they write nothing here: it is the driver that is
measured); `bytes`, they encode and the driver writes. Virtual shards take no time, so
a call carries several of them; with ``--alone`` it carries one, as it does where shards take more than half a second.
Storage and workers share this machine: a rate is at least what is printed.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns of actors without devices

import numpy as np
import pyarrow as pa
import ray
from ray import cloudpickle

from avss_dist.core.errors import AvssError
from avss_dist.core.files import Spool
from avss_dist.core.settings import Settings
from avss_dist.core.sites import SITES
from avss_dist.core.thresholds import THRESHOLDS
from avss_dist.corpus.shards import CorpusPlan, Shard
from avss_dist.distillation.curve import ignore
from avss_dist.models.checkpoint.locate import Checkpoint
from avss_dist.models.checkpoint.training import TrainingPoint
from avss_dist.partition.execution import Execution
from avss_dist.partition.placement import Placement
from avss_dist.runs.driver import Driver
from avss_dist.runs.in_progress import RunInProgress
from avss_dist.runs.job_file import RunSpec
from avss_dist.runs.planned import PlannedRun
from avss_dist.runs.ray import gang, queue
from avss_dist.runs.ray.executor import RayExecutor
from avss_dist.runs.result import Run
from avss_dist.runs.work import Receipt
from avss_dist.stats.layer_stats import HISTOGRAM_BINS, LayerStats, ShardResult, histogram_bin
from avss_dist.warehouse.encoding import encode_shard
from avss_dist.warehouse.schema import RunIdentity
from avss_dist.warehouse.store import Store

ROWS = 32
LENGTH = 2048
VALUES = 2400  # different ones among the activations of a site
MADE = 32  # results that are made beforehand
MOST_RUNS = 1000  # more than are measured in the time
RUN = RunIdentity(run_id="virtual-0000000000", model="virtual", revision="0", family="virtual")
VIRTUAL: Any = SimpleNamespace(name=RUN.model)  # the specification of a run, of which events take the name


def layer_stats(rng: np.random.Generator, site: str, units: int) -> LayerStats:
    """Statistics as large as real ones; sums have float32's precision, as those of 16-bit activations about have."""
    patterns = np.arange(0x3000, 0x3000 + VALUES, dtype=np.uint32) << 16  # of bfloat16: some 19 octaves
    abs_value = patterns.view(np.float32)
    expected_counts = rng.exponential(1e4, VALUES)
    abs_value_count = 1 + rng.poisson(expected_counts)
    histogram = np.zeros(HISTOGRAM_BINS, np.int64)
    np.add.at(histogram, histogram_bin(abs_value), abs_value_count)
    kept = units if site in ("block", "update") else 0
    normal = rng.standard_normal(kept, np.float32)
    sums = 50 * normal.astype(np.float64)
    return LayerStats(
        thresholds=np.array(THRESHOLDS),
        near_zero=rng.integers(0, 1 << 30, len(THRESHOLDS)),
        count=int(abs_value_count.sum()),
        mean=rng.normal(),
        m2=rng.uniform(1, 1e9),
        min=-30.0,
        max=31.0,
        max_abs=31.0,
        histogram=histogram,
        abs_value=abs_value,
        abs_value_count=abs_value_count,
        sequence_count=ROWS,
        pooled_variance_sum=rng.uniform(),
        unit_count=ROWS * LENGTH if kept else 0,
        unit_sum=sums,
        unit_sum_sq=sums**2,
    )


def shards(count: int) -> list[Shard]:
    """Shards of random tokens, kept as a corpus plan keeps them."""
    rng = np.random.default_rng(0)
    lengths = np.full(ROWS, LENGTH, np.int32)
    spool = Spool(LENGTH)
    for _ in range(count):
        spool.add(rng.integers(0, 1 << 17, (ROWS, LENGTH), np.int32))
    shards = []
    for number, ids in enumerate(spool.array().reshape(count, ROWS, LENGTH)):
        content_hash = f"{number:064x}"
        shard = Shard(shard_id=number, input_ids=ids, lengths=lengths, skip_first_tokens=0, content_hash=content_hash)
        shards.append(shard)
    return shards


def prepare(folder: Path, shards: Sequence[Shard], layers: int, units: int) -> int:
    """Keep the partial of every shard in a folder, and return the bytes of a partial."""
    rng = np.random.default_rng(1)
    strata = {}
    for layer in range(layers):
        for site in SITES:
            strata[layer, site, ""] = layer_stats(rng, site, units)
    names = tuple(f"model.layers.{layer}" for layer in range(layers))
    for shard in shards[:MADE]:
        result = ShardResult(
            shard_id=shard.shard_id,
            content_hash=shard.content_hash,
            layers=names,
            strata=strata,
            num_tokens=shard.num_tokens,
            seconds=1.0,
            model={"family": RUN.family, "notes": []},
        )
        data = encode_shard(RUN, result)["shard_stats"]
        (folder / str(shard.shard_id)).write_bytes(data)
    return data.size


class Job(NamedTuple):
    """What the pool knows of a job; workers need nothing of it."""

    placement: Placement
    settings: Settings
    checkpoint: Any = None

    def __reduce__(self) -> Any:
        return str, ("virtual",)


class VirtualWorker:
    """An actor in the place of `gang.Worker`, with results of a folder."""

    folder: Path
    by: str

    def __init__(self, name: str, threads: int, monitor: Any, umask: int) -> None:
        self._name = name
        self._monitor = monitor

    def address(self) -> tuple[str, int, str, int]:
        return "127.0.0.1", 0, ray.get_runtime_context().get_node_id(), os.getpid()

    def open(self, job: Any, rank: int, first: Any) -> None:
        self._monitor.report.remote(self._name, 1)

    def measure_round(self, assignments: Any) -> list[Receipt]:
        return [self.measure(assignment) for assignment in assignments]

    def measure(self, assignment: Any) -> Receipt:
        shard = assignment.shard
        files = {}
        if self.by != "receipts":
            partial = self.folder / str(shard.shard_id % MADE)
            files["shard_stats"] = pa.memory_map(str(partial)).read_buffer()
        return Receipt(shard_id=shard.shard_id, num_tokens=shard.num_tokens, seconds=1.0, files=files)


class VirtualExecutor(RayExecutor):
    """As many replicas as are asked for, none of which takes a CPU."""

    def replicas(self, placement: Placement) -> int:
        return self._execution.replicas.maximum if self._execution.replicas else 1

    def cpus(self, placement: Placement) -> int:
        return 0


class Enough(AvssError):
    """Raised when the time to measure is over."""


class Times:
    """Wall clock and CPU time of this process at every commit, from the tenth result of a worker on average."""

    def __init__(self, workers: int, seconds: float) -> None:
        self._before = 10 * workers
        self._seconds = seconds
        self.times: list[tuple[float, float]] = []

    def note_commit(self) -> None:
        """Note the times of a commit, or raise Enough after the last one."""
        self._before -= 1
        if self._before < 0:
            self.times.append((time.perf_counter(), time.process_time()))
        self.require_time()

    def require_time(self) -> None:
        """Raise Enough if the time is over."""
        if not self.times:
            return
        first, _ = self.times[0]
        last, _ = self.times[-1]
        if last - first > self._seconds:
            raise Enough("The time is over.")


class CommittedRun(RunInProgress):
    """A run whose commits are timed. It is not merged."""

    times: Times

    def store(self, result: Any) -> None:
        """Store a result, and note the time."""
        super().store(result)
        self.times.note_commit()

    def finish(self, *_: Any, **__: Any) -> Run:
        """Return the run."""
        return self.result

    def record_failure(self, error: AvssError) -> None:
        """Record nothing: the last run fails because the time is over."""


class OneRunPlanner:
    """Plans the same run again and again, under a new id."""

    def __init__(self, planned: PlannedRun, store: Store, times: Times) -> None:
        self._planned = planned
        self._store = store
        self._times = times
        self._numbers = count()

    def prepare(self, _: RunSpec) -> PlannedRun:
        """Return the run with its next id."""
        self._times.require_time()
        run_id = f"virtual-{next(self._numbers):010}"
        result = replace(self._planned.result, run_id=run_id)
        return replace(self._planned, result=result)

    def begin(self, planned: PlannedRun, **_: Any) -> RunInProgress:
        """Return the run, none of whose shards counts as stored. All ids write the same files."""
        running = CommittedRun(self._planned, self._store, fresh=True)
        running.times = self._times
        return running


def drive(out: Path, workers: int, shards: list[Shard], seconds: float) -> list[tuple[float, float]]:
    """Hand out all shards for so long; the clock and the driver's CPU time at every commit."""
    settings = Settings(device="cpu")
    model = out.with_name(f"{out.name}-model")
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')
    checkpoint = Checkpoint(name=RUN.model, source="folder", path=str(model), revision=RUN.revision)
    job: Any = Job(Placement(), settings, checkpoint=checkpoint)
    tokens = sum(shard.num_tokens for shard in shards)
    corpus = CorpusPlan(
        source="virtual",
        corpus_fingerprint="",
        tokens_fingerprint="",
        shards=tuple(shards),
        num_sequences=ROWS * len(shards),
        num_tokens=tokens,
    )
    result = Run(run_id=RUN.run_id, model=RUN.model, warehouse=str(out), status="skipped")
    planned = PlannedRun(
        replica_spec=job,
        corpus=corpus,
        fingerprint="0" * 64,
        result=result,
        replicas=workers,
        training=TrainingPoint("virtual"),
    )
    store = Store(out)
    store.storage.create()
    with closing(VirtualExecutor(Execution(executor="ray", replicas=workers), settings)) as executor:
        times = Times(workers, seconds)
        planner: Any = OneRunPlanner(planned, store, times)
        driver = Driver(store, executor, ignore, fresh=True, planner=planner)
        for _ in driver.run([VIRTUAL] * MOST_RUNS):
            pass
    return times.times


def memory() -> tuple[float, float]:
    """The driver's highest resident memory, the object store's pages that it has read in it, and its own, in MB."""
    status = Path("/proc/self/status").read_text()
    values = dict(line.split(":", 1) for line in status.splitlines())
    return megabytes(values["VmHWM"]), megabytes(values["RssAnon"])


def megabytes(value: str) -> float:
    """Return a value of a process's status, which is in KiB, in MB."""
    number, _unit = value.split()
    return int(number) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--units", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--shards", type=int, help="of a run; 4000 if left out, 32 where the driver writes")
    parser.add_argument("--alone", action="store_true", help="see above")
    parser.add_argument("--seconds", type=float, default=10, help="to measure, once all workers are there")
    parser.add_argument("--out", help="folder of the warehouse; a temporary one if left out")
    parser.add_argument("--by", choices=("receipts", "bytes"), default="receipts", help="see above")
    arguments = parser.parse_args()
    cloudpickle.register_pickle_by_value(__import__("__main__"))
    gang.Worker = VirtualWorker  # type: ignore[misc,assignment]
    if arguments.alone:
        queue.ROUND_SECONDS = 0.0
    queue.ShardAssignment = SimpleNamespace  # type: ignore[misc,assignment]  # the real one brings torch into 64 processes
    with tempfile.TemporaryDirectory(dir="/dev/shm") as planned, tempfile.TemporaryDirectory(dir=arguments.out) as out:
        VirtualWorker.folder = Path(planned)
        VirtualWorker.by = arguments.by
        usual = 4000 if arguments.by == "receipts" else MADE
        work = shards(arguments.shards or usual)
        on_disk = prepare(Path(planned), work, arguments.layers, arguments.units)
        print(f"{arguments.layers} layers, {len(SITES)} sites, {arguments.units} units", end=": ")
        print(f"{on_disk / 1e6:.2f} MB a result; runs of {len(work)} shards")
        print(f"{'workers':>8}{'results/s':>11}{'MB/s':>8}{'driver CPU ms/result':>22}{'peak MB':>9}{'own MB':>8}")
        for workers in arguments.workers:
            Path("/proc/self/clear_refs").write_text("5")  # of the peak memory
            warehouse = Path(out) / str(workers)
            times = drive(warehouse, workers, work, arguments.seconds)
            clock, cpu = np.subtract(times[-1], times[0]) / (len(times) - 1)
            peak, own = memory()
            print(f"{workers:>8}{1 / clock:>11.1f}{on_disk / clock / 1e6:>8.0f}", end="")
            print(f"{1e3 * cpu:>22.1f}{peak:>9.0f}{own:>8.0f}", flush=True)


if __name__ == "__main__":
    main()
