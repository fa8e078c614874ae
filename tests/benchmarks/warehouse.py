"""Time, memory and requests of the commands that read a warehouse, and of every ready query, on many synthetic runs.

    python tests/benchmarks/warehouse.py FOLDER [--runs 2000] [--layers 80] [--rounds 3] [--s3] [--only compare ...]

The warehouse is written where FOLDER has none (about a minute): two sites, every recipe and threshold of a real run,
16 units. Every command runs in a process of its own, from start to end. They share a cache that is empty at
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
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.pages import write_run
from support.s3_server import Server

from avss_dist.stats.catalog import BASELINES
from avss_dist.warehouse.encoding import to_file
from avss_dist.warehouse.reader import Warehouse

FAMILIES = ("llama", "gemma3_text", "qwen3", "bert", "mistral")
SCALED = ("variance", "sparsity", "avss_smoothed", "avss_low", "avss_high", *BASELINES)


def write_warehouse(root: Path, runs: int, layers: int, seed: int = 0) -> None:
    """Write ``runs`` runs of ``layers`` layers: twenty revisions of each model, in order of time.

    One run is measured. The others are copies of its files with scores of their own by layer.
    """
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        write_run(Warehouse(folder), "measured", layers, sites=("block", "update"))
        files = sorted(Path(folder).rglob("*.parquet"))
        tables = {file: pq.ParquetFile(file).read() for file in files}
    start = datetime(2026, 1, 1, tzinfo=UTC)
    for run in range(runs):
        model = run // 20
        family = FAMILIES[model % len(FAMILIES)]
        values = {
            "model": f"org/{family}-{model}",
            "revision": f"step{run % 20:02d}",
            "family": family,
            "created_at": start + timedelta(hours=run),
        }
        factors = np.exp(rng.normal(0, 1, layers))
        for file, table in tables.items():
            columns = {name: pa.array([value] * len(table)) for name, value in values.items()}
            if "avss_smoothed" in table.column_names:
                scale = factors[table["layer"].to_numpy()]
                columns |= {name: pa.array(table[name].to_numpy() * scale) for name in SCALED}
            for at, field in enumerate(table.schema):
                if field.name in columns:
                    table = table.set_column(at, field, columns[field.name].cast(field.type))
            partition = f"run_id={family}-{model}-{run:05d}"
            path = root / file.parent.parent.name / partition / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(to_file(table))


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
    cache = folder.resolve() / "cache"
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # bytecode is stored, as when pip installs the package
    before = _requests(log)
    printed_file = folder / "output"
    with open(printed_file, "wb") as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.PIPE, cwd=folder, env=environment)
        assert process.stderr is not None
        message = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        if status:
            raise SystemExit(f"avss {' '.join(arguments)} failed:\n{message.decode()}")
    printed = printed_file.stat().st_size
    return Round(
        seconds=seconds,
        of_cores=usage.ru_utime + usage.ru_stime,
        peak=usage.ru_maxrss / 1024,
        printed=printed,
        requests=_requests(log) - before,
    )


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
            place = path.relative_to(root).as_posix()
            key = f"copy/{place}"
            server.client.put_object(Bucket="lab", Key=key, Body=path.read_bytes())

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(put, files))
        yield server.uri("copy")
    finally:
        server.close()


def main(arguments: list[str] | None = None) -> None:
    from avss_dist.warehouse.query import ready_queries

    commands = dict(COMMANDS)
    for name in ready_queries():
        commands[f"query @{name}"] = ["query", f"@{name}"]
    usual = [name for name in commands if name != "compact"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--s3", action="store_true")
    parser.add_argument("--only", nargs="+", choices=commands, default=usual)
    options = parser.parse_args(arguments)
    if not options.folder.exists():
        start = time.perf_counter()
        write_warehouse(options.folder, options.runs, options.layers)
        seconds = time.perf_counter() - start
        print(f"written in {seconds:.0f} s")
    print(f"{'command':28} {'first':>8} {'of CPU':>8} {'seconds':>8} {'MiB':>6} {'printed':>12} {'requests':>16}")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "requests"
        opened: AbstractContextManager[str] = nullcontext(str(options.folder.resolve()))
        if options.s3:
            opened = in_bucket(options.folder, log)
        with opened as warehouse:
            for name in options.only:
                rounds = [measure(warehouse, commands[name], Path(folder), log) for _ in range(options.rounds)]
                print_costs(name, rounds)


def print_costs(name: str, rounds: list[Round]) -> None:
    """Print the row of a command: its first round, and the best one of the later ones."""
    first = rounds[0]
    best = min(rounds[1:] or rounds, key=lambda cost: cost.of_cores)
    peak = max(cost.peak for cost in rounds)
    requests = f"{first.requests}, {best.requests}"
    print(f"{name:28} {first.of_cores:8.2f} {best.of_cores:8.2f} {best.seconds:8.2f}", end=" ")
    print(f"{peak:6.0f} {best.printed:12,} {requests:>16}", flush=True)


if __name__ == "__main__":
    main()
