"""Repair: what is missing in the stream where layers were removed, given back by the last layer before them.

At each cut, in order of depth: X is the stream after the last layer before it, in the pruned model with the repairs so
far; Y is the whole model's stream after the last layer that is removed there; R = Y - X is fitted from what the MLP
before the cut adds, or from its hidden units (`fold`). ``refit_all`` does the same at every layer behind the first cut,
for what earlier repairs could not give back goes on through them. ``refit_around`` fits the other linear maps of the
layer behind each cut too, to give of the repaired stream what they give in the whole model. ``refit_full`` does both:
all linear maps of every layer behind the first cut. The stream of the first token of each row is hundreds of times as
long as others in some models, and all others attend to it: it is scaled to their length. One row of ten is held back:
it chooses the ridge, and says what the fit is worth; a step that is worth nothing is taken back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field

from avss_dist.corpus.shards import CorpusPlan, plan
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.loading import load_tokenizer, text_config
from avss_dist.models.patching import Patch
from avss_dist.models.pinning import pin
from avss_dist.pruning.plan import Plan
from avss_dist.pruning.repair.cuts import layer_behind, require_cuts
from avss_dist.pruning.repair.mender import ALONE, Mender, ReadStored, Sharing
from avss_dist.pruning.repair.record import RepairedCut, RepairRecord, RepairText
from avss_dist.pruning.repair.streams import OpenStreams, opened_streams
from avss_dist.pruning.repair.text import Portion, count_tokens, portions
from avss_dist.pruning.repair.weighted import weighted
from avss_dist.settings import DEFAULT_REPAIR, REFITS_LATER, REPAIRS, RIVAL_PATCHES, Execution, OneOf, Settings, checked
from avss_dist.system.devices import pick_device
from avss_dist.text import RedactedURI, describe_layers


@checked
class Repair:
    """How a pruned model is repaired.

    Raises:
        ConfigError: values out of their range.
    """

    by: Annotated[str, OneOf((*REPAIRS, *RIVAL_PATCHES))] = DEFAULT_REPAIR
    """What is fitted."""
    corpora: Annotated[tuple[str, ...], Field(strict=False, min_length=1)]
    """The texts that it is fitted on; each counts alike, however long, or by a weight: CORPUS=0.5."""
    skip_sequences: Annotated[int, Field(ge=0)] = 0
    """Rows at the start of each text that are not read."""
    settings: Settings = Field(default_factory=Settings)
    """How texts are read, and how the model computes."""

    def __post_init__(self) -> None:
        self.weights  # noqa: B018  (refuses those that are none)

    @property
    def texts(self) -> list[RedactedURI]:
        """The corpora without their weights."""
        return [weighted(corpus)[0] for corpus in self.corpora]

    @property
    def weights(self) -> list[float]:
        """Of each text."""
        return [weighted(corpus)[1] for corpus in self.corpora]


@dataclass(frozen=True)
class Repaired:
    """Weights to write in place of the checkpoint's, in their dtypes, and what is to be said of them."""

    tensors: Patch
    record: RepairRecord
    notes: Sequence[str]


def repair_layers(
    checkpoint: Checkpoint, made: Plan, repair: Repair, stored: ReadStored, execution: Execution | None = None
) -> Repaired:
    """Fit the repair of a plan's cuts, on a model whose weights fit in memory, or by streaming.

    Args:
        stored: reads a parameter from the checkpoint's files; its dtype is the one that is written.
        execution: with ``partition`` and the memory for it; it is chosen by default.

    Raises:
        RepairError: a cut cannot be repaired; the message says why.
        CorpusError: a text cannot be read, or has too few tokens.
        ConfigError: the partition is none in which repairs are fitted, or has not the memory that it needs.
        FitError: hidden states are not finite.
    """
    require_cuts(made, every_layer=repair.by in REFITS_LATER)
    device = pick_device(repair.settings.device)
    config = text_config(checkpoint, trust_remote_code=repair.settings.trust_remote_code)
    settings = replace(pin(repair.settings, checkpoint, config, device.type), layers=made.layers)
    tokenizer = load_tokenizer(checkpoint, trust_remote_code=settings.trust_remote_code)
    texts = [plan(corpus, tokenizer, settings, skip_sequences=repair.skip_sequences) for corpus in repair.texts]
    with opened_streams(checkpoint, settings, device, execution or Execution()) as open_streams:
        return fit_repair(checkpoint, open_streams, made, replace(repair, settings=settings), texts, stored)


def fit_repair(
    checkpoint: Checkpoint,
    open_streams: OpenStreams,
    made: Plan,
    repair: Repair,
    texts: Sequence[CorpusPlan],
    stored: ReadStored,
    sharing: Sharing = ALONE,
) -> Repaired:
    """As `repair_layers`, with an open model and texts that are read; the settings of ``repair`` are pinned."""
    cuts = require_cuts(made, every_layer=repair.by in REFITS_LATER)
    read = portions(texts, repair.settings.batch_size, repair.weights)
    starts = [cut.last for cut in cuts if layer_behind(cut, made.num_layers) is not None]
    streams = open_streams([portion.batch for portion in read], made.drop, starts)
    mender = Mender(streams, stored, read, sharing)
    done = mender.mend_all(cuts, repair.by, made.num_layers)
    return Repaired(mender.tensors, _record(checkpoint, made, repair, texts, read, done), _notes(made, repair.by))


def _record(
    checkpoint: Checkpoint,
    made: Plan,
    repair: Repair,
    texts: Sequence[CorpusPlan],
    read: Sequence[Portion],
    done: Sequence[RepairedCut],
) -> RepairRecord:
    settings = repair.settings
    return RepairRecord(
        repair=repair.by,
        model=checkpoint.name,
        revision=checkpoint.revision,
        removed=made.drop,
        texts=tuple(
            RepairText(
                corpus=text.source,
                fingerprint=text.corpus_fingerprint,
                rows=text.num_sequences,
                tokens=count,
                weight=weight,
            )
            for text, count, weight in zip(texts, count_tokens(read, len(texts)), repair.weights, strict=True)
        ),
        cuts=tuple(done),
        sequence_length=settings.sequence_length,
        layout=settings.layout,
        row_start=settings.row_start,
        skip_sequences=repair.skip_sequences,
        max_sequences=settings.max_sequences,
        shuffle_seed=settings.shuffle_seed,
        chat_template=settings.chat_template,
        dtype=settings.dtype,
    )


def _notes(made: Plan, by: str) -> list[str]:
    if 0 not in made.drop or by in REFITS_LATER:
        return []
    first = describe_layers([layer for layer in made.drop if set(range(layer)) <= set(made.drop)])
    return [f"Nothing stands before layers {first}: what they did is not given back."]
