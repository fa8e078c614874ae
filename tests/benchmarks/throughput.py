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

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

import torch
from support.benchmarking import timed
from transformers import AutoModelForCausalLM

from avss_dist.core.settings import Settings
from avss_dist.core.sites import SITES
from avss_dist.corpus.shards import tokenize_corpus
from avss_dist.measure.shard import analyze_shard
from avss_dist.models.checkpoint.loading import load_tokenizer
from avss_dist.models.checkpoint.locate import resolve
from avss_dist.partition.replica import Replica, no_observation

BARE, PLAIN, AUTHORS = "bare backbone forward", "plain CausalLM forward", "AVSS authors' recipe"


def authors_recipe(model: torch.nn.Module, layers: list[torch.nn.Module], input_ids: torch.Tensor) -> None:
    """What the released script measures of each layer, one batch: variance, sparsity, norms of gradients, weights."""
    seen: list[torch.Tensor] = []
    handles = [
        layer.register_forward_hook(
            lambda m, a, out: seen.append((out[0] if isinstance(out, tuple) else out).detach().cpu())
        )
        for layer in layers
    ]
    loss = model(input_ids, labels=input_ids).loss
    loss.backward()
    for hidden, layer in zip(seen, layers, strict=True):
        hidden.mean(dim=1).var(dim=1).mean().item()
        (hidden.abs() < 1e-5).float().mean().item()
        for weight in (p for p in layer.parameters() if p.ndim == 2 and p.grad is not None):
            assert weight.grad is not None
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
    shard = tokenize_corpus(options.corpus, load_tokenizer(checkpoint), settings).shards[0]
    batches = list(shard.batches(settings.batch_size))
    replica = Replica(checkpoint, settings)
    inputs = [torch.from_numpy(batch.input_ids).to(torch.int64) for batch in batches]
    causal = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.bfloat16).eval()
    exact = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
    exact_layers = [exact.get_submodule(f"{exact.base_model_prefix}.{layer.name}") for layer in replica.layers]

    def bare() -> None:
        replica.forward(batches, no_observation)

    def plain() -> None:
        with torch.no_grad():
            for input_ids in inputs:
                causal(input_ids, use_cache=False)

    def ours(*sites: str) -> Callable[[], None]:
        def run() -> None:
            analyze_shard(replica, shard, replace(settings, sites=sites))

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
            seconds[name].append(timed(run)[1] / (1 if name == AUTHORS else len(batches)))

    tokens = inputs[0].numel()
    shape = f"{len(batches)} x {tuple(inputs[0].shape)}"
    print(f"{Path(options.model).name}, bfloat16, {shape}, {torch.get_num_threads()} threads")
    print(f"{'':<26}{'tokens/s':>10}{'of bare':>10}{'of plain':>10}{'of authors':>12}")
    for name, times in seconds.items():
        ratios = [
            statistics.median(b / a for a, b in zip(times, seconds[o], strict=False)) for o in (BARE, PLAIN, AUTHORS)
        ]
        print("{:<26}{:>10,.0f}{:>10.3f}{:>10.3f}{:>12.1f}".format(name, tokens / statistics.median(times), *ratios))
    alone, observed = (
        peak_memory(options.model, options.corpus, options.sequences, what) for what in ("bare", "observed")
    )
    print(f"peak memory beyond the bare forward's, each in a process of its own: {(observed - alone) / 1e6:.0f} MB")


def peak_memory(model: str, corpus: str, sequences: int, what: str) -> int:
    """Highest resident memory, in bytes, while a fresh process measures a shard, or only runs it."""
    command = [sys.executable, __file__, model, "--corpus", corpus, "--sequences", str(sequences), "--peak", what]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def print_peak_memory(model: str, corpus: str, sequences: int, what: str) -> None:
    settings = Settings(max_sequences=sequences, dtype="bfloat16")
    checkpoint = resolve(model)
    shard = tokenize_corpus(corpus, load_tokenizer(checkpoint), settings).shards[0]
    replica = Replica(checkpoint, settings)
    if what == "observed":
        analyze_shard(replica, shard, settings)
    else:
        replica.forward(list(shard.batches(settings.batch_size)), no_observation)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)


if __name__ == "__main__":
    main()
