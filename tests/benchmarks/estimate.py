"""What was estimated against what is measured: peak memory and seconds of each partition, as ratios.

    python tests/benchmarks/estimate.py MODEL_FOLDER [--max-sequences 64] [--max-memory 150MB] [--rounds 3]

Every measurement is a fresh process that plans the corpus, opens the model and measures all shards. Estimates and
measurements take turns, for a machine that others use is not the same for long: each ratio is of neighbours, and the
median of the rounds is shown. gangs run as two ranks, on a Ray of their own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile

from avss_dist.core.registry import GANGS, PARTITIONS
from avss_dist.core.settings import Settings
from avss_dist.core.text import describe_bytes, parse_bytes
from avss_dist.corpus.shards import tokenize_corpus
from avss_dist.estimation.estimate import estimate
from avss_dist.measure.shard import analyze_shard
from avss_dist.models.checkpoints import resolve
from avss_dist.models.loading import load_tokenizer
from avss_dist.partition.base import Placement
from avss_dist.partition.open import open_replica
from avss_dist.requests import EstimateRequest
from avss_dist.runs.api import score
from avss_dist.warehouse.reader import Warehouse

RANKS = 2


def measure(model: str, corpus: str, settings: Settings, placement: Placement) -> tuple[float, int]:
    """Seconds in which this process measures all shards, and its peak memory in bytes (on a GPU, the device's)."""
    checkpoint = resolve(model)
    shards = tokenize_corpus(corpus, load_tokenizer(checkpoint), settings).shards
    replica = open_replica(checkpoint, settings, placement)
    results = [analyze_shard(replica, shard, settings) for shard in shards]
    return sum(result.seconds for result in results), max(result.peak_memory_bytes for result in results)


def measure_gang(model: str, corpus: str, settings: Settings, partition: str) -> tuple[float, int]:
    """As `measure`, with the ranks of a gang: seconds in which they measure all shards, peak of the largest."""
    with tempfile.TemporaryDirectory() as out:
        run = score(model, corpus=corpus, warehouse=out, partition=partition, ranks=RANKS, **settings.as_dict())
        shards = tokenize_corpus(corpus, load_tokenizer(resolve(model)), settings).shards
        results = Warehouse(out).read_shards(run.run_id, {shard.shard_id: shard.content_hash for shard in shards})
    at_once = RANKS if PARTITIONS[partition].splits_data else 1
    return sum(result.seconds for result in results) / at_once, max(result.peak_memory_bytes for result in results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model")
    parser.add_argument("--corpus", default="builtin:pydoc")
    parser.add_argument("--max-sequences", type=int, default=64)
    parser.add_argument("--max-memory", help="weights that device_map keeps in memory")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--partition", action="append", choices=PARTITIONS, help="of these only; repeatable")
    parser.add_argument("--measure", choices=PARTITIONS, help="only measure this, in this process")
    options = parser.parse_args()
    options.partition = options.partition or PARTITIONS
    settings = Settings(max_sequences=options.max_sequences)
    limits = {"cpu": parse_bytes(options.max_memory)} if options.max_memory else {}
    if options.measure:
        if options.measure in GANGS:
            print(json.dumps(measure_gang(options.model, options.corpus, settings, options.measure)))
            return
        placement = Placement(
            partition=options.measure, max_memory=limits if PARTITIONS[options.measure].several_gpus else {}
        )
        print(json.dumps(measure(options.model, options.corpus, settings, placement)))
        return
    ratios: dict[str, list[tuple[float, float]]] = {partition: [] for partition in options.partition}
    for _ in range(options.rounds):
        rows = {"max_sequences": options.max_sequences}
        guess = estimate(EstimateRequest(options.model, corpus=options.corpus, max_memory=limits, **rows))
        for row in guess.rows:
            if row.partition not in options.partition:
                continue
            command = [sys.executable, __file__, *sys.argv[1:], "--measure", row.partition]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"{row.partition:<12} cannot be measured: {done.stderr.strip().splitlines()[-1]}", flush=True)
                continue
            seconds, peak = json.loads(done.stdout.splitlines()[-1])
            ratios[row.partition].append((row.device_bytes / peak, row.seconds / seconds))
            print(
                f"{row.partition:<12} memory {describe_bytes(row.device_bytes):>8} of {describe_bytes(peak):>8}   "
                f"seconds {row.seconds:7.2f} of {seconds:7.2f}",
                flush=True,
            )
    print("estimated / measured, median of the rounds:")
    for partition, pairs in ratios.items():
        if not pairs:
            continue
        memory, seconds = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"{partition:<12} memory {memory:.2f}   seconds {seconds:.2f}")


if __name__ == "__main__":
    main()
