"""Repair: the last layer before each cut makes up for what is removed, without training.

At each cut, in order of depth, let X be the hidden states after the last layer before it, in the pruned model with the
repairs so far, and Y those of the whole model after the last layer that is removed there. R = Y - X is fitted from the
output of the MLP before the cut, or from its hidden units (see `fold`). A repair of every layer does the same at each
layer behind the first cut, because what earlier fits leave missing propagates through them.

A layer that loses routed experts is a cut as well, fitted to the whole model's hidden states after that layer. Its
hidden units are those of all remaining experts times their gates (`models.expert_units`).

The first token of each row is an attention sink: in some models its hidden states are hundreds of times as long as
others. It is scaled to their length. One row of ten is held back: it chooses the ridge and measures the fit, and a fit
that does not help is undone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field

from avss_dist.core.settings import Execution, Settings
from avss_dist.core.text import RedactedURI, describe_layers
from avss_dist.core.validation import checked
from avss_dist.corpus.shards import CorpusPlan, tokenize_corpus
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.loading import load_tokenizer, text_config
from avss_dist.models.patching import Patch
from avss_dist.models.pinning import pin
from avss_dist.pruning.plan import Plan
from avss_dist.pruning.repair.fitter import DataParallel, ReadStored, RepairFitter, find_cuts
from avss_dist.pruning.repair.hidden_states import OpenHiddenStates, opened_hidden_states
from avss_dist.pruning.repair.record import RepairedCut, RepairRecord, RepairText, split_weight
from avss_dist.pruning.repair.registry import DEFAULT_REPAIR, REPAIRS, RepairName
from avss_dist.pruning.repair.splits import FitSplit, count_fitted, split_texts
from avss_dist.system.devices import pick_device


@checked
class Repair:
    """Request to repair a pruned model.

    Raises:
        ConfigError: values out of their range.
    """

    by: RepairName = DEFAULT_REPAIR
    """Name of the repair."""
    corpora: Annotated[tuple[str, ...], Field(strict=False, min_length=1)]
    """Texts that it is fitted on, with equal weight whatever their length, or a weight each: CORPUS=0.5."""
    skip_sequences: Annotated[int, Field(ge=0)] = 0
    """Rows at the start of each text that are not read."""
    settings: Settings = Field(default_factory=Settings)
    """Settings with which texts are read and the model computes."""

    def __post_init__(self) -> None:
        self.weights  # noqa: B018  (checks them)

    @property
    def texts(self) -> list[RedactedURI]:
        """Corpora without their weights."""
        return [split_weight(corpus)[0] for corpus in self.corpora]

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


def repair_layers(
    checkpoint: Checkpoint, plan: Plan, repair: Repair, stored: ReadStored, execution: Execution | None = None
) -> Repaired:
    """Fit a repair to the cuts of a plan, with the model in memory or streamed.

    Args:
        stored: reads a parameter from the checkpoint's files; its dtype is the one that is written.
        execution: ``partition`` and its memory limits; chosen by default.

    Raises:
        RepairError: a cut cannot be repaired; the message says why.
        CorpusError: a text cannot be read, or has too few tokens.
        ConfigError: repairs cannot be fitted in the partition, or its memory limits are too small.
        FitError: hidden states are not finite.
    """
    find_cuts(plan, every_layer=REPAIRS[repair.by].every_layer)
    device = pick_device(repair.settings.device)
    config = text_config(checkpoint, trust_remote_code=repair.settings.trust_remote_code)
    settings = replace(pin(repair.settings, checkpoint, config, device.type), layers=plan.layers)
    tokenizer = load_tokenizer(checkpoint, trust_remote_code=settings.trust_remote_code)
    texts = [
        tokenize_corpus(corpus, tokenizer, settings, skip_sequences=repair.skip_sequences) for corpus in repair.texts
    ]
    with opened_hidden_states(checkpoint, settings, device, execution or Execution()) as open_hidden_states:
        return fit_repair(checkpoint, open_hidden_states, plan, replace(repair, settings=settings), texts, stored)


def fit_repair(
    checkpoint: Checkpoint,
    open_hidden_states: OpenHiddenStates,
    plan: Plan,
    repair: Repair,
    texts: Sequence[CorpusPlan],
    stored: ReadStored,
    parallel: DataParallel | None = None,
) -> Repaired:
    """Fit a repair on an open model and tokenized texts. See `repair_layers`.

    Args:
        repair: its settings are pinned.
        parallel: share of this process in the fit; all of it by default.
    """
    cuts = find_cuts(plan, every_layer=REPAIRS[repair.by].every_layer)
    parallel = parallel or DataParallel()
    splits = split_texts(texts, repair.settings.batch_size, repair.weights)
    splits += [splits[0].uncounted()] * (-len(splits) % parallel.multiple)
    starts = [cut.last for cut in cuts if cut.last + 1 < plan.num_layers]
    source = open_hidden_states([split.batch for split in splits], plan.drop, starts)
    fitter = RepairFitter(source, stored, splits, parallel)
    repaired_cuts = fitter.fit_all(cuts, repair.by)
    record = _record(checkpoint, plan, repair, texts, splits, repaired_cuts)
    return Repaired(fitter.tensors, record, _notes(plan, repair.by))


def _record(
    checkpoint: Checkpoint,
    plan: Plan,
    repair: Repair,
    texts: Sequence[CorpusPlan],
    splits: Sequence[FitSplit],
    cuts: Sequence[RepairedCut],
) -> RepairRecord:
    settings = repair.settings
    return RepairRecord(
        repair=repair.by,
        model=checkpoint.name,
        revision=checkpoint.revision,
        removed=plan.dropped_layers,
        texts=tuple(
            RepairText(
                corpus=text.source,
                fingerprint=text.corpus_fingerprint,
                rows=text.num_sequences,
                tokens=count,
                weight=weight,
            )
            for text, count, weight in zip(texts, count_fitted(splits, len(texts)), repair.weights, strict=True)
        ),
        cuts=tuple(cuts),
        sequence_length=settings.sequence_length,
        layout=settings.layout,
        row_start=settings.row_start,
        skip_sequences=repair.skip_sequences,
        max_sequences=settings.max_sequences,
        shuffle_seed=settings.shuffle_seed,
        chat_template=settings.chat_template,
        dtype=settings.dtype,
    )


def _notes(plan: Plan, repair: str) -> list[str]:
    if 0 not in plan.dropped_layers or REPAIRS[repair].every_layer:
        return []
    first = describe_layers([layer for layer in plan.dropped_layers if set(range(layer)) <= set(plan.dropped_layers)])
    return [f"Nothing stands before layers {first}: what they did is not given back."]
