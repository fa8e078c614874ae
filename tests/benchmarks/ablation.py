"""Seconds of leave-one-out with reused hidden states against one full forward for each layer, in one process.

    python tests/benchmarks/ablation.py MODEL_FOLDER [--sequences 8] [--rounds 2]

The text is the same, in batches of 8 x 256 in the checkpoint's own dtype; a full forward is that of the whole model,
its head and its losses. The first round of leave-one-out also finds out whether the family can be resumed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

import torch
from support.benchmarking import timed
from support.causal_lm import open_whole

from avss_dist.core.settings import Settings
from avss_dist.corpus.shards import tokenize_corpus
from avss_dist.models.checkpoints import resolve
from avss_dist.models.loading import forward_function, load_tokenizer, without_head
from avss_dist.models.skipping import recording
from avss_dist.tasks.layer_removal import LeaveOneOut


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a causal language model")
    parser.add_argument("--corpus", default="builtin:pydoc")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()

    settings = Settings(max_sequences=options.sequences, sequences_per_shard=options.sequences)
    checkpoint = resolve(options.model)
    (shard,) = tokenize_corpus(options.corpus, load_tokenizer(checkpoint), settings).shards
    batches = list(shard.batches(settings.batch_size))
    model = open_whole(checkpoint, settings)
    layers = len(model.layers)
    measure = LeaveOneOut(shard)

    def full() -> None:
        for batch in batches:
            model.losses(batch)

    full()
    print(f"{Path(options.model).name}: {layers} layers, {shard.input_ids.shape}, {torch.get_num_threads()} threads")
    for _ in range(options.rounds):
        _, plain = timed(lambda: [full() for _ in range(layers)])
        _, ours = timed(lambda: measure(model))
        print(f"{layers} full forwards {plain:.1f} s; leave one out {ours:.1f} s; ratio {ours / plain:.3f}")

    backbone = forward_function(without_head(model.module))
    ids = [torch.from_numpy(batch.input_ids).long().to(model.device) for batch in batches]

    def without_head_() -> None:
        with torch.no_grad():
            for one in ids:
                backbone(one, None)

    def recorded() -> None:
        with recording(model.layers):
            full()

    times: dict[str, list[float]] = {"full": [], "recorded": [], "below the head": []}
    for _ in range(3):
        for name, run in zip(times, (full, recorded, without_head_), strict=True):
            times[name].append(timed(run)[1])
    least = {name: min(found) for name, found in times.items()}
    share = least["below the head"] / least["full"]
    print(f"the layers' share of a full forward {share:.2f}: no ratio below {1 - share / 2:.2f} is possible")
    print(f"recording makes a full forward {least['recorded'] / least['full']:.3f} times as long")


if __name__ == "__main__":
    main()
