"""Requests and seconds of evaluations whose warehouse in an object store holds the cells of many others.

    python tests/benchmarks/cells.py [--cells 5000] [--per-evaluation 100]

The store is moto's S3 server on the loopback, a process of its own. A random Llama of 8 layers is evaluated once, and
once more with nothing left to measure; then it is shrunk as far as it keeps 90 % of its perplexity, one attempt after
another. Seconds include the start of the model; requests are those in the server's log.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)  # beside this file is a coverage.py, which numba would import

from support.checkpoints import llama, one_thread, save_tokenizer
from support.s3_server import Server

import avss_dist
from avss_dist.warehouse.schema import RunIdentity
from avss_dist.warehouse.store import Store

TEXT = "builtin:pydoc"
READ: dict[str, Any] = {
    "max_sequences": 80,
    "sequence_length": 32,
    "batch_size": 4,
    "sequences_per_shard": 4,
    "dtype": "float32",
    "device": "cpu",
    "partition": "single",
    "executor": "local",
}
CELL = {"task": "perplexity:other.txt", "metric": "loss", "drop": [], "part": 0, "samples": [1.0], "weights": [31.0]}


def fill(server: Server, folder: str, cells: int, per_evaluation: int) -> None:
    """Write the cells of other evaluations: equal files under different names."""
    with tempfile.TemporaryDirectory() as local:
        run = RunIdentity(run_id="other-0000000000", model="other", revision=None, family="llama")
        Store(local).write_cell(run, f"{0:020x}", [CELL])
        (file,) = Path(local, "cells").rglob("*.parquet")
        data = file.read_bytes()
    names = [
        f"{folder}/cells/run_id=other-{number // per_evaluation:010x}/{number:020x}.parquet" for number in range(cells)
    ]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: server.client.put_object(Bucket="lab", Key=name, Body=data), names))


@contextmanager
def credentials(server: Server) -> Iterator[None]:
    """Give this process the server's keys, and none of the user's."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ |= {"AWS_ACCESS_KEY_ID": server.key, "AWS_SECRET_ACCESS_KEY": server.secret}
    os.environ |= {"AWS_EC2_METADATA_DISABLED": "true"}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def requests_of(work: Callable[[], object], log: Path) -> Counter[str]:
    """Return how many requests of each kind (LIST, GET, HEAD, PUT, DELETE, POST) reach the server during the work."""
    begin = log.stat().st_size
    work()
    with log.open("rb") as file:
        file.seek(begin)
        lines = re.findall(r'"([A-Z]+) (\S+) HTTP', file.read().decode())
    return Counter("LIST" if "list-type=" in path else method for method, path in lines)


def steps(model: Path, uri: str, folder: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the measured calls, each with its name."""
    task = f"perplexity:{TEXT}"
    yield "evaluate", lambda: avss_dist.evaluate([str(model)], tasks=[task], warehouse=uri, **READ)
    yield "evaluate again", lambda: avss_dist.evaluate([str(model)], tasks=[task], warehouse=uri, **READ)
    shrink: dict[str, Any] = {"corpus": TEXT, "output": folder / "small", "warehouse": uri}
    shrink |= {"by": "avss", "keep": 0.9, "repair": "scale"}
    yield "shrink --keep 90%", lambda: avss_dist.shrink(model, **shrink, **READ)


def measure(cells: int, per_evaluation: int, *, shrinking: bool = True) -> dict[str, tuple[Counter[str], float]]:
    """Return the requests and seconds of each step in a warehouse that holds the cells of others."""
    results: dict[str, tuple[Counter[str], float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        llama(num_hidden_layers=8).save_pretrained(folder / "model")
        save_tokenizer(folder / "model")
        server = Server(log=folder / "requests.log")
        try:
            with credentials(server), one_thread():
                fill(server, "warehouse", cells, per_evaluation)
                for step, work in steps(folder / "model", server.uri("warehouse"), folder):
                    if shrinking or not step.startswith("shrink"):
                        start = time.perf_counter()
                        requests = requests_of(work, folder / "requests.log")
                        results[step] = requests, time.perf_counter() - start
        finally:
            server.close()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=5000)
    parser.add_argument("--per-evaluation", type=int, default=100)
    options = parser.parse_args()
    print(f"{'step':20} {'seconds':>8} {'requests':>9}  of them")
    for step, (requests, seconds) in measure(options.cells, options.per_evaluation).items():
        kinds = ", ".join(f"{number} {kind}" for kind, number in requests.most_common())
        print(f"{step:20} {seconds:8.1f} {requests.total():9}  {kinds}", flush=True)


if __name__ == "__main__":
    main()
