"""Fits of a repair to cuts, one after the other, and the weights that they change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from avss_dist.core.devices import free_memory
from avss_dist.core.errors import CorpusError
from avss_dist.core.streams import tracked
from avss_dist.core.text import describe_bytes
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.change.patches import Patch
from avss_dist.plans.choice import PlanError
from avss_dist.pruning.repair.cuts import RepairCut
from avss_dist.pruning.repair.fits import NormalEquations, RidgeFit, fit_ridge, fit_steps, fold
from avss_dist.pruning.repair.hidden_states import HiddenStateSource
from avss_dist.pruning.repair.neuron_choice import number_of_pieces, spare_columns
from avss_dist.pruning.repair.neurons import NeuronBank
from avss_dist.pruning.repair.projection import OutputProjection
from avss_dist.pruning.repair.registry import REPAIRS, RepairedCut, RepairMethod
from avss_dist.pruning.repair.splits import FitSplit
from avss_dist.pruning.repair.sums import StepSums
from avss_dist.pruning.weights import StoredWeights

PLAIN_HINT = (
    "Repair the checkpoint that it was quantized from, and quantize the result; or save it again with transformers' "
    "save_pretrained, if it is not quantized."
)
FACTORIZATIONS = 8
"""Cholesky factorizations of a fit, about: with a few ridges, and for the choice of neurons. An inverse takes two."""
FLOAT64_OPERATIONS = 4
"""Operations in float32 that take the time of one in float64 in a factorization, about."""


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
        pieces: number of times that they are added up, each with other features.
    """

    fits: int
    features: int
    outputs: int
    pieces: int = 1

    def __str__(self) -> str:
        """Return their shape in words."""
        return f"{self.fits} x {self.features:,} inputs"

    @property
    def num_bytes(self) -> int:
        """Memory at the peak of a fit."""
        return NormalEquations.peak_bytes(self.features, self.outputs, self.fits)

    def operations(self, tokens: float) -> float:
        """Return the floating-point operations of the fits beside passes, about, as the number in float32.

        Args:
            tokens: tokens that reach each matrix.
        """
        adding = 2 * tokens * self.features**2
        solving = FLOAT64_OPERATIONS * FACTORIZATIONS * self.features**3 / 3
        return self.pieces * self.fits * (adding + solving)


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
    if not method.borrows:
        return Products(1, inputs, outputs)
    pool = lenders * inputs
    spare = spare_columns(inputs, outputs)
    return Products(1, inputs + min(pool, spare), outputs, number_of_pieces(pool, spare))


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
        fit = self._fit(cut, projection, REPAIRS[repair], description)
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

    def _fit(self, cut: RepairCut, projection: OutputProjection, method: RepairMethod, description: str) -> CutFit:
        """Fit a repair to one cut, and change weights of its layer, whether or not that helps."""
        return self._fit_steps(cut, projection, fit_steps(method, projection), description)

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

    def _restore(self, changed: Patch) -> None:
        """Make changed parameters of the pruned model those of an earlier time."""
        self._source.changed.clear()
        self._source.changed.update(changed)

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
            if holds_sums(stored.dtype) and stored.shape == loaded.shape:
                if torch.equal(stored.to(loaded.dtype), loaded.cpu()):
                    return stored
        raise PlanError(
            f"The files hold '{path}' of layer {layer} {form}, quantized, fused or otherwise unlike the model: nothing "
            "can be added to it.",
            PLAIN_HINT,
        )


def holds_sums(dtype: torch.dtype) -> bool:
    """Whether parameters of a dtype can be added to: quantized ones have integers, or floats of a byte."""
    return dtype.is_floating_point and dtype.itemsize > 1
