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
from dataclasses import dataclass, replace
from itertools import chain, product
from math import prod
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import nn

from avss_dist.core.devices import free_memory
from avss_dist.core.errors import CorpusError, ModelError
from avss_dist.core.settings import Settings
from avss_dist.core.streams import tracked
from avss_dist.core.text import describe_bytes, describe_layers
from avss_dist.core.validation import OneOf, checked
from avss_dist.corpus.shards import Batch, CorpusPlan, Mask
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.experts import find_down_projections, find_routed_experts
from avss_dist.models.interventions import CapturedCall, Patch
from avss_dist.models.layers import linear_sizes
from avss_dist.models.loading import candidate_layers
from avss_dist.models.safetensors import DTYPES
from avss_dist.models.size import load_skeleton
from avss_dist.models.structure import find_down_projection
from avss_dist.pruning.plan import Plan
from avss_dist.pruning.repair.fits import NormalEquations, RidgeFit, features_of, fit_ridge, fit_steps, fold
from avss_dist.pruning.repair.hidden_states import HiddenStateSource
from avss_dist.pruning.repair.projection import OutputProjection
from avss_dist.pruning.repair.registry import (
    DEFAULT_REPAIR,
    REPAIRS,
    RepairedCut,
    RepairMethod,
    RepairRecord,
    RepairText,
    split_weight,
)
from avss_dist.pruning.selection import PlanError
from avss_dist.pruning.weights import StoredWeights

HELD_BACK = 10  # one row of this many is held back, the last ones of each text
SINK_TOKENS = 1  # leading tokens of every row: attention sinks, whose hidden states are unlike all others
PLAIN_HINT = (
    "Repair the checkpoint that it was quantized from, and quantize the result; or save it again with transformers' "
    "save_pretrained, if it is not quantized."
)


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
        self.weights  # noqa: B018  (checks them)

    @property
    def weights(self) -> list[float]:
        """Weight of each text."""
        return [split_weight(corpus)[1] for corpus in self.corpora]


@dataclass(frozen=True)
class RepairCut:
    """A remaining layer, its removed experts, and the run of removed layers right after it.

    Both are empty where a repair fits a layer to recover what an earlier cut left missing.
    """

    after: int
    removed: tuple[int, ...]
    experts: tuple[int, ...] = ()

    @property
    def last(self) -> int:
        """Layer of the whole model whose output the pruned model should have here."""
        return self.removed[-1] if self.removed else self.after


def find_cuts(plan: Plan, *, every_layer: bool = False) -> list[RepairCut]:
    """Return the cuts of a plan at which a repair is fitted, in order of depth.

    Layers that are removed before the first remaining one make no cut: no layer before them can be changed.

    Args:
        every_layer: include the other remaining layers behind the first one that is removed or loses experts.

    Raises:
        PlanError: there is no cut, or the plan drops sublayers.
    """
    plan.require_no_sublayers("A repair makes up for whole layers and for experts")
    first = min([*(layer - 1 for layer in plan.dropped_layers), *plan.experts])
    remaining = [layer for layer in plan.keep if layer >= first]
    cuts = [
        RepairCut(layer, tuple(range(layer + 1, end)), tuple(plan.experts.get(layer, ())))
        for layer, end in zip(remaining, [*remaining[1:], plan.num_layers], strict=True)
    ]
    cuts = [cut for cut in cuts if cut.removed or cut.experts or every_layer]
    if not cuts:
        raise PlanError(
            f"Layers {describe_layers(plan.dropped_layers)} are the first: there is no layer before them to fit.",
            "Prune with `repair` none, keep the first layer, or repair by refit_all.",
        )
    return cuts


@dataclass(frozen=True, eq=False)
class FitSplit:
    """A batch of calibration text, split into tokens to fit to and held-back tokens.

    Attributes:
        text: index of the text.
        batch: its tokens.
        fitted, held_back: bool[rows, width], disjoint. A row that has no other token lacks its sink tokens.
        weight: weight of each token, by which a text counts by its own weight whatever its length.
    """

    text: int
    batch: Batch
    fitted: Mask
    held_back: Mask
    weight: float

    def uncounted(self) -> FitSplit:
        """Return the same batch with no token that counts, for a rank whose partners have more batches."""
        return replace(self, fitted=np.zeros_like(self.fitted), held_back=np.zeros_like(self.fitted))

    def sink_scale(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return factors, [rows, width, 1], that give sink tokens the mean length of the other tokens of their rows.

        Args:
            hidden: float32[rows, width, units], hidden states.
        """
        lengths = hidden.norm(dim=-1)
        counted = torch.from_numpy(self.fitted | self.held_back).to(hidden.device)
        counted[:, :SINK_TOKENS] = False
        mean = (lengths * counted).sum(-1) / counted.sum(-1).clamp_min(1)
        scale = torch.ones_like(lengths)
        scale[:, :SINK_TOKENS] = mean[:, None] / lengths[:, :SINK_TOKENS].clamp_min(torch.finfo(lengths.dtype).tiny)
        return scale[..., None]


def split_texts(texts: Sequence[CorpusPlan], batch_size: int, weights: Sequence[float] | None = None) -> list[FitSplit]:
    """Return the batches of texts, in order.

    Args:
        weights: relative weight of each text; equal by default.

    Raises:
        CorpusError: a text has only one row, or no token to fit to.
    """
    splits = []
    for number, text in enumerate(texts):
        first_held_back = text.num_sequences - -(-text.num_sequences // HELD_BACK)
        row = 0
        for batch in chain.from_iterable(shard.batches(batch_size) for shard in text.shards):
            counted = batch.observed.copy()
            counted[:, :SINK_TOKENS] &= counted[:, SINK_TOKENS:].any(1, keepdims=True)
            held = np.arange(row, row + len(counted))[:, None] >= first_held_back
            splits.append(FitSplit(number, batch, counted & ~held, counted & held, 1.0))
            row += len(counted)
    counts = count_fitted(splits, len(texts))
    for text, count in zip(texts, counts, strict=True):
        if not count:
            raise CorpusError(
                f"{text.source} has no token to fit to after the first of each row (rows: {text.num_sequences}).",
                "Name a longer text, or raise `max_sequences`.",
            )
    mean, weights = sum(counts) / len(counts), weights or [1.0] * len(texts)
    shares = [weight * len(weights) / sum(weights) for weight in weights]
    return [replace(split, weight=mean / counts[split.text] * shares[split.text]) for split in splits]


def count_fitted(splits: Sequence[FitSplit], texts: int) -> list[int]:
    """Return the number of tokens to fit to of each text, without sink tokens."""
    return [
        sum(int(split.fitted[:, SINK_TOKENS:].sum()) for split in splits if split.text == text) for text in range(texts)
    ]


class RepairFitter:
    """Fits a repair to cuts in order of depth. Each fit sees the changes of the earlier ones.

    Args:
        source: hidden states of both models.
        stored: weights of the checkpoint's files.
        splits: calibration text.
        model: several copies of it, or ranks that hold it together, share the batches.
    """

    def __init__(
        self, source: HiddenStateSource, stored: StoredWeights, splits: Sequence[FitSplit], model: LanguageModel
    ) -> None:
        self._source, self._stored, self._splits, self._model = source, stored, splits, model

    def fit_all(self, cuts: Sequence[RepairCut], repair: str) -> list[RepairedCut]:
        """Fit a repair to cuts, in order. Cuts that cannot be fitted are refused before the first fit.

        Args:
            repair: one of `pruning.repair.registry.REPAIRS`.

        Raises:
            PlanError: the weights of a cut cannot be changed, see `_parameter`.
            CorpusError: there are too few tokens to fit to.
        """
        projections = [self._source.output_projection(cut.after) for cut in cuts]
        for projection in projections:
            self._require_enough(projection, repair)
            for path in projection.paths.values():
                self._parameter(projection.layer.index, path)
        return [
            self.fit(cut, projection, repair, f"Repairing cut {number} of {len(cuts)}")
            for number, (cut, projection) in enumerate(zip(cuts, projections, strict=True), 1)
        ]

    def fit(self, cut: RepairCut, projection: OutputProjection, repair: str, description: str) -> RepairedCut:
        """Fit a repair to one cut and change the weights of its projection.

        The weights stay as they are if the fit does not help on held-back tokens.

        Args:
            description: text of the progress bar.
        """
        fits: list[list[RidgeFit]] = []
        old = {path: self._parameter(projection.layer.index, path) for path in projection.paths.values()}
        for step in fit_steps(REPAIRS[repair], projection):
            sums, size, moment = self._sums(cut, projection, step, description)
            fits.append([fit_ridge(fitted, held_back, step.form) for fitted, held_back in sums])
            if any(fit.ridge is not None for fit in fits[-1]):
                self._fold(projection, step, fits[-1], moment)
        before, after = sum(fit.before for fit in fits[0]), sum(fit.after for fit in fits[-1])
        ridges = tuple(fit.ridge for fit in chain.from_iterable(fits))
        if len(fits[-1]) > 1:  # each alone: what they give together is less than the sum of their errors
            (((_, held_back),), _, _) = self._sums(cut, projection, REPAIRS["channel"], description)
            after = float(held_back.target)
        if after > before:  # before a norm, a fit is folded approximately
            after, ridges = before, (None,) * len(ridges)
            for path, value in old.items():
                self._source.changed[projection.layer.index, path] = value
        return RepairedCut(
            after=cut.after,
            removed=cut.removed,
            experts=cut.experts,
            ridges=ridges,
            error_before=(before / size) ** 0.5,
            error_after=(after / size) ** 0.5,
        )

    def _require_enough(self, projection: OutputProjection, repair: str) -> None:
        """Raise an error if there are too few tokens to fit to, or there is too little memory to fit in.

        Raises:
            CorpusError: there are too few tokens.
            PlanError: there is too little memory.
        """
        value = self._model.value(projection.layer.index, projection.paths["linear"])
        *_, inputs, outputs = shape = projection.values("linear", value.to("meta")).shape
        method = REPAIRS[repair]
        sizes = inputs, outputs, projection.chances
        needed = method.tokens_needed(*sizes)
        fewer = [name for name, other in REPAIRS.items() if other.tokens_needed(*sizes) < needed]
        instead = f"choose a `repair` of fewer unknowns ({', '.join(reversed(fewer))})" if fewer else ""
        num_tokens = sum(int(split.fitted[:, SINK_TOKENS:].sum()) for split in self._splits)
        if num_tokens < needed:
            raise CorpusError(
                f"The repair {repair} of this model needs at least {needed:,} tokens to fit to, not {num_tokens:,}.",
                "Give more text, raise `max_sequences`" + (f", or {instead}." if instead else "."),
            )
        fits = prod(shape[:-2]) if method.features == "inputs" else 1
        features = inputs if method.features == "inputs" else outputs
        size, room = NormalEquations.peak_bytes(features, outputs, fits), free_memory(value.device)
        if size > room:
            raise PlanError(
                f"The repair {repair} of layer {projection.layer.index} needs {describe_bytes(size)} of memory for the "
                f"products of {fits} x {features:,} inputs; {describe_bytes(room)} are free.",
                f"Use a machine with more memory, or {instead}." if instead else "Use a machine with more memory.",
            )

    def _sums(
        self, cut: RepairCut, projection: OutputProjection, step: RepairMethod, description: str
    ) -> tuple[list[tuple[NormalEquations, NormalEquations]], float, torch.Tensor]:
        """Sum the normal equations of a step over the text.

        Returns:
            For each matrix, the equations over the tokens to fit to and over the held-back tokens; the sum of |Y|^2
            over the held-back tokens, where Y are the whole model's hidden states; the mean of x^T x over the tokens
            to fit to, for the first matrix.
        """
        sums: list[NormalEquations] = []  # of each matrix in turn, over the tokens to fit to and the held-back ones
        numbers = torch.zeros(2, dtype=torch.float64)

        def add(
            number: int, whole: torch.Tensor, pruned: torch.Tensor, linear: CapturedCall, last: CapturedCall
        ) -> None:
            split, target = self._splits[number], whole.to(pruned.device).float()
            scale = split.sink_scale(target)
            masks = [torch.from_numpy(mask).to(target.device) for mask in (split.fitted, split.held_back)]
            missing = (scale * (target - pruned.float())).flatten(0, 1)
            features = features_of(step, projection, linear, last)
            if not sums:
                sizes = [(x.shape[1], missing.shape[1]) for x, *_ in features for _ in masks]
                sums.extend(NormalEquations.empty(*size, target.device) for size in sizes)
            for (i, (x, tokens, weights)), (j, mask) in product(enumerate(features), enumerate(masks)):
                if (counted := mask.flatten()[tokens]).any():
                    x, y, weight = scale.flatten(0, 1)[tokens] * x, missing[tokens], split.weight * weights
                    weight = weight if isinstance(weight, float) else weight[counted]
                    sums[2 * i + j] += NormalEquations.from_tokens(x[counted], y[counted], weight)
            numbers[0] += split.weight * float(scale[masks[0]].double().square().sum())
            numbers[1] += split.weight * float((scale * target)[masks[1]].double().square().sum())

        indices = tracked(self._model.local_indices(len(self._splits)), description)
        self._source.visit(projection, cut.last, add, indices, units=step.features == "inputs")
        counts = torch.tensor([part.count for part in sums], device=sums[0].gram.device)
        numbers = numbers.to(counts.device)
        parts = [tensor for part in sums for tensor in (part.gram, part.cross, part.target)]
        self._model.all_reduce([numbers, counts, *parts])
        sums = [replace(part, count=count) for part, count in zip(sums, counts.tolist(), strict=True)]
        counted, size = numbers.tolist()
        return list(zip(sums[::2], sums[1::2], strict=True)), size, sums[0].gram / counted

    def _fold(
        self, projection: OutputProjection, step: RepairMethod, fits: Sequence[RidgeFit], moment: torch.Tensor
    ) -> None:
        """Fold fits into the weights of a projection. ``moment`` is that of `fold`.

        Raises:
            PlanError: values do not fit into the dtype in which the files hold the parameter.
        """
        fitted = fits[0].weights if len(fits) == 1 else torch.stack([fit.weights for fit in fits])
        layer = projection.layer.index
        stored = {field: self._parameter(layer, path) for field, path in projection.paths.items()}
        old = {field: tensor.to(fitted.device, torch.float64) for field, tensor in stored.items()}
        weights = {field: projection.values(field, tensor) for field, tensor in old.items()}
        for field, value in fold(step, weights, fitted, moment, projection.factor).items():
            new = projection.stored(field, value, old[field]).to(stored[field].dtype).cpu().contiguous()
            if not torch.isfinite(new).all():
                raise PlanError(f"The repair of layer {layer} does not fit into {new.dtype}.", "Use another `repair`.")
            self._source.changed[layer, projection.paths[field]] = new

    def _parameter(self, layer: int, path: str) -> torch.Tensor:
        """Return a parameter with the changes so far, as it would be written.

        Raises:
            PlanError: the model does not hold it as the files do, or not on a device that computes.
        """
        if (changed := self._source.changed.get((layer, path))) is not None:
            return changed
        stored, loaded = self._stored.read((layer, path)), self._model.value(layer, path)
        if loaded.is_meta:
            raise PlanError(
                f"'{path}' of layer {layer} is kept off the devices that compute, and cannot be changed.",
                "Use `partition` single, or device_map with more `max_memory`.",
            )
        if (
            stored is not None
            and stored.is_floating_point()
            and stored.dtype.itemsize > 1
            and stored.shape == loaded.shape
            and torch.equal(stored.to(loaded.dtype), loaded.cpu())
        ):
            return stored
        form = "under other names" if stored is None else f"as {str(stored.dtype).removeprefix('torch.')}"
        raise PlanError(
            f"The files hold '{path}' of layer {layer} {form}, quantized, fused or otherwise unlike the model: nothing "
            "can be added to it.",
            PLAIN_HINT,
        )


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
    every_layer, settings = REPAIRS[repair.by].every_layer, repair.settings
    cuts = find_cuts(plan, every_layer=every_layer)
    splits = split_texts(texts, settings.batch_size, repair.weights)
    splits += [splits[0].uncounted()] * (-len(splits) % model.lockstep)
    source = HiddenStateSource(model, [split.batch for split in splits], plan.drop)
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
    first = [] if every_layer else [layer for layer in plan.dropped_layers if layer < plan.keep[0]]
    lost = f"Nothing stands before layers {describe_layers(first)}: what they did is not given back."
    return Repaired(source.changed, record, [lost] if first else [])


def tokens_needed(checkpoint: Checkpoint, repair: str, settings: Settings) -> int:
    """Return the minimum number of tokens to fit a repair to, at the layer that needs the fewest.

    Args:
        repair: one of `pruning.repair.registry.REPAIRS`.

    Returns:
        0 if only a pass over tokens can tell which modules are the layers.

    Raises:
        PlanError: no layer can hold the repair; the message says why.
        ModelError: the checkpoint cannot be read, or its model cannot be built.
    """
    model, _ = load_skeleton(checkpoint, settings)
    lists = candidate_layers(model, settings.layers)
    if len(lists) != 1:
        return 0
    ((path, layers),) = lists.items()
    text = model.config.get_text_config()
    changed = {i: weight for i, layer in enumerate(layers) if (weight := _changed_weight(layer, text.hidden_size))}
    if not changed:
        raise PlanError(
            f"No layer of '{checkpoint.name}' has an MLP that ends in one linear map, or in those of its routed "
            "experts: what is missing after it cannot be given back.",
            "Set `repair` to none.",
        )
    weights = StoredWeights.of_checkpoint(
        checkpoint, Plan(model=checkpoint.name, num_layers=len(layers), layers=path, drop=(0,)), settings
    )
    names = [weights.names((layer, path))[0] for layer, (path, _) in changed.items()]
    stored = {name: weights.tensors[name].dtype for name in names if name in weights.tensors}
    dtypes = [DTYPES[dtype] for dtype in stored.values() if dtype in DTYPES]
    if not any(dtype.is_floating_point and dtype.itemsize > 1 for dtype in dtypes):
        form = f"as {stored[names[0]]}" if names[0] in stored else "under other names"
        raise PlanError(
            f"The files of '{checkpoint.name}' hold '{names[0]}' {form}, quantized or fused: "
            "nothing can be added to it.",
            PLAIN_HINT,
        )
    return min(REPAIRS[repair].tokens_needed(*sizes) for _, sizes in changed.values())


def _changed_weight(layer: nn.Module, width: int) -> tuple[str, tuple[int, int, float]] | None:
    """Return the weight of a layer that a repair changes, or None if it has none.

    Args:
        layer: the module, which may be on the meta device.
        width: units of the residual stream.

    Returns:
        Path below the layer; inputs and outputs of the linear map, and the share of the tokens that reach it.
    """
    with suppress(ModelError):
        routed = find_routed_experts(layer)
        if routed and (down := find_down_projections(layer.get_submodule(routed.experts))):
            experts, units, outputs = down.as_rows(down.module.get_parameter(down.WEIGHT)).shape
            return f"{routed.experts}.{down.WEIGHT}", (units, outputs, routed.top_k / experts)
    if linear := find_down_projection(layer, width):
        path, module = linear
        return f"{path}.weight", (*linear_sizes(module), 1.0)
    return None
