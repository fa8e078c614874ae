"""Time of greedy generation without layers: on the remaining layers with a key-value cache, and skipping without one.

    python tests/benchmarks/generation.py MODEL_FOLDER [--drop 8 9 10] [--new 64] [--prompt 64] [--rows 1 4]

Both ways generate in turn, in one process, and must give the same tokens in float32. A ratio is the median over rounds
of the time without a cache over the time with one. The first generation, which checks that the remaining layers compute
the same, is not timed, and is printed as a time of its own.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

import torch

from avss_dist.core.settings import Settings
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.checkpoints import resolve
from avss_dist.partition.single import SingleReplica


def timed(model: LanguageModel, ids: torch.Tensor, number: int, **options: object) -> tuple[torch.Tensor, float]:
    """Return greedy continuations of ``number`` tokens, and the seconds that they took."""
    start = time.perf_counter()
    tokens: torch.Tensor = model.generate(
        inputs=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=number,
        min_new_tokens=number,
        do_sample=False,
        **options,
    )
    return tokens[:, ids.shape[1] :], time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line for each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--drop", type=int, nargs="+", default=[8, 9, 10, 11, 12, 13, 14, 15])
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args(arguments)
    settings = Settings(dtype=options.dtype, device="cpu")
    model = SingleReplica(resolve(options.model), settings, head=True).language_model
    assert model is not None
    generator = torch.Generator().manual_seed(0)
    with model.without(options.drop):
        print("rows, same tokens, seconds with a cache, seconds without, ratio, first use")
        for rows in options.rows:
            ids = torch.randint(10, 300, (rows, options.prompt), generator=generator)
            _, first = timed(model, ids, 1)
            rounds = [
                (timed(model, ids, options.new), timed(model, ids, options.new, use_cache=False))
                for _ in range(options.rounds)
            ]
            same = all(torch.equal(tokens, expected) for (tokens, _), (expected, _) in rounds)
            ratio = statistics.median(without / cached for (_, cached), (_, without) in rounds)
            medians = ", ".join(f"{statistics.median(way[i][1] for way in rounds):.2f}" for i in (0, 1))
            print(f"{rows}, {same}, {medians}, {ratio:.1f}, {first:.2f}", flush=True)


if __name__ == "__main__":
    main()
