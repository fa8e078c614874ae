"""Compare repairs, and the texts that they are fitted on, by the perplexity that is kept on several texts.

    python tests/benchmarks/smaller.py MODEL FOLDER --drop 3 7 12 --fit fit.txt --text wikitext=heldout.txt
        [--text help=builtin:pydoc] [--repairs refit borrow] [--rows 64] [--fit-rows 96] [--distill-tokens 73728]

Each repair is fitted on ``--fit`` alone, and on it and as many rows of text that the model writes itself. Each
checkpoint is then distilled on later rows of both, if ``--distill-tokens`` says so. FOLDER receives the checkpoints;
those that it has are not made again. Repairs are fitted in float32; passes of the distillation are in bfloat16 where
the device multiplies it in hardware. Perplexities are computed by plain transformers, row by row, in ``--dtype``.

The kept share is the perplexity of the whole model divided by that of the checkpoint. Behind it stands the difference
from the first checkpoint of the table in points, with its 95% interval, over the same rows: those of `avss evaluate`
are computed alike.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

import numpy as np
import torch
from numpy.typing import NDArray
from support.benchmarking import timed
from transformers import AutoConfig, AutoModelForCausalLM

import avss_dist
from avss_dist.core.settings import Settings
from avss_dist.corpus.shards import tokenize_corpus
from avss_dist.models.checkpoint.loading import load_tokenizer
from avss_dist.models.checkpoint.locate import resolve
from avss_dist.plans.plan import Plan
from avss_dist.stats.intervals import jackknife_interval, left_out_weights

SEQUENCE_LENGTH = 256
OWN_TEXT = "self"
"""Name of the text that a model writes itself."""
TEXT_OPTIONS = {"sequence_length": SEQUENCE_LENGTH, "device": "cpu"}

Losses = NDArray[np.float64]


@dataclass(frozen=True)
class Variant:
    """A smaller model to make.

    Attributes:
        repair: name of the repair.
        corpora: texts that it is fitted on.
        distilled: whether it is trained afterwards.
    """

    repair: str
    corpora: tuple[str, ...]
    distilled: bool = False

    @property
    def name(self) -> str:
        """Name of its folder."""
        name = self.repair
        if OWN_TEXT in self.corpora:
            name += "-own"
        if self.distilled:
            name += "-distilled"
        return name


def variants(options: argparse.Namespace) -> list[Variant]:
    """Return the smaller models to make, those to distil after all others."""
    repaired = []
    for corpora in ((options.fit,), (options.fit, OWN_TEXT)):
        for repair in options.repairs:
            repaired.append(Variant(repair, corpora))
    distilled = []
    for variant in repaired:
        if options.distill_tokens and (not options.distill or variant.name in options.distill):
            distilled.append(Variant(variant.repair, variant.corpora, distilled=True))
    return [*repaired, *distilled]


def make(variant: Variant, options: argparse.Namespace) -> Path:
    """Return the folder of a smaller model, which is made if it is not there."""
    folder = Path(options.folder) / variant.name
    if folder.exists():
        return folder
    if variant.distilled:
        make_distilled(variant, folder, options)
    else:
        make_repaired(variant, folder, options)
    return folder


def make_repaired(variant: Variant, folder: Path, options: argparse.Namespace) -> None:
    """Write a checkpoint without the layers, and repaired."""
    number = AutoConfig.from_pretrained(options.model).get_text_config().num_hidden_layers
    plan = Plan(model=options.model, num_layers=number, layers="layers", drop=tuple(options.drop))
    pruned, seconds = timed(
        lambda: avss_dist.prune(
            options.model,
            plan,
            folder,
            repair=variant.repair,
            repair_corpora=variant.corpora,
            max_sequences=options.fit_rows,
            dtype="float32",
            **TEXT_OPTIONS,
        )
    )
    print(f"{variant.name}: {seconds:,.0f} s", file=sys.stderr)
    for cut in pruned.repair.cuts:
        print(f"  {cut.describe()}", file=sys.stderr)


def make_distilled(variant: Variant, folder: Path, options: argparse.Namespace) -> None:
    """Train a repaired checkpoint on later rows of the text, and on text that the whole model writes."""
    repaired = Path(options.folder) / Variant(variant.repair, variant.corpora).name
    _, seconds = timed(
        lambda: avss_dist.distill(
            repaired,
            teacher=options.model,
            output=folder,
            corpora=[options.fit],
            skip_sequences=options.fit_rows,
            allow_overlap=True,  # The figures of the training are not used.
            tokens=options.distill_tokens,
            **TEXT_OPTIONS,
        )
    )
    print(f"{variant.name}: {seconds:,.0f} s", file=sys.stderr)


def read_rows(options: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Return the token ids of each text to evaluate on, int64[rows, positions]."""
    tokenizer = load_tokenizer(resolve(options.model))
    settings = Settings(sequence_length=SEQUENCE_LENGTH, max_sequences=options.rows)
    rows = {}
    for named in options.text:
        name, _, corpus = named.partition("=")
        shards = tokenize_corpus(corpus, tokenizer, settings).shards
        rows[name] = torch.from_numpy(np.concatenate([shard.input_ids for shard in shards])).long()
    return rows


@torch.inference_mode()
def losses(checkpoint: str | Path, texts: Mapping[str, torch.Tensor], dtype: str) -> dict[str, Losses]:
    """Return the mean loss of each row of each text in nats, float64[rows].

    Args:
        checkpoint: folder or hub id of a model.
        texts: token ids by name, int64[rows, positions].
        dtype: compute dtype. The loss itself is always computed in float32.
    """
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()
    losses_by_text = {}
    for name, rows in texts.items():
        by_row = []
        for row in rows:
            logits = model(row[None], use_cache=False).logits[0, :-1].float()
            by_row.append(float(torch.nn.functional.cross_entropy(logits, row[1:])))
        losses_by_text[name] = np.array(by_row)
    return losses_by_text


def kept(whole: Losses, smaller: Losses) -> Losses:
    """Return the share of the perplexity that is kept.

    Args:
        whole, smaller: mean losses of the rows, float64[..., rows].
    """
    return 100 * np.exp(whole.mean(-1) - smaller.mean(-1))


def difference_interval(whole: Losses, smaller: Losses, reference: Losses) -> Losses:
    """Return the 95% interval of the difference of two kept shares in points, float64[2].

    Args:
        whole, smaller, reference: mean losses of the same rows, float64[rows].
    """

    def difference(weights: Losses) -> Losses:
        def mean(values: Losses) -> Losses:
            return weights @ values / weights.sum(-1)

        return 100 * (np.exp(mean(whole) - mean(smaller)) - np.exp(mean(whole) - mean(reference)))

    rows = len(whole)
    return jackknife_interval(difference(np.ones(rows)), difference(left_out_weights(rows)))


def row_of(
    name: str, smaller: Mapping[str, Losses], reference: Mapping[str, Losses], whole: Mapping[str, Losses]
) -> str:
    """Return a row of the table as Markdown.

    Args:
        name: name of the checkpoint.
        smaller: its losses by text.
        reference: losses of the checkpoint that it is compared with. Differences from itself are not written.
        whole: losses of the whole model.
    """
    cells = []
    for text, losses_of_text in smaller.items():
        cell = f"{kept(whole[text], losses_of_text):.1f}"
        if smaller is not reference:
            difference = kept(whole[text], losses_of_text) - kept(whole[text], reference[text])
            low, high = difference_interval(whole[text], losses_of_text, reference[text])
            cell += f" ({difference:+.1f} [{low:+.1f}, {high:+.1f}])"
        cells.append(cell)
    return f"| {name} | {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the smaller models that are not there, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub id of the whole model")
    parser.add_argument("folder", help="folder for the smaller models")
    parser.add_argument("--drop", type=int, nargs="+", required=True, help="layers to remove")
    parser.add_argument("--fit", required=True, help="corpus that repairs are fitted on")
    parser.add_argument("--text", action="append", required=True, help="NAME=CORPUS to evaluate on; repeatable")
    parser.add_argument("--repairs", nargs="+", default=["refit", "borrow"])
    parser.add_argument("--rows", type=int, default=64, help="of each text to evaluate on")
    parser.add_argument("--fit-rows", type=int, default=96, help="of each text that a repair is fitted on")
    parser.add_argument("--distill-tokens", type=int, default=0, help="0 for no distillation")
    parser.add_argument("--distill", nargs="+", help="names of rows of the table to distil, such as borrow-own; or all")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16"],
        help="in which perplexities are computed; bfloat16 takes a fraction of the time where there are units for it",
    )
    options = parser.parse_args(arguments)
    texts = read_rows(options)
    whole = losses(options.model, texts, options.dtype)
    print(f"| | {' | '.join(whole)} |")
    print(f"|---|{'---|' * len(whole)}", flush=True)
    reference = None
    for variant in variants(options):
        smaller = losses(make(variant, options), texts, options.dtype)
        reference = reference or smaller
        print(row_of(variant.name, smaller, reference, whole), flush=True)


if __name__ == "__main__":
    main()
