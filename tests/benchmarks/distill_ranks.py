"""Tokens/s of a distillation by one process and by two ranks, and the difference of their curves.

    python tests/benchmarks/distill_ranks.py [--layers 8] [--tokens 2e4] [--sharding ddp --sharding zero3]

Teacher and student are random Llamas; the student lacks a quarter of the layers. One process is timed with one thread,
and with as many threads as the ranks have together. Tokens/s are those between the first and the last training step.
Steps of ranks are heard of twice a second, so that trainings of less than 10 seconds are not timed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)  # beside this file is a coverage.py, which numba would import

import torch
from support.benchmarking import TrainingClock
from support.checkpoints import llama, save_tokenizer
from support.texts import sentences

import avss_dist
from avss_dist.core.registry import SHARDINGS
from avss_dist.pruning.checkpoint import prune
from avss_dist.pruning.plan import Plan


def write_models(folder: Path, layers: int, width: int) -> None:
    """Write a teacher, its student and a text."""
    model = llama(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=3 * width,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=256,
        initializer_range=0.1,
    )
    model.save_pretrained(folder / "teacher")
    save_tokenizer(folder / "teacher")
    dropped = tuple(range(1, 1 + max(1, layers // 4)))
    plan = Plan(model=str(folder / "teacher"), num_layers=layers, layers="layers", drop=dropped)
    prune(str(folder / "teacher"), plan, folder / "student")
    (folder / "text.txt").write_text("\n".join(sentences(3000, seed=1)))


def distilled(folder: Path, name: str, **options: Any) -> tuple[float, list[float]]:
    """Distil the student, and return tokens/s and the loss of each step."""
    clock = TrainingClock()
    avss_dist.distill(
        folder / "student",
        teacher=folder / "teacher",
        corpora=[str(folder / "text.txt")],
        output=folder / name,
        self_texts=0,
        held_out=4,
        evaluations=1,
        warmup=2,
        dtype="float32",
        device="cpu",
        on_event=clock,
        **options,
    )
    return clock.speed, [event.loss for _, event in clock.steps]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--tokens", type=float, default=2e4)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--sharding", action="append", choices=list(SHARDINGS))
    options = parser.parse_args()
    training = {"tokens": options.tokens, "sequence_length": options.sequence_length}
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(folder, options.layers, options.width)
        torch.set_num_threads(1)
        speed, losses = distilled(folder, "alone", **training)
        print(f"one process, 1 thread    {speed:8,.0f} tokens/s", flush=True)
        torch.set_num_threads(cores)
        whole, _ = distilled(folder, "threads", **training)
        print(f"one process, {cores} threads  {whole:8,.0f} tokens/s {whole / speed:6.2f}", flush=True)
        for sharding in options.sharding or SHARDINGS:
            ranked, curve = distilled(folder, sharding, **training, ranks=2, sharding=sharding)
            off = max(abs(a - b) for a, b in zip(losses, curve, strict=True))
            print(
                f"two ranks, {sharding:5}         {ranked:8,.0f} tokens/s {ranked / speed:6.2f}, "
                f"loss of a step differs by at most {off:.1e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
