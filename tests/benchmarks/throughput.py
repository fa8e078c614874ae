"""Tokens/s of observation against the bare model and the AVSS authors' recipe, in one process, as ratios.

    python tests/benchmarks/throughput.py MODEL_FOLDER [--rounds 5] [--sequences 32]

A round is a shard of 32 x 256 tokens in batches of 8 x 256, every variant in turn (the authors' recipe: one
batch, in two of the rounds). Ratios are medians of the rounds' own: a machine whose speed drifts does not decide.
The authors' recipe (arXiv 2411.02117, their released script): float32, hooks that copy every layer's output to the CPU,
loss and backward pass for each batch, then the L1 and L2 norms of the gradients and the Frobenius norms of the weights.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

import torch
from support.benchmarking import timed
from transformers import AutoModelForCausalLM

from avss_dist.core.settings import Settings
from avss_dist.core.sites import SITES
from avss_dist.corpus.shards import Shard, tokenize_corpus
from avss_dist.measure.shard import analyze_shard
from avss_dist.models.checkpoint.loading import load_tokenizer
from avss_dist.models.checkpoint.locate import Checkpoint, resolve
from avss_dist.partition.replica import Replica, no_observation

BARE = "bare backbone forward"
PLAIN = "plain CausalLM forward"
AUTHORS = "AVSS authors' recipe"


def authors_recipe(model: torch.nn.Module, layers: list[torch.nn.Module], input_ids: torch.Tensor) -> None:
    """What the released script measures of each layer, one batch: variance, sparsity, norms of gradients, weights."""
    seen: list[torch.Tensor] = []

    def copy_output(_layer: torch.nn.Module, _args: object, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        seen.append(hidden.detach().cpu())

    handles = [layer.register_forward_hook(copy_output) for layer in layers]
    loss = model(input_ids, labels=input_ids).loss
    loss.backward()
    for hidden, layer in zip(seen, layers, strict=True):
        hidden.mean(dim=1).var(dim=1).mean().item()
        (hidden.abs() < 1e-5).float().mean().item()
        for weight in layer.parameters():
            if weight.ndim != 2 or weight.grad is None:
                continue
            weight.grad.abs().sum().item()
            weight.grad.pow(2).sum().sqrt().item()
            torch.norm(weight, p="fro").item()
    model.zero_grad()
    for handle in handles:
        handle.remove()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a causal language model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sequences", type=int, default=32, help="rows of the shard")
    parser.add_argument("--corpus", default="builtin:pydoc")
    parser.add_argument("--peak", choices=("bare", "observed"), help="only print the peak memory of this")
    options = parser.parse_args()
    if options.peak:
        print_peak_memory(options.model, options.corpus, options.sequences, options.peak)
        return

    settings = Settings(max_sequences=options.sequences, dtype="bfloat16")
    checkpoint = resolve(options.model)
    shard = first_shard(options.corpus, checkpoint, settings)
    batches = list(shard.batches(settings.batch_size))
    replica = Replica(checkpoint, settings)
    inputs = [torch.from_numpy(batch.input_ids).to(torch.int64) for batch in batches]
    causal = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.bfloat16).eval()
    exact = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
    backbone = exact.get_submodule(exact.base_model_prefix)
    exact_layers = [backbone.get_submodule(layer.name) for layer in replica.layers]

    def bare() -> None:
        replica.forward(batches, no_observation)

    def plain() -> None:
        with torch.no_grad():
            for input_ids in inputs:
                causal(input_ids, use_cache=False)

    def ours(*sites: str) -> Callable[[], None]:
        def run() -> None:
            observed = replace(settings, sites=sites)
            analyze_shard(replica, shard, observed)

        return run

    variants: dict[str, Callable[[], None]] = {
        BARE: bare,
        PLAIN: plain,
        "ours, five sites": ours(*SITES),
        "ours, block only": ours("block"),
        AUTHORS: lambda: authors_recipe(exact, exact_layers, inputs[0]),
    }
    for run in variants.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(options.rounds):
        for name, run in variants.items():
            if name == AUTHORS and round_ >= 2:
                continue  # it takes longer than all the others together
            _, duration = timed(run)
            measured_batches = 1 if name == AUTHORS else len(batches)
            seconds[name].append(duration / measured_batches)

    tokens = inputs[0].numel()
    shape = f"{len(batches)} x {tuple(inputs[0].shape)}"
    print(f"{Path(options.model).name}, bfloat16, {shape}, {torch.get_num_threads()} threads")
    print(f"{'':<26}{'tokens/s':>10}{'of bare':>10}{'of plain':>10}{'of authors':>12}")
    for name, times in seconds.items():
        speed = tokens / statistics.median(times)
        of_bare = median_ratio(seconds[BARE], times)
        of_plain = median_ratio(seconds[PLAIN], times)
        of_authors = median_ratio(seconds[AUTHORS], times)
        print(f"{name:<26}{speed:>10,.0f}{of_bare:>10.3f}{of_plain:>10.3f}{of_authors:>12.1f}")
    alone = peak_memory(options.model, options.corpus, options.sequences, "bare")
    observed = peak_memory(options.model, options.corpus, options.sequences, "observed")
    print(f"peak memory beyond the bare forward's, each in a process of its own: {(observed - alone) / 1e6:.0f} MB")


def median_ratio(seconds: list[float], others: list[float]) -> float:
    """Return the median over rounds of the ratio of two times. The variant with fewer rounds decides their number."""
    ratios = []
    for ours, theirs in zip(seconds, others, strict=False):
        ratios.append(ours / theirs)
    return statistics.median(ratios)


def first_shard(corpus: str, checkpoint: Checkpoint, settings: Settings) -> Shard:
    """Return the first shard of a corpus in the tokens of a checkpoint."""
    tokenizer = load_tokenizer(checkpoint)
    return tokenize_corpus(corpus, tokenizer, settings).shards[0]


def peak_memory(model: str, corpus: str, sequences: int, what: str) -> int:
    """Highest resident memory, in bytes, while a fresh process measures a shard, or only runs it."""
    command = [sys.executable, __file__, model, "--corpus", corpus, "--sequences", str(sequences), "--peak", what]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def print_peak_memory(model: str, corpus: str, sequences: int, what: str) -> None:
    settings = Settings(max_sequences=sequences, dtype="bfloat16")
    checkpoint = resolve(model)
    shard = first_shard(corpus, checkpoint, settings)
    replica = Replica(checkpoint, settings)
    if what == "observed":
        analyze_shard(replica, shard, settings)
    else:
        replica.forward(list(shard.batches(settings.batch_size)), no_observation)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)


if __name__ == "__main__":
    main()
