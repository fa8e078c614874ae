"""Compare the repairs with published baselines: CPU time in forward passes over the text, and the perplexity kept.

    python tests/benchmarks/repair.py MODEL CORPUS [--drop 3,12,13] [--rows 48] [--repair map --repair linear_patch ...]

Perplexities are those of the first 16 rows of the corpus (`--held-out`); fits are made on the next ones, all in one
process on one thread. With X the hidden states after the last layer before a cut, Y those of the whole model after the
last layer that is removed there, and m the output of the MLP before the cut, the baselines are

===========  ==================  ===============================================================================
baseline     X becomes           with
===========  ==================  ===============================================================================
replace_me   X + m W             W: least squares of Y - X on m, without a ridge: ReplaceMe (Shopkhoev et al.,
                                 arXiv 2505.02819), whose transform of the MLP's output is I + W
prune_comp   a X                 a: mean length of Y over that of X: Prune&Comp (Chen et al., arXiv 2507.18212)
linear_patch X H diag(d) H^T     d: by channel, mean size of Y H over that of X H, H of `hadamard`: LinearPatch
                                 (Chen et al., arXiv 2505.24680, without its training)
===========  ==================  ===============================================================================

They are fitted without the first token of each row, and applied by hooks: no weight of a checkpoint holds the last two.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

import numpy as np
import torch
from support.benchmarking import cpu_timed, open_checkpoint
from support.causal_lm import open_whole
from torch import nn

from avss_dist.core.intervention import NO_INTERVENTION
from avss_dist.core.settings import DTYPES, Settings
from avss_dist.corpus.shards import CorpusPlan, tokenize_corpus
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.change.patches import Patch
from avss_dist.models.checkpoint.loading import load_tokenizer
from avss_dist.models.forward import replace_tensor
from avss_dist.models.structure.layers import first_tensor
from avss_dist.models.watching import captured
from avss_dist.plans.plan import Plan
from avss_dist.pruning.repair.cuts import find_cuts
from avss_dist.pruning.repair.hidden_states import HiddenStateSource
from avss_dist.pruning.repair.registry import REPAIRS
from avss_dist.pruning.repair.repair import Repair, fit_repair
from avss_dist.pruning.repair.splits import SINK_TOKENS, FitSplit, split_texts
from avss_dist.pruning.weights import StoredWeights
from avss_dist.tasks.text_loss import TextLoss

PAIR = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
"""The smallest of Sylvester's matrices."""


def hadamard(size: int) -> torch.Tensor:
    """Return an orthogonal matrix, float64[size, size], each of whose columns mixes a block of neighbours equally.

    Blocks are Sylvester's Hadamard matrices, as large as the powers of two in ``size``.
    """
    block = torch.ones((1, 1), dtype=torch.float64)
    while size % (2 * len(block)) == 0:
        block = torch.kron(PAIR, block)
    blocks = torch.eye(size // len(block), dtype=torch.float64)
    return torch.kron(blocks, block / len(block) ** 0.5)


def identity(hidden: torch.Tensor) -> torch.Tensor:
    """Return the identity, float64[units, units], of hidden states [tokens, units]."""
    return torch.eye(hidden.shape[-1]).double()


def prune_comp(hidden: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return the matrix of Prune&Comp, float64[units, units], from hidden states [tokens, units]."""
    factor = wanted.norm(dim=-1).mean() / hidden.norm(dim=-1).mean()
    return factor * identity(hidden)


def linear_patch(hidden: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return the matrix of LinearPatch, float64[units, units], from hidden states [tokens, units]."""
    basis = hadamard(hidden.shape[-1])
    wanted_sizes = (wanted @ basis).abs().mean(0)
    sizes = (hidden @ basis).abs().mean(0)
    return (basis * (wanted_sizes / sizes)) @ basis.T


def replace_me(mlp: torch.Tensor, missing: torch.Tensor) -> torch.Tensor:
    """Return the transform I + W of ReplaceMe, float64[units, units], from [tokens, units]."""
    return identity(mlp) + torch.linalg.solve(mlp.T @ mlp, mlp.T @ missing)


BASELINES = ("replace_me", "prune_comp", "linear_patch")


@contextmanager
def applied(matrices: Mapping[nn.Module, torch.Tensor]) -> Iterator[None]:
    """Multiply the outputs of modules by matrices, in float32."""

    def hook(matrix: torch.Tensor) -> Callable[..., object]:
        def multiply(_module: nn.Module, _args: object, output: object) -> object:
            hidden = first_tensor(output)
            assert hidden is not None
            product = hidden.float() @ matrix.float()
            return replace_tensor(output, hidden, product.to(hidden.dtype))

        return multiply

    with ExitStack() as stack:
        for module, matrix in matrices.items():
            handle = module.register_forward_hook(hook(matrix))
            stack.callback(handle.remove)
        yield


def outputs(
    model: LanguageModel, splits: Sequence[FitSplit], modules: Sequence[nn.Module], drop: tuple[int, ...] = ()
) -> list[torch.Tensor]:
    """Return the outputs of modules over the tokens to fit to, each float64[tokens, units]."""
    by_module: list[list[torch.Tensor]] = [[] for _ in modules]
    for split in splits:
        with model.without(drop), captured(dict(enumerate(modules))) as calls:
            model.hidden_states(split.batch)
        shape = (*split.fitted.shape, -1)  # OPT's MLP has rows and tokens in one axis
        fitted = torch.from_numpy(split.fitted)[:, SINK_TOKENS:]
        for number, parts in enumerate(by_module):
            output = calls[number].output.reshape(shape)[:, SINK_TOKENS:]
            parts.append(output[fitted].double())
    return [torch.cat(parts) for parts in by_module]


@torch.no_grad()
def fit_baseline(
    baseline: str, model: LanguageModel, plan: Plan, text: CorpusPlan, batch_size: int
) -> dict[nn.Module, torch.Tensor]:
    """Return the matrices of a baseline, by the module whose output each multiplies. Each fit sees the earlier ones."""
    splits = split_texts([text], batch_size)
    matrices = dict[nn.Module, torch.Tensor]()
    source = HiddenStateSource(model, [split.batch for split in splits], plan.drop)
    for cut in find_cuts(plan):
        projection = source.output_projection(cut.after)
        layer = model.layers[cut.after].module
        added = layer.get_submodule(projection.last)
        last_removed = model.layers[cut.last].module
        (wanted,) = outputs(model, splits, [last_removed])
        with applied(matrices):
            hidden, mlp = outputs(model, splits, [layer, added], plan.drop)
        if baseline == "replace_me":
            matrices[added] = replace_me(projection.factor * mlp, wanted - hidden)
        elif baseline == "prune_comp":
            matrices[layer] = prune_comp(hidden, wanted)
        else:
            matrices[layer] = linear_patch(hidden, wanted)
    return matrices


def perplexity(model: LanguageModel, text: CorpusPlan, drop: tuple[int, ...] = (), patch: Patch | None = None) -> float:
    """Return the perplexity of a text without some layers and with other weights."""
    intervention = NO_INTERVENTION.without(*drop)
    loss = 0.0
    tokens = 0.0
    with model.patched(patch or {}):
        for shard in text.shards:
            measure = TextLoss(shard)
            for row in measure(model, intervention):
                loss += row.samples.sum()
                tokens += row.weights.sum()
    return float(np.exp(loss / tokens))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a row for each repair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("corpus")
    parser.add_argument("--drop", help="layers to drop; by default every fourth one")
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--held-out", type=int, default=16, help="rows that the perplexity is measured on")
    parser.add_argument("--sequence-length", type=int, default=Settings().sequence_length)
    parser.add_argument("--dtype", default="auto", choices=DTYPES)
    parser.add_argument("--repair", action="append", choices=(*REPAIRS, *BASELINES), help="repeatable; all by default")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    given = Settings(max_sequences=args.rows, sequence_length=args.sequence_length, dtype=args.dtype, device="cpu")
    checkpoint, settings = open_checkpoint(args.model, given)
    tokenizer = load_tokenizer(checkpoint)
    first_rows = Settings(max_sequences=args.held_out, sequence_length=args.sequence_length)
    held_out = tokenize_corpus(args.corpus, tokenizer, first_rows)
    later_rows = dataclasses.replace(settings, skip_sequences=args.held_out)
    text = tokenize_corpus(args.corpus, tokenizer, later_rows)
    model = open_whole(checkpoint, settings)
    layers = len(model.layers)
    drop = tuple(range(3, layers, 4))
    if args.drop:
        drop = tuple(int(layer) for layer in args.drop.split(","))
    path = model.layers[0].name.rpartition(".")[0]
    plan = Plan(model=checkpoint.name, num_layers=layers, layers=path, drop=drop)
    stored = StoredWeights.of_checkpoint(checkpoint, plan, settings)
    whole = perplexity(model, held_out)
    pruned = perplexity(model, held_out, drop)
    _, once = cpu_timed(lambda: perplexity(model, text))
    print(f"{checkpoint.name} without {len(drop)} of {layers} layers, fitted on {args.rows} rows")
    print(f"{'whole model':14s} perplexity {whole:10.2f}")
    print(f"{'without them':14s} perplexity {pruned:10.2f}, kept {whole / pruned:6.1%}")

    def fit(name: str) -> tuple[float, float]:
        """Return the perplexity with a repair, and the CPU seconds of its fit."""
        if name in BASELINES:
            matrices, cost = cpu_timed(lambda: fit_baseline(name, model, plan, text, settings.batch_size))
            with applied(matrices):
                return perplexity(model, held_out, drop), cost
        repair = Repair(by=name, corpora=(args.corpus,), settings=settings)
        repaired, cost = cpu_timed(lambda: fit_repair(checkpoint, plan, repair, [text], stored, model))
        return perplexity(model, held_out, drop, repaired.tensors), cost

    names: Collection[str] = args.repair or (*REPAIRS, *BASELINES)
    for name in names:
        repaired, cost = fit(name)
        title = "published baseline"
        if name in REPAIRS:
            title = REPAIRS[name].meaning
        print(f"{name:14s} perplexity {repaired:10.2f}, kept {whole / repaired:6.1%}", end=", ")
        print(f"{cost / once:6.1f} passes: {title}")


if __name__ == "__main__":
    main()
