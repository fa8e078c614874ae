"""Repair: the last layer before each cut makes up for what is removed, without training.

At each cut, in order of depth, let X be the hidden states after the last layer before it, in the pruned model with the
repairs so far, and Y those of the whole model after the last layer that is removed there. R = Y - X is fitted from the
output of the MLP before the cut, or from its hidden units (see `fits`). A repair of every layer does the same at each
layer behind the first cut, because what earlier fits leave missing propagates through them.

A layer that loses routed experts is a cut as well, fitted to the whole model's hidden states after that layer. Its
hidden units are those of all remaining experts times their gates (`models.structure.down_projections`).

The first token of each row is an attention sink: in some models its hidden states are hundreds of times as long as
others. It is scaled to their length. One row of ten is held back: it chooses the ridge and measures the fit, and a fit
that does not help is undone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from avss_dist.core.settings import Settings
from avss_dist.core.text import describe_layers
from avss_dist.core.validation import OneOf, checked
from avss_dist.corpus.shards import CorpusPlan
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.change.patches import Patch
from avss_dist.models.checkpoint.locate import Checkpoint
from avss_dist.plans.plan import Plan
from avss_dist.pruning.repair.borrow import BorrowFitter
from avss_dist.pruning.repair.cuts import find_cuts
from avss_dist.pruning.repair.fitter import RepairFitter
from avss_dist.pruning.repair.hidden_states import HiddenStateSource
from avss_dist.pruning.repair.registry import DEFAULT_REPAIR, REPAIRS, RepairRecord, RepairText, split_weight
from avss_dist.pruning.repair.splits import count_fitted, split_texts
from avss_dist.pruning.weights import StoredWeights


@checked
class Repair:
    """Request to repair a pruned model.

    Raises:
        ConfigError: values out of their range.
    """

    by: Annotated[str, OneOf(tuple(REPAIRS))] = DEFAULT_REPAIR
    """Name of the repair."""
    corpora: Annotated[tuple[str, ...], Field(strict=False, min_length=1)]
    """Texts that it is fitted on, with equal weight whatever their length, or a weight each: CORPUS=0.5."""
    settings: Settings = Field(default_factory=Settings)
    """Settings with which texts are read and the model computes."""

    def __post_init__(self) -> None:
        for corpus in self.corpora:
            split_weight(corpus)  # It refuses a weight of 0.

    @property
    def weights(self) -> list[float]:
        """Weight of each text."""
        return [split_weight(corpus)[1] for corpus in self.corpora]


@dataclass(frozen=True)
class Repaired:
    """A fitted repair.

    Attributes:
        tensors: weights to write in place of the checkpoint's, in their dtypes.
        record: the record to write beside them.
        notes: remarks for people.
    """

    tensors: Patch
    record: RepairRecord
    notes: Sequence[str]


def fit_repair(
    checkpoint: Checkpoint,
    plan: Plan,
    repair: Repair,
    texts: Sequence[CorpusPlan],
    stored: StoredWeights,
    model: LanguageModel,
) -> Repaired:
    """Fit a repair to the cuts of a plan, on an open model and tokenized texts.

    Args:
        repair: its settings are pinned.
        stored: weights of the checkpoint's files. Their dtypes are those that are written.

    Raises:
        PlanError: a cut cannot be repaired; the message says why.
        CorpusError: a text has too few tokens.
        AvssError: hidden states are not finite.
    """
    settings = repair.settings
    every_layer = REPAIRS[repair.by].every_layer
    cuts = find_cuts(plan, every_layer=every_layer)
    splits = split_texts(texts, settings.batch_size, repair.weights)
    # Ranks in lockstep need equally many batches. Those that are added count for nothing.
    num_added = -len(splits) % model.lockstep
    splits += [splits[0].uncounted()] * num_added
    source = HiddenStateSource(model, [split.batch for split in splits], plan.drop)
    fitter_type = BorrowFitter if REPAIRS[repair.by].borrows else RepairFitter
    fitter = fitter_type(source, stored, splits, model)
    repaired_cuts = fitter.fit_all(cuts, repair.by)
    record = RepairRecord(
        repair=repair.by,
        model=checkpoint.name,
        revision=checkpoint.revision,
        removed=plan.dropped_layers,
        texts=tuple(_text_records(texts, count_fitted(splits, len(texts)), repair.weights)),
        cuts=tuple(repaired_cuts),
        **settings.text_options(),
        dtype=settings.dtype,
    )
    notes = fitter.notes
    first = [layer for layer in plan.dropped_layers if layer < plan.keep[0]]
    if first and not every_layer:
        notes.append(f"Nothing stands before layers {describe_layers(first)}: what they did is not given back.")
    return Repaired(source.changed, record, notes)


def _text_records(texts: Sequence[CorpusPlan], counts: Sequence[int], weights: Sequence[float]) -> Iterator[RepairText]:
    """Yield the record of each text, with the number of its tokens that were fitted to and its weight."""
    for text, count, weight in zip(texts, counts, weights, strict=True):
        yield RepairText(
            corpus=text.source,
            fingerprint=text.corpus_fingerprint,
            rows=text.num_sequences,
            tokens=count,
            weight=weight,
        )
