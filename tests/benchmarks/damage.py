"""Cost and accuracy of `avss ablate --damage`: forwards, and its correlation with the loss without each layer.

    python tests/benchmarks/damage.py MODEL CORPUS [--sequences 8] [--draws 2]

The damage is estimated on the first rows of the corpus, and the loss measured on the next ones. Cost is CPU time over
that of the loss of the same rows, in one process.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

import numpy as np
from support.benchmarking import cpu_timed, open_checkpoint
from support.causal_lm import open_whole

from avss_dist.analysis.ground_truth import mean_ranks
from avss_dist.analysis.scorecard import misranked, reliability
from avss_dist.core.settings import Settings
from avss_dist.corpus.shards import tokenize_corpus
from avss_dist.models.checkpoint.loading import load_tokenizer
from avss_dist.stats.catalog import metrics_of
from avss_dist.stats.rankings import spearman
from avss_dist.tasks.damage import Damage
from avss_dist.tasks.text_loss import LeaveOneOut, TextLoss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("corpus")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--draws", type=int, default=2)
    args = parser.parse_args()
    rows = args.sequences
    wanted = Settings(max_sequences=2 * rows, sequences_per_shard=rows, batch_size=min(8, rows))
    checkpoint, settings = open_checkpoint(args.model, wanted)
    text, other = tokenize_corpus(args.corpus, load_tokenizer(checkpoint), settings).shards
    model = open_whole(checkpoint, settings)
    loss = TextLoss(text)
    _, once = cpu_timed(lambda: loss(model))
    measure = Damage(shard=text, draws=args.draws)
    damages, cost = cpu_timed(lambda: measure(model))
    print(f"with gradients and {args.draws} draws: {cost / once:.1f} forwards")
    whole, *without = LeaveOneOut(other)(model)
    samples = np.stack([row.samples - whole.samples for row in without], axis=1)
    truth = samples.sum(axis=0) / whole.weights.sum()
    ceiling = reliability(samples)
    print(f"ceiling, by split halves of {rows} sequences: {ceiling:.3f}")
    scores = {row.metric: {} for row in damages}
    measured = []
    for row in damages:
        if row.removed is None:
            value = row.samples.sum() / row.weights.sum()
            scores[row.metric][row.layer] = value
            measured.append((row.metric, row.layer, value))
    scores["damage"] = mean_ranks("damage", measured)
    for name, values in sorted(scores.items()):
        if not values:
            continue
        score = np.array([values[layer] for layer in sorted(values)])
        rho = spearman(score, truth)
        wrong = misranked(score, truth)
        print(f"{name:22s} Spearman {rho:6.3f} = {rho / ceiling:6.1%} of the ceiling, misranked {wrong:.1%}")
    (metric,) = metrics_of("predicted")
    predicted = np.array([scores[metric][layer] for layer in range(len(truth))])
    ratio = predicted / truth
    near = np.mean((ratio > 0.5) & (ratio < 2))
    print(f"predicted nats within a factor of two of the truth: {near:.0%} of {len(truth)} layers")


if __name__ == "__main__":
    main()
