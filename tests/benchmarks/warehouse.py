"""Time and memory of the commands that read a warehouse, and of every ready query, on many synthetic runs.

    python tests/benchmarks/warehouse.py FOLDER [--runs 2000] [--layers 80] [--rounds 3] [--only compare ...]

The warehouse is written where FOLDER has none (about a minute): two sites, every recipe and threshold of a real run,
16 units, 200 bins. Every command runs in a process of its own, from start to end. Printed are the shortest of several
rounds and, with it, the seconds of all cores and the peak memory. ``avss --version`` is the start of the interpreter.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from avss_dist.core.registry import RECIPES
from avss_dist.core.settings import THRESHOLDS
from avss_dist.stats.scores import RELATIVE_THRESHOLDS
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
    pq.write_table(table, path, compression="zstd", row_group_size=1_000_000, write_page_checksum=True)


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
}
"""Arguments of the commands by name. All but ``--version`` read the warehouse."""


def measure(root: Path, arguments: list[str], folder: Path) -> tuple[float, float, float, int]:
    """Run a command in a process of its own; return seconds, seconds of all cores, peak MiB, and bytes printed."""
    warehouse = [] if arguments == ["--version"] else ["-w", str(root.resolve())]
    command = [sys.executable, "-m", "avss_dist", *arguments, *warehouse]
    with open(folder / "output", "wb") as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.PIPE, cwd=folder)
        assert process.stderr is not None
        message = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        if status:
            raise SystemExit(f"avss {' '.join(arguments)} failed:\n{message.decode()}")
    printed = (folder / "output").stat().st_size
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, printed


def main(arguments: list[str] | None = None) -> None:
    from avss_dist.warehouse.query import ready_queries

    commands = COMMANDS | {f"query @{name}": ["query", f"@{name}"] for name in ready_queries()}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=commands, default=list(commands))
    options = parser.parse_args(arguments)
    if not options.folder.exists():
        start = time.perf_counter()
        write_warehouse(options.folder, options.runs, options.layers)
        print(f"written in {time.perf_counter() - start:.0f} s")
    print(f"{'command':28} {'seconds':>8} {'of CPU':>8} {'peak MiB':>9} {'printed':>12}")
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only:
            rounds = [measure(options.folder, commands[name], Path(folder)) for _ in range(options.rounds)]
            seconds, cores, peak, printed = min(rounds)
            print(f"{name:28} {seconds:8.2f} {cores:8.2f} {peak:9.0f} {printed:12,}", flush=True)


if __name__ == "__main__":
    main()
