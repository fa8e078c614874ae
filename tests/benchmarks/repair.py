"""What each repair costs and gives back: CPU time in forward passes over its text, and the perplexity that is kept.

    python tests/benchmarks/repair.py MODEL CORPUS [--drop 3,12,13] [--rows 48] [--repair map --repair refit ...]

Losses are those of the first 16 rows of the corpus, fits are made on the next ones, all in one process on one thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from avss_dist.corpus.shards import CorpusPlan, plan
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.checkpoints import resolve
from avss_dist.models.loading import load_tokenizer, text_config
from avss_dist.models.patching import Patch
from avss_dist.models.pinning import pin
from avss_dist.partition.single import SingleReplica
from avss_dist.pruning.plan import Plan
from avss_dist.pruning.repair.repair import Repair, fit_repair
from avss_dist.pruning.repair.streams import streams_of
from avss_dist.pruning.weights import StoredWeights
from avss_dist.removal import Drop
from avss_dist.settings import REPAIRS, Settings
from avss_dist.system.cores import use_threads
from avss_dist.tasks.base import TextLoss

HELD_OUT = 16  # rows
T = TypeVar("T")


def timed(work: Callable[[], T]) -> tuple[T, float]:
    start = time.process_time()
    return work(), time.process_time() - start


def perplexity(model: LanguageModel, text: CorpusPlan, drop: Drop = (), patch: Patch | None = None) -> float:
    with model.patched(patch or {}):
        rows = [row for shard in text.shards for row in TextLoss(shard)(model, drop)]
    return float(np.exp(sum(row.samples.sum() for row in rows) / sum(row.weights.sum() for row in rows)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("corpus")
    parser.add_argument("--drop", help="layers to drop; by default every fourth one")
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--repair", action="append", choices=REPAIRS)
    args = parser.parse_args()
    use_threads(1)
    checkpoint = resolve(args.model if not Path(args.model).exists() else str(Path(args.model).resolve()))
    config = text_config(checkpoint, trust_remote_code=False)
    settings = pin(Settings(max_sequences=args.rows), checkpoint, config, "cpu")
    tokenizer = load_tokenizer(checkpoint, trust_remote_code=False)
    held_out = plan(args.corpus, tokenizer, Settings(max_sequences=HELD_OUT))
    text = plan(args.corpus, tokenizer, settings, skip_sequences=HELD_OUT)
    replica = SingleReplica(checkpoint, settings, head=True)
    model, layers = replica.language_model, config.get_text_config().num_hidden_layers
    assert model is not None
    drop = tuple(int(layer) for layer in args.drop.split(",")) if args.drop else tuple(range(3, layers, 4))
    made = Plan(model=checkpoint.name, num_layers=layers, layers="layers", drop=drop)
    stored = StoredWeights.of(checkpoint, made, settings).read
    whole, pruned = perplexity(model, held_out), perplexity(model, held_out, drop)
    _, once = timed(lambda: perplexity(model, text))
    print(f"{checkpoint.name} without {len(drop)} of {layers} layers, fitted on {args.rows} rows")
    print(f"whole model    perplexity {whole:10.2f}")
    print(f"without them   perplexity {pruned:10.2f}, kept {whole / pruned:6.1%}")
    for by in args.repair or REPAIRS:
        repair = Repair(by=by, corpora=(args.corpus,), settings=settings)
        found, cost = timed(
            lambda repair=repair: fit_repair(checkpoint, streams_of(model), made, repair, [text], stored)
        )
        repaired = perplexity(model, held_out, drop, found.tensors)
        print(f"{by:14s} perplexity {repaired:10.2f}, kept {whole / repaired:6.1%}, {cost / once:6.1f} passes")


if __name__ == "__main__":
    main()
