"""Perplexity as this project computes it against plain transformers with the tokenizer's defaults, ``tokenizer(text)``.

    python tests/benchmarks/perplexity.py MODEL ... --corpus TEXT [--rows 8] [--length 256] [--dtype float32]

Each packed row is decoded, tokenized anew by ``tokenizer(text)``, and given to ``AutoModelForCausalLM``, with nothing
of this project in between. Rows whose text has other tokens when it stands alone (a row may begin inside of a word) are
counted and left out of both. The last column is the perplexity of the same rows without their special tokens.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

import numpy as np
import torch

from avss_dist.core.settings import Settings
from avss_dist.corpus.tokens import special_tokens_of_rows
from avss_dist.evaluation.session import pinned
from avss_dist.evaluation.tasks import plan_text
from avss_dist.models.checkpoints import Checkpoint, resolve
from avss_dist.models.loading import load_tokenizer
from avss_dist.partition.single import SingleReplica
from avss_dist.tasks.base import TextLoss


@dataclass(frozen=True)
class Comparison:
    """Perplexities of the rows of a text that have the same tokens in both: ours, transformers', and without BOS."""

    rows: int
    compared: int
    ours: float
    transformers: float
    bare: float


def compare(checkpoint: Checkpoint, corpus: str, settings: Settings) -> Comparison:
    """Compute both perplexities of a text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = pinned(settings, checkpoint, "cpu")
    text = plan_text(checkpoint, corpus, settings)
    language_model = SingleReplica(checkpoint, settings, head=True).language_model
    assert language_model is not None
    results = [TextLoss(shard)(language_model)[0] for shard in text.shards]
    ours = np.concatenate([result.samples / result.weights for result in results])
    del language_model
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=getattr(torch, settings.dtype)).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    around = special_tokens_of_rows(load_tokenizer(checkpoint), settings)
    first, last = len(around.prefix), settings.sequence_length - len(around.suffix)
    rows = [row for shard in text.shards for row in shard.input_ids.tolist()]
    losses, compared = [], []
    for number, row in enumerate(rows):
        again = tokenizer(tokenizer.decode(row[first:last]))["input_ids"]
        if again == row:
            compared.append(number)
            losses.append([_loss(model, again), _loss(model, row[first:last])])
    if not compared:
        sys.exit("No row has the same tokens when its text stands alone: raise --rows.")
    means = np.exp(np.mean(losses, axis=0))
    return Comparison(len(rows), len(compared), float(np.exp(ours[compared].mean())), float(means[0]), float(means[1]))


def _loss(model: torch.nn.Module, ids: list[int]) -> float:
    with torch.inference_mode():
        tokens = torch.tensor([ids])
        return float(model(input_ids=tokens, labels=tokens, use_cache=False).loss)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    settings = Settings(max_sequences=options.rows, sequence_length=options.length, dtype=options.dtype)
    print("model, rows compared, ours, transformers, without special tokens")
    for model in options.models:
        checkpoint = resolve(model)
        result = compare(checkpoint, options.corpus, settings)
        figures = f"{result.ours:.3f}, {result.transformers:.3f}, {result.bare:.3f}"
        print(f"{checkpoint.name}, {result.compared} of {result.rows}, {figures}", flush=True)


if __name__ == "__main__":
    main()
