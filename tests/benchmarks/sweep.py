"""What a run costs beside loading and computing, in a sweep of tiny checkpoints over Ray.

    python tests/benchmarks/sweep.py [--models 20] [--replicas 1]

Prints, for the runs after the first: the time from one run's end to the next one's, what of it is opening the model and
measuring its shards (timed in the workers' way, in one process of one thread), and the rest.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))

SETTINGS: dict[str, Any] = {"max_sequences": 32, "sequence_length": 64, "batch_size": 4, "sequences_per_shard": 8}


def save_models(count: int, folder: Path) -> list[str]:
    """Checkpoints of one training, as the tests build them."""
    from support.checkpoints import llama, save_tokenizer

    for seed in range(count):
        llama(seed).save_pretrained(folder / f"step-{seed:02d}")
        save_tokenizer(folder / f"step-{seed:02d}")
    return sorted(str(path) for path in folder.iterdir())


def open_seconds(models: list[str]) -> float:
    """To open a model, on average, after the first."""
    import torch

    from avss_dist.core.settings import Settings
    from avss_dist.models.checkpoints import resolve
    from avss_dist.partition.base import Placement
    from avss_dist.partition.open import open_replica

    torch.set_num_threads(1)
    seconds = []
    for model in models:
        checkpoint, start = resolve(model), time.perf_counter()
        open_replica(checkpoint, Settings(device="cpu", dtype="float32"), Placement()).close()
        seconds.append(time.perf_counter() - start)
    return mean(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", type=int, default=20)
    parser.add_argument("--replicas", type=int, default=1)
    arguments = parser.parse_args()

    from avss_dist.runs.api import score_all
    from avss_dist.warehouse.reader import Warehouse

    with tempfile.TemporaryDirectory() as folder:
        models = save_models(arguments.models, Path(folder) / "models")
        out = Path(folder) / "warehouse"
        start = time.perf_counter()
        options = {**SETTINGS, "executor": "ray", "replicas": arguments.replicas}
        score_all(models, corpus="builtin:pydoc", warehouse=out, **options)
        whole = time.perf_counter() - start
        rows = Warehouse(out).runs().to_pylist()
        ends = sorted(row["created_at"].timestamp() for row in rows)
        one = (ends[-1] - ends[0]) / (len(ends) - 1)
        shards = [shard.seconds for row in rows for shard in Warehouse(out).read_partials(row)]
        compute = sum(shards) / len(rows)
        opening = open_seconds(models)
    print(
        f"{len(rows)} runs with {arguments.replicas} replicas in {whole:.1f} s; after the first, one each {one:.2f} s"
    )
    print(f"opening {opening:.2f} s, measuring {compute:.2f} s ({len(shards) // len(rows)} shards)")
    print(f"overhead: {one - opening - compute / arguments.replicas:.2f} s a run")


if __name__ == "__main__":
    main()
