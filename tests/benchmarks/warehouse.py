"""Time, memory and requests of the commands that read a warehouse, and of every ready query, on many synthetic runs.

    python tests/benchmarks/warehouse.py FOLDER [--runs 2000] [--layers 80] [--rounds 3] [--s3] [--only compare ...]

The warehouse is written where FOLDER has none (about a minute): two sites, every recipe and threshold of a real run,
16 units, 200 bins. Every command runs in a process of its own, from start to end. They share a cache that is empty at
first, so a command's first round copies what no earlier command has read. Printed are the seconds of all cores of the
first round and, of later rounds, the fewest, with their seconds, and the peak memory of all rounds. ``avss --version``
is the start of the interpreter.

With ``--s3`` the warehouse is copied to a server of S3 on this machine (moto), the commands read it there, and the
requests of the first and of a later round are printed. Commands in ``--only`` are run in their order; ``compact`` is
one of them, which writes into the warehouse.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.s3_server import Server

from avss_dist.core.registry import RECIPES
from avss_dist.core.settings import THRESHOLDS
from avss_dist.stats.scores import RELATIVE_THRESHOLDS
from avss_dist.warehouse.encoding import to_file
from avss_dist.warehouse.schema import SCHEMA_VERSION, SCHEMAS

FAMILIES = ("llama", "gemma3_text", "qwen3", "bert", "mistral")
SITES = ("block", "update")
UNITS, BINS = 16, 200
GRID = [(t, "absolute") for t in THRESHOLDS] + [(t, "rms") for t in RELATIVE_THRESHOLDS]


def write_warehouse(root: Path, runs: int, layers: int, seed: int = 0) -> None:
    """Write ``runs`` runs of ``layers`` layers: twenty revisions of each model, in order of time."""
    rng = np.random.default_rng(seed)
    for run in range(runs):
        model = run // 20
        family = FAMILIES[model % len(FAMILIES)]
        identity = {
            "model": f"org/{family}-{model}",
            "revision": f"step{run % 20:02d}",
            "family": family,
            "created_at": datetime(2026, 1, 1, tzinfo=UTC) + timedelta(hours=run),
        }
        run_id = f"{family}-{model}-{run:05d}"
        for name, columns in (
            ("runs", _run(run_id, identity, layers)),
            ("scores", _scores(rng, identity, layers)),
            ("layer_stats", _layer_stats(rng, identity, layers)),
        ):
            _write(root, name, run_id, columns)


def _write(root: Path, name: str, run_id: str, columns: dict[str, object]) -> None:
    schema = SCHEMAS[name].remove(0).with_metadata({"avss_schema_version": str(SCHEMA_VERSION)})
    rows = max(len(c) for c in columns.values() if isinstance(c, (list, np.ndarray, pa.Array)))

    def array(field: pa.Field) -> pa.Array:
        value = columns.get(field.name)
        if isinstance(value, (list, np.ndarray)):
            return pa.array(value, field.type)
        if isinstance(value, pa.Array):
            return value
        return pa.array([value] * rows, field.type)

    table = pa.Table.from_arrays([array(field) for field in schema], schema=schema)
    path = root / name / f"run_id={run_id}" / ("run.parquet" if name == "runs" else f"{name}.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(to_file(table))


def _run(run_id: str, identity: dict[str, object], layers: int) -> dict[str, object]:
    facts: dict[str, object] = {
        "fingerprint": run_id,
        "status": "done",
        "num_layers": layers,
        "hidden_size": 4096,
        "dtype": "bfloat16",
        "corpus": "builtin:pydoc",
        "corpus_fingerprint": "c",
        "num_tokens": 65536,
        "num_parameters": 10**9,
        "device": "NVIDIA H100",
        "partition": "single",
        "replicas": 1,
        "wall_seconds": 60.0,
        "tokens_per_second": 1100.0,
        "peak_memory_bytes": 10**10,
        "settings": "{}",
        "num_sequences": 256,
        "sequence_length": 256,
        "num_shards": 8,
        "schema_version": SCHEMA_VERSION,
    }
    facts |= {"thresholds": [list(THRESHOLDS)], "sites": [list(SITES)], "versions": [[("torch", "2.9")]]}
    return identity | facts


def _place(layers: int, repeat: int) -> dict[str, np.ndarray]:
    """Layer, name and depth of rows in the order site, anything of ``repeat``, layer."""
    layer = np.tile(np.arange(layers), len(SITES) * repeat)
    return {
        "layer": layer,
        "layer_name": np.array([f"model.layers.{i}" for i in range(layers)])[layer],
        "depth": (layer + 0.5) / layers,
        "site": np.repeat(SITES, layers * repeat),
    }


def _scores(rng: np.random.Generator, identity: dict[str, object], layers: int) -> dict[str, object]:
    groups = len(SITES) * len(RECIPES) * len(GRID)
    score = np.exp(rng.normal(0, 1, (groups, layers)) + np.linspace(-2, 2, layers))
    rank = score.argsort(1).argsort(1) + 1
    rivals = ("block_influence", "angular_distance", "relative_magnitude", "update_variance_ratio")
    numbers = ("variance", "sparsity", "nav", "nas", "avss", "avss_normalized", "avss_cumulative")
    flat = score.ravel()
    return {
        **identity,
        **_place(layers, len(RECIPES) * len(GRID)),
        "recipe": np.tile(np.repeat(RECIPES, len(GRID) * layers), len(SITES)),
        "threshold": np.tile(np.repeat([t for t, _ in GRID], layers), len(SITES) * len(RECIPES)),
        "threshold_kind": np.tile(np.repeat([k for _, k in GRID], layers), len(SITES) * len(RECIPES)),
        "count": np.full(groups * layers, 2**28),
        "near_zero_count": rng.poisson(1e5, groups * layers).astype(float),
        **{name: flat * rng.uniform(0.9, 1.1) for name in numbers},
        "avss_smoothed": flat,
        "avss_low": flat * 0.9,
        "avss_high": flat * 1.1,
        "rank": rank.ravel(),
        "lowest_set_probability": (rank.ravel() <= layers // 4) * 0.9 + 0.05,
        "quality": "ok",
        **{name: np.tile(rng.uniform(0, 1, layers), groups) for name in rivals},
    }


def _layer_stats(rng: np.random.Generator, identity: dict[str, object], layers: int) -> dict[str, object]:
    rows = len(SITES) * layers
    count = rng.poisson(1e6, (rows, BINS))

    def lists(values: np.ndarray, kind: pa.DataType) -> pa.Array:
        offsets = pa.array(np.arange(rows + 1) * values.shape[1], pa.int32())
        return pa.ListArray.from_arrays(offsets, pa.array(values.ravel(), kind))

    near = np.sort(rng.poisson(1e5, (rows, len(THRESHOLDS))))
    scale = np.exp(np.tile(np.linspace(-2, 5, layers), len(SITES)))
    return {
        **identity,
        **_place(layers, 1),
        "thresholds": lists(np.tile(THRESHOLDS, (rows, 1)), pa.float64()),
        "near_zero": lists(near, pa.int64()),
        "histogram_bin": lists(np.tile(np.arange(850, 850 + BINS), (rows, 1)), pa.int16()),
        "histogram_count": lists(count, pa.int64()),
        "count": count.sum(1),
        "mean": rng.normal(0, 0.01, rows),
        "m2": scale * count.sum(1),
        "zero_count": near[:, 0],
        "nonfinite_count": 0,
        "min": -9.0,
        "max": 9.0,
        "max_abs": 9.0,
        "sequence_count": 256,
        "unit_count": 65536,
        "pooled_variance_sum": scale * 256,
        "token_count": 65536,
        "cosine_sum": 6e4,
        "angular_sum": 1e4,
        "relative_magnitude_sum": 1e4,
        "input_count": count.sum(1),
        "input_mean": 0.0,
        "input_m2": scale * 1e8,
        "unit_sum": lists(rng.normal(0, 65536, (rows, UNITS)), pa.float64()),
        "unit_sum_sq": lists(rng.gamma(2, 65536, (rows, UNITS)), pa.float64()),
    }


COMMANDS = {
    "--version": ["--version"],
    "ls": ["ls"],
    "show": ["show"],
    "findings": ["findings"],
    "compare": ["compare"],
    "compare --by family": ["compare", "--by", "family"],
    "report": ["report", "-o", "report.html"],
    "compact": ["compact"],
}
"""Arguments of the commands by name. All but ``--version`` read the warehouse."""


@dataclass(frozen=True)
class Round:
    """Cost of one run of a command: seconds, seconds of all cores, peak MiB, bytes printed, and requests to S3."""

    seconds: float
    of_cores: float
    peak: float
    printed: int
    requests: int


def measure(warehouse: str, arguments: list[str], folder: Path, log: Path) -> Round:
    """Run a command in a process of its own, with its cache in ``folder``."""
    command = [sys.executable, "-m", "avss_dist", *arguments]
    command += [] if arguments == ["--version"] else ["-w", warehouse]
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder.resolve() / "cache")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # bytecode is stored, as when pip installs the package
    before = _requests(log)
    with open(folder / "output", "wb") as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.PIPE, cwd=folder, env=environment)
        assert process.stderr is not None
        message = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        if status:
            raise SystemExit(f"avss {' '.join(arguments)} failed:\n{message.decode()}")
    printed = (folder / "output").stat().st_size
    of_cores = usage.ru_utime + usage.ru_stime
    return Round(seconds, of_cores, usage.ru_maxrss / 1024, printed, _requests(log) - before)


def _requests(log: Path) -> int:
    """Return the number of lines that the server has logged, one for each request."""
    return log.read_bytes().count(b"HTTP/1.1") if log.exists() else 0


@contextmanager
def in_bucket(root: Path, log: Path) -> Iterator[str]:
    """Copy a warehouse into a server of S3 that logs its requests, and yield the address of the copy."""
    server = Server(log)
    try:
        os.environ |= {"AWS_ACCESS_KEY_ID": server.key, "AWS_SECRET_ACCESS_KEY": server.secret}
        files = list(root.rglob("*.parquet"))

        def put(path: Path) -> None:
            key = f"copy/{path.relative_to(root).as_posix()}"
            server.client.put_object(Bucket="lab", Key=key, Body=path.read_bytes())

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(put, files))
        yield server.uri("copy")
    finally:
        server.close()


def main(arguments: list[str] | None = None) -> None:
    from avss_dist.warehouse.query import ready_queries

    commands = COMMANDS | {f"query @{name}": ["query", f"@{name}"] for name in ready_queries()}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--s3", action="store_true")
    parser.add_argument("--only", nargs="+", choices=commands, default=[name for name in commands if name != "compact"])
    options = parser.parse_args(arguments)
    if not options.folder.exists():
        start = time.perf_counter()
        write_warehouse(options.folder, options.runs, options.layers)
        print(f"written in {time.perf_counter() - start:.0f} s")
    print(f"{'command':28} {'first':>8} {'of CPU':>8} {'seconds':>8} {'MiB':>6} {'printed':>12} {'requests':>16}")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "requests"
        with in_bucket(options.folder, log) if options.s3 else nullcontext(str(options.folder.resolve())) as warehouse:
            for name in options.only:
                rounds = [measure(warehouse, commands[name], Path(folder), log) for _ in range(options.rounds)]
                first, best = rounds[0], min(rounds[1:] or rounds, key=lambda cost: cost.of_cores)
                peak = max(cost.peak for cost in rounds)
                print(
                    f"{name:28} {first.of_cores:8.2f} {best.of_cores:8.2f} {best.seconds:8.2f} {peak:6.0f} "
                    f"{best.printed:12,} {f'{first.requests}, {best.requests}':>16}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
