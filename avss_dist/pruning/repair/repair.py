"""Repair: the last layer before each cut makes up for what is removed, without training.

At each cut, in order of depth, let X be the hidden states after the last layer before it, in the pruned model with the
repairs so far, and Y those of the whole model after the last layer that is removed there. R = Y - X is fitted from the
output of the MLP before the cut, or from its hidden units (see `fits`). A repair of every layer does the same at each
layer behind the first cut, because what earlier fits leave missing propagates through them.

A layer that loses routed experts is a cut as well, fitted to the whole model's hidden states after that layer. Its
hidden units are those of all remaining experts times their gates (`models.experts`).

The first token of each row is an attention sink: in some models its hidden states are hundreds of times as long as
others. It is scaled to their length. One row of ten is held back: it chooses the ridge and measures the fit, and a fit
that does not help is undone.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import nn

from avss_dist.core.errors import ModelError
from avss_dist.core.settings import Settings
from avss_dist.core.text import RedactedURI, describe_layers
from avss_dist.core.validation import checked
from avss_dist.corpus.shards import CorpusPlan
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.experts import find_down_projections, find_routed_experts
from avss_dist.models.interventions import Patch
from avss_dist.models.layers import linear_sizes
from avss_dist.models.loading import candidate_layers
from avss_dist.models.safetensors import DTYPES
from avss_dist.models.size import load_skeleton
from avss_dist.models.structure import find_down_projection
from avss_dist.pruning.plan import Plan
from avss_dist.pruning.repair.fitter import PLAIN_HINT, ReadStored, RepairFitter, count_fitted, find_cuts, split_texts
from avss_dist.pruning.repair.hidden_states import HiddenStateSource
from avss_dist.pruning.repair.projection import RepairError
from avss_dist.pruning.repair.registry import (
    DEFAULT_REPAIR,
    REPAIRS,
    RepairName,
    RepairRecord,
    RepairText,
    split_weight,
)
from avss_dist.pruning.weights import StoredWeights


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


def fit_repair(
    checkpoint: Checkpoint,
    plan: Plan,
    repair: Repair,
    texts: Sequence[CorpusPlan],
    stored: ReadStored,
    model: LanguageModel,
) -> Repaired:
    """Fit a repair to the cuts of a plan, on an open model and tokenized texts.

    Args:
        repair: its settings are pinned.
        stored: reads a parameter from the checkpoint's files; its dtype is the one that is written.

    Raises:
        RepairError: a cut cannot be repaired; the message says why.
        CorpusError: a text has too few tokens.
        FitError: hidden states are not finite.
    """
    every_layer, settings = REPAIRS[repair.by].every_layer, repair.settings
    cuts = find_cuts(plan, every_layer=every_layer)
    splits = split_texts(texts, settings.batch_size, repair.weights)
    splits += [splits[0].uncounted()] * (-len(splits) % model.lockstep)
    starts = [cut.last for cut in cuts if cut.last + 1 < plan.num_layers]
    source = HiddenStateSource(model, [split.batch for split in splits], plan.drop, starts)
    repaired_cuts = RepairFitter(source, stored, splits, model).fit_all(cuts, repair.by)
    counts = count_fitted(splits, len(texts))
    record = RepairRecord(
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
            for text, count, weight in zip(texts, counts, repair.weights, strict=True)
        ),
        cuts=tuple(repaired_cuts),
        **settings.text_options(),
        dtype=settings.dtype,
    )
    notes = []
    if 0 in plan.dropped_layers and not every_layer:
        first = describe_layers([layer for layer in plan.dropped_layers if layer < plan.keep[0]])
        notes.append(f"Nothing stands before layers {first}: what they did is not given back.")
    return Repaired(source.changed, record, notes)


def tokens_needed(checkpoint: Checkpoint, repair: str, settings: Settings) -> int:
    """Return the minimum number of tokens to fit a repair to, at the layer that needs the fewest.

    Args:
        repair: one of `pruning.repair.registry.REPAIRS`.

    Returns:
        0 if only a pass over tokens can tell which modules are the layers.

    Raises:
        RepairError: no layer can hold the repair; the message says why.
        ModelError: the checkpoint cannot be read, or its model cannot be built.
    """
    _, model, _ = load_skeleton(checkpoint, settings)
    text = model.config.get_text_config()
    lists = candidate_layers(model, settings.layers)
    if len(lists) != 1:
        return 0
    ((path, layers),) = lists.items()
    changed = {i: weight for i, layer in enumerate(layers) if (weight := _changed_weight(layer, text.hidden_size))}
    if not changed:
        raise RepairError(
            f"No layer of '{checkpoint.name}' has an MLP that ends in one linear map, or in those of its routed "
            "experts: what is missing after it cannot be given back.",
            "Set `repair` to none.",
        )
    plan = Plan(model=checkpoint.name, num_layers=len(layers), layers=path, drop=(0,))
    weights = StoredWeights.of_checkpoint(checkpoint, plan, settings)
    stored = {tensor.name: tensor.dtype for tensors in weights.files.values() for tensor in tensors.values()}
    names = [weights.names((layer, path))[0] for layer, (path, *_) in changed.items()]
    dtypes = [DTYPES[stored[name]] for name in names if stored.get(name) in DTYPES]
    if not any(dtype.is_floating_point and dtype.itemsize > 1 for dtype in dtypes):
        form = f"as {stored[names[0]]}" if names[0] in stored else "under other names"
        raise RepairError(
            f"The files of '{checkpoint.name}' hold '{names[0]}' {form}, quantized or fused: "
            "nothing can be added to it.",
            PLAIN_HINT,
        )
    needed = REPAIRS[repair].tokens_needed
    return min(needed(inputs, outputs, chances) for _, inputs, outputs, chances in changed.values())


def _changed_weight(layer: nn.Module, width: int) -> tuple[str, int, int, float] | None:
    """Return the weight of a layer that a repair changes, or None if it has none.

    Args:
        layer: the module, which may be on the meta device.
        width: units of the residual stream.

    Returns:
        Path below the layer, inputs and outputs of the linear map, and the share of the tokens that reach it.
    """
    with suppress(ModelError):
        routed = find_routed_experts(layer)
        if routed and (down := find_down_projections(layer.get_submodule(routed.experts))):
            experts, units, outputs = down.as_rows(down.module.get_parameter(down.WEIGHT)).shape
            return f"{routed.experts}.{down.WEIGHT}", units, outputs, routed.top_k / experts
    if linear := find_down_projection(layer, width):
        path, module = linear
        return f"{path}.weight", *linear_sizes(module), 1.0
    return None
