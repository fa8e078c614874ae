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

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated

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
from avss_dist.models.change.patches import Patch
from avss_dist.models.checkpoint.loading import candidate_layers
from avss_dist.models.checkpoint.locate import Checkpoint
from avss_dist.models.checkpoint.safetensors import DTYPES
from avss_dist.models.checkpoint.size import load_skeleton
from avss_dist.models.structure.down_projections import find_down_projections
from avss_dist.models.structure.experts import find_routed_experts
from avss_dist.models.structure.find import find_down_projection
from avss_dist.models.structure.layers import linear_sizes
from avss_dist.plans.choice import PlanError
from avss_dist.plans.plan import Plan
from avss_dist.pruning.repair.borrow import (
    NeuronFit,
    choose_neurons,
    largest_errors,
    removal_errors,
    spare_columns,
)
from avss_dist.pruning.repair.fits import NormalEquations, RidgeFit, features_of, fit_ridge, fit_steps, fold
from avss_dist.pruning.repair.hidden_states import CutStates, HiddenStateSource
from avss_dist.pruning.repair.neurons import BorrowedNeurons, NeuronBank, NotBorrowed, Recipient
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
from avss_dist.pruning.weights import StoredWeights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HELD_BACK = 10
"""One row of this many is held back, the last ones of each text."""
SINK_TOKENS = 1
"""Leading tokens of every row that are attention sinks, whose hidden states are unlike all others."""
ROUNDS_BEFORE_NORM = 3
"""Maximum number of rounds in which weights before a norm and its gain are fitted in turn."""
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
        for corpus in self.corpora:
            split_weight(corpus)  # It refuses a weight of 0.

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
    changed = [layer - 1 for layer in plan.dropped_layers]
    changed += list(plan.experts)
    first = min(changed)
    remaining = [layer for layer in plan.keep if layer >= first]
    cuts = []
    for layer, following in pairwise([*remaining, plan.num_layers]):
        cut = RepairCut(layer, removed=tuple(range(layer + 1, following)), experts=plan.experts.get(layer, ()))
        if every_layer or cut.removed or cut.experts:
            cuts.append(cut)
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

    @property
    def num_fitted(self) -> int:
        """Number of tokens to fit to, without sink tokens."""
        return int(self.fitted[:, SINK_TOKENS:].sum())

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
        # A sink token may have the length 0.
        tiny = torch.finfo(lengths.dtype).tiny
        scale = torch.ones_like(lengths)
        scale[:, :SINK_TOKENS] = mean[:, None] / lengths[:, :SINK_TOKENS].clamp_min(tiny)
        return scale[..., None]


def split_texts(texts: Sequence[CorpusPlan], batch_size: int, weights: Sequence[float] | None = None) -> list[FitSplit]:
    """Return the batches of texts, in order.

    Args:
        weights: relative weight of each text; equal by default.

    Raises:
        CorpusError: a text has only one row, or no token to fit to.
    """
    splits: list[FitSplit] = []
    for number, text in enumerate(texts):
        splits += _split_text(number, text, batch_size)
    counts = count_fitted(splits, len(texts))
    for text, count in zip(texts, counts, strict=True):
        if not count:
            raise CorpusError(
                f"{text.source} has no token to fit to after the first of each row (rows: {text.num_sequences}).",
                "Name a longer text, or raise `max_sequences`.",
            )
    weights = weights or [1.0] * len(texts)
    mean_count = sum(counts) / len(counts)
    token_weights = []
    for count, weight in zip(counts, weights, strict=True):
        relative_weight = weight * len(weights) / sum(weights)
        token_weights.append(mean_count / count * relative_weight)
    return [replace(split, weight=token_weights[split.text]) for split in splits]


def _split_text(number: int, text: CorpusPlan, batch_size: int) -> Iterator[FitSplit]:
    """Yield the batches of a text, whose last rows are held back. Tokens have the weight 1.

    Args:
        number: index of the text.
    """
    num_held_back = math.ceil(text.num_sequences / HELD_BACK)
    first_held_back = text.num_sequences - num_held_back
    row = 0
    for shard in text.shards:
        for batch in shard.batches(batch_size):
            counted = batch.observed.copy()
            # The length of sink tokens is that of other tokens of their rows, without which they do not count.
            counted[:, :SINK_TOKENS] &= counted[:, SINK_TOKENS:].any(1, keepdims=True)
            rows = np.arange(row, row + len(counted))[:, None]
            is_held_back = rows >= first_held_back
            yield FitSplit(number, batch, fitted=counted & ~is_held_back, held_back=counted & is_held_back, weight=1.0)
            row += len(counted)


def count_fitted(splits: Sequence[FitSplit], texts: int) -> list[int]:
    """Return the number of tokens to fit to of each text, without sink tokens."""
    counts = [0] * texts
    for split in splits:
        counts[split.text] += split.num_fitted
    return counts


@dataclass(eq=False)
class MatrixSums:
    """Normal equations of one matrix of a fit, to which batches are added.

    Attributes:
        fitted: sums over the tokens to fit to.
        held_back: sums over the held-back tokens.
    """

    fitted: NormalEquations
    held_back: NormalEquations


class StepSums:
    """Sums over the text that one step of a repair is fitted from, to which batches are added.

    Attributes:
        matrices: normal equations of each matrix.
        fitted_count: number of tokens to fit to, by their weights and squared factors of `FitSplit.sink_scale`.
        whole_size: sum of |Y|^2 over the held-back tokens, where Y are the whole model's hidden states.
    """

    def __init__(self, projection: OutputProjection, step: RepairMethod, splits: Sequence[FitSplit]) -> None:
        self._projection = projection
        self._step = step
        self._splits = splits
        self.matrices: list[MatrixSums] = []
        self.fitted_count = 0.0
        self.whole_size = 0.0

    @property
    def moment(self) -> torch.Tensor:
        """Mean of x^T x over the tokens to fit to, where x are the features of the first matrix."""
        return self.matrices[0].fitted.gram / self.fitted_count

    def add(self, number: int, states: CutStates) -> None:
        """Add a batch.

        Args:
            number: index of the batch.
            states: its hidden states at the cut.
        """
        split = self._splits[number]
        target = states.whole.to(states.pruned.device).float()
        scale = split.sink_scale(target)
        missing = (scale * (target - states.pruned.float())).flatten(0, 1)
        fitted = torch.from_numpy(split.fitted).to(target.device)
        held_back = torch.from_numpy(split.held_back).to(target.device)
        features = features_of(self._step, self._projection, states.linear, states.last, states.borrowed)
        if not self.matrices:
            self.matrices = [_no_sums(part.inputs.shape[1], missing) for part in features]
        for matrix, part in zip(self.matrices, features, strict=True):
            inputs = scale.flatten(0, 1)[part.tokens] * part.inputs
            outputs = missing[part.tokens]
            weights = split.weight * part.weights
            is_fitted = fitted.flatten()[part.tokens]
            matrix.fitted = _with_counted(matrix.fitted, is_fitted, inputs, outputs, weights)
            is_held_back = held_back.flatten()[part.tokens]
            matrix.held_back = _with_counted(matrix.held_back, is_held_back, inputs, outputs, weights)
        self.fitted_count += split.weight * float(scale[fitted].double().square().sum())
        self.whole_size += split.weight * float((scale * target)[held_back].double().square().sum())

    def all_reduce(self, model: LanguageModel) -> None:
        """Sum over the copies of the model that share the batches. A collective: all copies call it."""
        device = self.matrices[0].fitted.gram.device
        sizes = torch.tensor([self.fitted_count, self.whole_size], dtype=torch.float64, device=device)
        counts = [[matrix.fitted.count, matrix.held_back.count] for matrix in self.matrices]
        summed_counts = torch.tensor(counts, device=device)
        tensors = [sizes, summed_counts]
        for matrix in self.matrices:
            for part in (matrix.fitted, matrix.held_back):
                tensors += [part.gram, part.cross, part.target]
        model.all_reduce(tensors)  # It changes them in place.
        self.fitted_count, self.whole_size = sizes.tolist()
        for matrix, (fitted_count, held_back_count) in zip(self.matrices, summed_counts.tolist(), strict=True):
            matrix.fitted = replace(matrix.fitted, count=fitted_count)
            matrix.held_back = replace(matrix.held_back, count=held_back_count)


def _with_counted(
    sums: NormalEquations,
    counted: torch.Tensor,
    inputs: torch.Tensor,
    outputs: torch.Tensor,
    weights: torch.Tensor | float,
) -> NormalEquations:
    """Return sums with those of more tokens.

    Args:
        counted: bool[tokens], whether each token counts.
        inputs, outputs, weights: as for `NormalEquations.from_tokens`.
    """
    if not counted.any():
        return sums
    if isinstance(weights, torch.Tensor):
        weights = weights[counted]
    return sums + NormalEquations.from_tokens(inputs[counted], outputs[counted], weights)


def _no_sums(inputs: int, missing: torch.Tensor) -> MatrixSums:
    """Return the sums over no token for a matrix with this number of inputs. Its outputs are those of ``missing``."""
    outputs = missing.shape[1]
    return MatrixSums(
        fitted=NormalEquations.empty(inputs, outputs, missing.device),
        held_back=NormalEquations.empty(inputs, outputs, missing.device),
    )


@dataclass(frozen=True)
class CutFit:
    """Fit of one cut.

    Attributes:
        ridges: see `RepairedCut`.
        before, after: sums of squares of what is missing on held-back tokens, without the fit and with it.
        whole_size: see `StepSums`.
        borrowed: see `RepairedCut`.
    """

    ridges: tuple[float | None, ...]
    before: float
    after: float
    whole_size: float
    borrowed: int = 0

    def undone(self) -> CutFit:
        """Return the same fit without an effect."""
        return CutFit((None,) * len(self.ridges), self.before, self.before, self.whole_size)


@dataclass(frozen=True)
class Products:
    """Products that the fit of a step adds up over tokens.

    Attributes:
        fits: number of matrices that are fitted.
        features: features of each.
        outputs: outputs of each.
    """

    fits: int
    features: int
    outputs: int

    def __str__(self) -> str:
        """Return their shape in words."""
        return f"{self.fits} x {self.features:,} inputs"

    @property
    def num_bytes(self) -> int:
        """Memory at the peak of a fit."""
        return NormalEquations.peak_bytes(self.features, self.outputs, self.fits)


def products_of(method: RepairMethod, inputs: int, outputs: int, *, experts: int, lenders: int) -> Products:
    """Return the products of a repair at a layer.

    Args:
        inputs, outputs: sizes of the MLP's last linear map, or of that of each expert.
        experts: number of remaining routed experts; 0 for a linear map.
        lenders: number of removed layers whose neurons the layer could borrow.
    """
    if method.features == "output":
        return Products(1, outputs, outputs)
    if experts:
        return Products(experts, inputs, outputs)
    features = inputs
    if method.borrows:
        features += min(lenders * inputs, spare_columns(inputs, outputs))
    return Products(1, features, outputs)


def _alternative(repairs: Sequence[str]) -> str:
    """Return the end of a hint with repairs that take less, from the most unknowns to the fewest."""
    if not repairs:
        return ""
    return f", or choose a `repair` of fewer unknowns ({', '.join(reversed(repairs))})"


class RepairFitter:
    """Fits a repair to cuts in order of depth. Each fit sees the changes of the earlier ones.

    Args:
        source: hidden states of both models.
        stored: weights of the checkpoint's files.
        splits: calibration text.
        model: several copies of it, or ranks that hold it together, share the batches.

    Attributes:
        notes: remarks for people on what was fitted.
    """

    def __init__(
        self, source: HiddenStateSource, stored: StoredWeights, splits: Sequence[FitSplit], model: LanguageModel
    ) -> None:
        self._source = source
        self._stored = stored
        self._splits = splits
        self._model = model
        self.notes: list[str] = []

    def fit_all(self, cuts: Sequence[RepairCut], repair: str) -> list[RepairedCut]:
        """Fit a repair to cuts, in order. Cuts that cannot be fitted are refused before the first fit.

        Args:
            repair: one of `pruning.repair.registry.REPAIRS`.

        Raises:
            PlanError: the weights of a cut cannot be changed, see `_parameter`.
            CorpusError: there are too few tokens to fit to.
        """
        projections = [self._source.output_projection(cut.after) for cut in cuts]
        for cut, projection in zip(cuts, projections, strict=True):
            self._require_enough(cut, projection, repair)
            for path in projection.paths.values():
                self._parameter(projection.layer.index, path)
        repaired: list[RepairedCut] = []
        for cut, projection in zip(cuts, projections, strict=True):
            description = f"Repairing cut {len(repaired) + 1} of {len(cuts)}"
            repaired.append(self.fit(cut, projection, repair, description))
        return repaired

    def fit(self, cut: RepairCut, projection: OutputProjection, repair: str, description: str) -> RepairedCut:
        """Fit a repair to one cut and change the weights of its layer.

        The weights stay as they are if the fit does not help on held-back tokens.

        Args:
            description: text of the progress bar.
        """
        layer = projection.layer.index
        old = {path: self._parameter(layer, path) for path in projection.paths.values()}
        before_fit = dict(self._source.changed)
        fit = None
        if REPAIRS[repair].borrows:
            fit = self._borrow(cut, projection, repair, description)
        if fit is None:
            fit = self._fit_steps(cut, projection, fit_steps(REPAIRS[repair], projection), description)
        if fit.after > fit.before:
            # Before a norm, a fit is folded approximately, and may do harm. It is undone.
            fit = fit.undone()
            self._restore(before_fit)
            for path, value in old.items():
                self._source.changed[layer, path] = value
        return RepairedCut(
            after=cut.after,
            removed=cut.removed,
            experts=cut.experts,
            ridges=fit.ridges,
            error_before=(fit.before / fit.whole_size) ** 0.5,
            error_after=(fit.after / fit.whole_size) ** 0.5,
            borrowed=fit.borrowed,
        )

    def _fit_steps(
        self, cut: RepairCut, projection: OutputProjection, steps: Sequence[RepairMethod], description: str
    ) -> CutFit:
        """Fit one step after the other, and change the weights of the projection."""
        fits_by_step: list[list[RidgeFit]] = []
        ridges: list[float | None] = []
        for step in steps:
            sums = self._sums(cut, projection, step, description)
            fits = [fit_ridge(matrix.fitted, matrix.held_back, step.form) for matrix in sums.matrices]
            if any(fit.ridge is not None for fit in fits):
                self._fold(projection, step, fits, sums.moment)
            fits_by_step.append(fits)
            ridges += [fit.ridge for fit in fits]
        before = sum(fit.before for fit in fits_by_step[0])
        after = sum(fit.after for fit in fits_by_step[-1])
        if len(fits_by_step[-1]) > 1:
            # Experts are fitted one by one. What is missing once all are changed is less than the sum of their errors.
            changed_sums = self._sums(cut, projection, REPAIRS["channel"], description)
            after = float(changed_sums.matrices[0].held_back.target)
        return CutFit(tuple(ridges), before, after, sums.whole_size)

    def _require_enough(self, cut: RepairCut, projection: OutputProjection, repair: str) -> None:
        """Raise an error if there are too few tokens to fit to, or there is too little memory to fit in.

        Raises:
            CorpusError: there are too few tokens.
            PlanError: there is too little memory.
        """
        value = self._model.value(projection.layer.index, projection.paths["linear"])
        shape = projection.values("linear", value.to("meta")).shape
        inputs, outputs = shape[-2:]
        chances = projection.chances
        method = REPAIRS[repair]
        needed = method.tokens_needed(inputs, outputs, chances)
        fewer = [name for name, other in REPAIRS.items() if other.tokens_needed(inputs, outputs, chances) < needed]
        alternative = _alternative(fewer)
        num_tokens = sum(split.num_fitted for split in self._splits)
        if num_tokens < needed:
            raise CorpusError(
                f"The repair {repair} of this model needs at least {needed:,} tokens to fit to, not {num_tokens:,}.",
                f"Give more text, raise `max_sequences`{alternative}.",
            )
        experts = shape[0] if projection.down else 0
        products = products_of(method, inputs, outputs, experts=experts, lenders=len(cut.removed))
        if method.borrows:
            alternative = _alternative([*fewer, "refit"])
        room = free_memory(value.device)
        if products.num_bytes > room:
            raise PlanError(
                f"The repair {repair} of layer {projection.layer.index} needs {describe_bytes(products.num_bytes)} of "
                f"memory for the products of {products}; {describe_bytes(room)} are free.",
                f"Use a machine with more memory{alternative}.",
            )

    def _borrow(self, cut: RepairCut, projection: OutputProjection, repair: str, description: str) -> CutFit | None:
        """Fit the layer before a cut with neurons of the removed layers in place of its least useful ones.

        Returns:
            None if there are none that it could borrow, or if none helps before a norm.
        """
        recipient, pool = self._find_neurons(cut, projection)
        if recipient is None or pool is None:
            return None
        unchanged = dict(self._source.changed)
        self._source.changed.update(recipient.changed)
        pool, sums = self._preselect(cut, projection, REPAIRS[repair], recipient, pool, description)
        (matrix,) = sums.matrices
        number = recipient.neurons.number
        start = self._start(projection, len(pool), matrix.fitted.gram.device)
        constants = len(start) - number - len(pool)
        choice = choose_neurons(matrix.fitted, matrix.held_back, start, number, constants)
        before = float(matrix.held_back.target)
        borrowed = 0
        if choice.fit.ridge is not None:
            borrowed = self._fold_neurons(projection, REPAIRS[repair], recipient, pool, choice, sums.moment)
        if not borrowed:
            for parameter in recipient.changed:
                del self._source.changed[parameter]
            if projection.norm is not None:
                self._restore(unchanged)
                return None
        fit = CutFit((choice.fit.ridge,), before, choice.fit.after, sums.whole_size, borrowed)
        if borrowed and projection.norm is not None:
            return self._borrow_before_norm(cut, projection, fit, unchanged, description)
        return fit

    def _borrow_before_norm(
        self,
        cut: RepairCut,
        projection: OutputProjection,
        fit: CutFit,
        unchanged: Patch,
        description: str,
    ) -> CutFit:
        """Fit the gain of the norm after an MLP with borrowed neurons, and then weights and gain in turn.

        A fit to weights takes the length of each token for that of the last round. A round that does not help on
        held-back tokens is undone. Without borrowed neurons, the length changes less: the better of both fits stays.

        Args:
            fit: fit of the neurons, whose weights are those of the model.
            unchanged: changed parameters before this fit.
        """
        ridges = fit.ridges
        gain = self._fit_steps(cut, projection, [REPAIRS["channel"]], description)
        ridges += gain.ridges
        after = gain.after
        steps = [REPAIRS["refit"], REPAIRS["channel"]]
        for _ in range(ROUNDS_BEFORE_NORM):
            last = dict(self._source.changed)
            turn = self._fit_steps(cut, projection, steps, description)
            if turn.after >= after:
                self._restore(last)
                break
            after = turn.after
            ridges += turn.ridges
        borrowing = dict(self._source.changed)
        self._restore(unchanged)
        refit = self._fit_steps(cut, projection, steps, description)
        if refit.after <= after:
            return refit
        self._restore(borrowing)
        return replace(fit, ridges=ridges, after=after)

    def _restore(self, changed: Patch) -> None:
        """Make changed parameters of the pruned model those of an earlier time."""
        self._source.changed.clear()
        self._source.changed.update(changed)

    def _find_neurons(
        self, cut: RepairCut, projection: OutputProjection
    ) -> tuple[Recipient | None, BorrowedNeurons | None]:
        """Return the MLP before a cut and the neurons of the removed layers that it could borrow, and note others."""
        layer = projection.layer
        if not cut.removed:
            return None, None
        neurons = None
        if projection.down is None:
            neurons = self._source.neurons(layer.index)
        if neurons is None:
            self.notes.append(f"{layer} borrows no neurons: its MLP has none with rows of their own.")
            return None, None
        recipient = Recipient(neurons, self._parameter)
        parts = []
        for removed in cut.removed:
            try:
                parts.append(self._borrow_from(recipient, removed))
            except NotBorrowed as error:
                self.notes.append(f"{layer} borrows no neurons of layer {removed}: {error}.")
        if not parts:
            return recipient, None
        return recipient, BorrowedNeurons.joined(parts)

    def _borrow_from(self, recipient: Recipient, removed: int) -> BorrowedNeurons:
        """Return the neurons of a removed layer as rows of another one.

        Raises:
            NotBorrowed: they would be others there.
        """
        donor = self._source.neurons(removed)
        if donor is None:
            raise NotBorrowed("its MLP has none with rows of their own")
        borrowed = recipient.borrowed_from(donor)
        if not self._source.have_the_same_values(recipient, donor, borrowed):
            raise NotBorrowed("its activation function or its norm is another one")
        return borrowed

    def _start(self, projection: OutputProjection, borrowed: int, device: torch.device) -> torch.Tensor:
        """Return what each feature of a fit with borrowed neurons adds before the fit, float64[features, channels]."""
        weights = self._weights(projection, device)
        linear = weights["linear"]
        start = [linear, linear.new_zeros(borrowed, linear.shape[1])]
        if "bias" in weights:
            start.append(weights["bias"][None])
        gain = weights.get("gain")
        if gain is None:
            return torch.cat(start)
        return torch.cat(start) * gain

    def _preselect(
        self,
        cut: RepairCut,
        projection: OutputProjection,
        step: RepairMethod,
        recipient: Recipient,
        pool: BorrowedNeurons,
        description: str,
    ) -> tuple[BorrowedNeurons, StepSums]:
        """Return the neurons of a pool whose products fit into memory, and the sums with them.

        They are compared in pieces. The best ones of a piece are compared with the next piece.
        """
        number = recipient.neurons.number
        spare = spare_columns(number, recipient.neurons.width)
        best = pool[:0]
        while True:
            room = spare - len(best)
            piece = BorrowedNeurons.joined([best, pool[:room]])
            pool = pool[room:]
            sums = self._sums(cut, projection, step, description, recipient.banks(piece))
            if not len(pool):
                return piece, sums
            (matrix,) = sums.matrices
            start = self._start(projection, len(piece), matrix.fitted.gram.device)
            errors = removal_errors(matrix.fitted, matrix.held_back, start)
            best = piece[largest_errors(errors[number : number + len(piece)], spare // 2).cpu()]

    def _fold_neurons(
        self,
        projection: OutputProjection,
        step: RepairMethod,
        recipient: Recipient,
        pool: BorrowedNeurons,
        choice: NeuronFit,
        moment: torch.Tensor,
    ) -> int:
        """Change the rows of the neurons that are replaced, and the weights of all. Return the number of borrowed ones.

        Args:
            choice: neurons that stay, of the recipient's own and those of the pool.
            moment: that of `fold`, of all features.
        """
        device = moment.device
        number = recipient.neurons.number
        features = choice.features(number)
        replaced = torch.where(features[:number] >= number)[0]
        borrowed = features[replaced] - number
        weights = self._weights(projection, device)
        start = torch.cat([weights["linear"], weights["linear"].new_zeros(len(pool), weights["linear"].shape[1])])
        if "bias" in weights:
            start = torch.cat([start, weights["bias"][None]])
        folding = {"linear": start[features]}
        if "gain" in weights:
            folding["gain"] = weights["gain"]
        fitted = choice.fit.weights[torch.searchsorted(choice.columns, features)]
        values = fold(step, folding, fitted, moment[features[:, None], features], projection.factor)
        if "bias" in weights:
            values["bias"] = values["linear"][number]
            values["linear"] = values["linear"][:number]
        self._write(projection, values)
        if len(replaced):
            self._source.changed.update(recipient.patch(pool[borrowed.cpu()], replaced.cpu()))
        return len(replaced)

    def _sums(
        self,
        cut: RepairCut,
        projection: OutputProjection,
        step: RepairMethod,
        description: str,
        banks: Sequence[NeuronBank] = (),
    ) -> StepSums:
        """Return the sums over the text that a step is fitted from, the same on all copies of the model."""
        sums = StepSums(projection, step, self._splits)
        numbers = tracked(self._model.local_indices(len(self._splits)), description)
        self._source.visit(projection, cut.last, sums.add, numbers, units=step.features == "inputs", banks=banks)
        sums.all_reduce(self._model)
        return sums

    def _fold(
        self, projection: OutputProjection, step: RepairMethod, fits: Sequence[RidgeFit], moment: torch.Tensor
    ) -> None:
        """Fold fits into the weights of a projection. ``moment`` is that of `fold`.

        Raises:
            PlanError: values do not fit into the dtype in which the files hold the parameter.
        """
        if len(fits) == 1:
            fitted = fits[0].weights
        else:
            fitted = torch.stack([fit.weights for fit in fits])
        weights = self._weights(projection, fitted.device)
        self._write(projection, fold(step, weights, fitted, moment, projection.factor))

    def _weights(self, projection: OutputProjection, device: torch.device | None = None) -> dict[str, torch.Tensor]:
        """Return the weights of a projection as `fold` takes them."""
        weights = {}
        for field, path in projection.paths.items():
            stored = self._parameter(projection.layer.index, path)
            weights[field] = projection.values(field, stored.to(device, torch.float64))
        return weights

    def _write(self, projection: OutputProjection, values: Mapping[str, torch.Tensor]) -> None:
        """Change the weights of a projection. ``values`` are those that `fold` returns.

        Raises:
            PlanError: values do not fit into the dtype in which the files hold the parameter.
        """
        layer = projection.layer.index
        for field, value in values.items():
            stored = self._parameter(layer, projection.paths[field])
            old = stored.to(value.device, torch.float64)
            new = projection.stored(field, value, old).to(stored.dtype).cpu().contiguous()
            if not torch.isfinite(new).all():
                raise PlanError(f"The repair of layer {layer} does not fit into {new.dtype}.", "Use another `repair`.")
            self._source.changed[layer, projection.paths[field]] = new

    def _parameter(self, layer: int, path: str) -> torch.Tensor:
        """Return a parameter with the changes so far, as it would be written.

        Raises:
            PlanError: the model does not hold it as the files do, or not on a device that computes.
        """
        changed = self._source.changed.get((layer, path))
        if changed is not None:
            return changed
        stored = self._stored.read((layer, path))
        loaded = self._model.value(layer, path)
        if loaded.is_meta:
            raise PlanError(
                f"'{path}' of layer {layer} is kept off the devices that compute, and cannot be changed.",
                "Use `partition` single, or device_map with more `max_memory`.",
            )
        form = "under other names"
        if stored is not None:
            form = f"as {str(stored.dtype).removeprefix('torch.')}"
            if _holds_sums(stored.dtype) and stored.shape == loaded.shape:
                if torch.equal(stored.to(loaded.dtype), loaded.cpu()):
                    return stored
        raise PlanError(
            f"The files hold '{path}' of layer {layer} {form}, quantized, fused or otherwise unlike the model: nothing "
            "can be added to it.",
            PLAIN_HINT,
        )


def _holds_sums(dtype: torch.dtype) -> bool:
    """Whether parameters of a dtype can be added to: quantized ones have integers, or floats of a byte."""
    return dtype.is_floating_point and dtype.itemsize > 1


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
    fitter = RepairFitter(source, stored, splits, model)
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
    changed = _changed_weights(checkpoint, model, layers)
    plan = Plan(model=checkpoint.name, num_layers=len(layers), layers=path, drop=(0,))
    weights = StoredWeights.of_checkpoint(checkpoint, plan, settings)
    names = [weights.names((layer, weight.path))[0] for layer, weight in changed.items()]
    stored = {name: weights.tensors[name].dtype for name in names if name in weights.tensors}
    dtypes = [DTYPES[dtype] for dtype in stored.values() if dtype in DTYPES]
    if not any(_holds_sums(dtype) for dtype in dtypes):
        name = names[0]
        form = f"as {stored[name]}" if name in stored else "under other names"
        raise PlanError(
            f"The files of '{checkpoint.name}' hold '{name}' {form}, quantized or fused: nothing can be added to it.",
            PLAIN_HINT,
        )
    method = REPAIRS[repair]
    return min(method.tokens_needed(weight.inputs, weight.outputs, weight.chances) for weight in changed.values())


@dataclass(frozen=True, kw_only=True)
class RepairCost:
    """Text and memory that the fit of a repair takes, beside the model and its hidden states.

    Attributes:
        repair: its name.
        tokens: minimum number of tokens to fit to, at the layer that needs the fewest.
        num_bytes: memory of the products at the largest layer, after which as many layers are removed as possible.
        why: the products in words.
    """

    repair: str
    tokens: int
    num_bytes: int
    why: str


def repair_cost(checkpoint: Checkpoint, repair: str, settings: Settings) -> RepairCost:
    """Return the cost of a repair from the configuration of a checkpoint.

    Raises:
        PlanError: no layer can hold the repair, or only a pass over tokens can tell which modules are the layers.
        ModelError: the checkpoint cannot be read, or its model cannot be built.
    """
    model, _ = load_skeleton(checkpoint, settings)
    lists = candidate_layers(model, settings.layers)
    if len(lists) != 1:
        raise PlanError(f"'{checkpoint.name}' has several lists of layers: {', '.join(lists)}.", "Set `layers`.")
    ((_, layers),) = lists.items()
    method = REPAIRS[repair]
    lenders = len(layers) - 1
    tokens = []
    largest = Products(0, 0, 0)
    for weight in _changed_weights(checkpoint, model, layers).values():
        tokens.append(method.tokens_needed(weight.inputs, weight.outputs, weight.chances))
        products = products_of(method, weight.inputs, weight.outputs, experts=weight.experts, lenders=lenders)
        if products.num_bytes > largest.num_bytes:
            largest = products
    return RepairCost(repair=repair, tokens=min(tokens), num_bytes=largest.num_bytes, why=str(largest))


def _changed_weights(checkpoint: Checkpoint, model: PreTrainedModel, layers: nn.ModuleList) -> dict[int, ChangedWeight]:
    """Return the weight of each layer that a repair changes.

    Raises:
        PlanError: there is none.
    """
    width = model.config.get_text_config().hidden_size
    changed: dict[int, ChangedWeight] = {}
    for index, layer in enumerate(layers):
        if weight := _changed_weight(layer, width):
            changed[index] = weight
    if not changed:
        raise PlanError(
            f"No layer of '{checkpoint.name}' has an MLP that ends in one linear map, or in those of its routed "
            "experts: what is missing after it cannot be given back.",
            "Set `repair` to none.",
        )
    return changed


@dataclass(frozen=True)
class ChangedWeight:
    """The weight of a layer that a repair changes.

    Attributes:
        path: path below the layer.
        inputs, outputs: sizes of the linear map, or of that of each expert.
        chances: share of the tokens that reach a linear map.
        experts: number of routed experts; 0 for a linear map.
    """

    path: str
    inputs: int
    outputs: int
    chances: float = 1.0
    experts: int = 0


def _changed_weight(layer: nn.Module, width: int) -> ChangedWeight | None:
    """Return the weight of a layer that a repair changes, or None if it has none.

    Args:
        layer: the module, which may be on the meta device.
        width: units of the residual stream.
    """
    with suppress(ModelError):
        if weight := _experts_weight(layer):
            return weight
    linear = find_down_projection(layer, width)
    if linear is None:
        return None
    path, module = linear
    inputs, outputs = linear_sizes(module)
    return ChangedWeight(f"{path}.weight", inputs, outputs)


def _experts_weight(layer: nn.Module) -> ChangedWeight | None:
    """Return the weight of the routed experts of a layer, or None if it has none that is known.

    Raises:
        ModelError: as `find_routed_experts`.
    """
    routed = find_routed_experts(layer)
    if routed is None:
        return None
    down = find_down_projections(layer.get_submodule(routed.experts))
    if down is None:
        return None
    experts, units, outputs = down.as_rows(down.module.get_parameter(down.WEIGHT)).shape
    return ChangedWeight(f"{routed.experts}.{down.WEIGHT}", units, outputs, routed.top_k / experts, experts)
