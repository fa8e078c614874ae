"""Fits a repair to the cuts of an open model, one after the other; see `repair`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch

from avss_dist.core.errors import CorpusError
from avss_dist.core.text import describe_bytes, describe_layers
from avss_dist.models.patching import Parameter
from avss_dist.pruning.plan import Plan
from avss_dist.pruning.repair.fold import (
    Features,
    FitStep,
    ProjectionWeights,
    features_of,
    fit_steps,
    fold,
    parameter_paths,
)
from avss_dist.pruning.repair.hidden_states import CutStates, HiddenStateSource
from avss_dist.pruning.repair.normal_equations import NormalEquations, RidgeFit, fit_ridge
from avss_dist.pruning.repair.projection import OutputProjection, RepairError
from avss_dist.pruning.repair.record import RepairedCut
from avss_dist.pruning.repair.registry import REPAIRS
from avss_dist.pruning.repair.splits import FitSplit
from avss_dist.system.devices import free_memory
from avss_dist.system.streams import tracked

ReadStored = Callable[[Parameter], torch.Tensor | None]
"""Returns a parameter as the checkpoint's files hold it; None if they do not."""


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
        RepairError: there is no cut.
        PlanError: the plan drops sublayers.
    """
    plan.require_no_sublayers("A repair makes up for whole layers and for experts")
    first = min([*(layer - 1 for layer in plan.dropped_layers), *plan.experts])
    remaining = [layer for layer in plan.keep if layer >= first]
    ends = [*remaining[1:], plan.num_layers]
    cuts = [
        RepairCut(layer, tuple(range(layer + 1, end)), tuple(plan.experts.get(layer, ())))
        for layer, end in zip(remaining, ends, strict=True)
    ]
    cuts = [cut for cut in cuts if cut.removed or cut.experts or every_layer]
    if not cuts:
        raise RepairError(
            f"Layers {describe_layers(plan.dropped_layers)} are the first: there is no layer before them to fit.",
            "Prune with `repair` none, keep the first layer, or repair by refit_all.",
        )
    return cuts


@dataclass(frozen=True)
class DataParallel:
    """The share of this process in a fit over the batches of several model copies, or of ranks that hold one together.

    Attributes:
        local_indices: returns the indices of this copy's batches among a number of batches.
        all_reduce: replaces each tensor by its sum over all copies, in place.
        multiple: number of which the number of batches must be a multiple.
    """

    local_indices: Callable[[int], Sequence[int]] = range
    all_reduce: Callable[[Sequence[torch.Tensor]], None] = lambda _tensors: None
    multiple: int = 1


class RepairFitter:
    """Fits a repair to cuts in order of depth. Each fit sees the changes of the earlier ones.

    Args:
        source: hidden states of both models.
        stored: reads parameters from the checkpoint's files.
        splits: calibration text.
        parallel: the share of this process in the fit.

    Attributes:
        tensors: changed parameters, in the dtypes of the checkpoint's files.
    """

    def __init__(
        self, source: HiddenStateSource, stored: ReadStored, splits: Sequence[FitSplit], parallel: DataParallel
    ) -> None:
        self.tensors: dict[Parameter, torch.Tensor] = {}
        self._source, self._stored, self._splits = source, stored, splits
        self._indices, self._parallel = parallel.local_indices(len(splits)), parallel

    def fit_all(self, cuts: Sequence[RepairCut], repair: str) -> list[RepairedCut]:
        """Fit a repair to cuts, in order. Cuts that cannot be fitted are refused before the first fit.

        Args:
            repair: one of `pruning.repair.registry.REPAIRS`.

        Raises:
            RepairError: the weights of a cut cannot be changed.
            CorpusError: there are too few tokens to fit to.
        """
        projections = [self._source.output_projection(cut.after) for cut in cuts]
        for projection in projections:
            self._require_enough(projection, repair)
            self._require_plain(projection.layer.index, projection.weight)
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
        old = {path: self._parameter(projection.layer.index, path) for path in self._paths(projection).values()}
        for step in fit_steps(REPAIRS[repair], projection):
            sums, size, moment = self._sums(cut, projection, step, description)
            fits.append([_fit(step, *equations) for equations in sums])
            if any(fit.ridge is not None for fit in fits[-1]):
                self._fold(projection, step, fits[-1], moment)
        before, after = sum(fit.before for fit in fits[0]), sum(fit.after for fit in fits[-1])
        ridges = tuple(fit.ridge for of_step in fits for fit in of_step)
        if len(fits[-1]) > 1:  # each alone: what they give together is less than the sum of their errors
            (((_, held_back),), _, _) = self._sums(cut, projection, _MEASURING, description)
            after = float(held_back.target)
        if after > before:  # before a norm, a fit is folded approximately
            after, ridges = before, (None,) * len(ridges)
            for path, value in old.items():
                self._change(projection.layer.index, path, value)
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
            RepairError: there is too little memory.
        """
        value = self._source.value(projection.layer.index, projection.weight)
        *_, inputs, outputs = shape = projection.matrix(value.to("meta")).shape
        method = REPAIRS[repair]
        sizes = inputs, outputs, projection.chances
        needed = method.tokens_needed(*sizes)
        fewer = [name for name, other in REPAIRS.items() if other.tokens_needed(*sizes) < needed]
        instead = f"choose a `repair` of fewer unknowns ({', '.join(reversed(fewer))})" if fewer else ""
        num_tokens = sum(int(split.fitted.sum()) for split in self._splits)
        if num_tokens < needed:
            raise CorpusError(
                f"The repair {repair} of this model needs at least {needed:,} tokens to fit to, not {num_tokens:,}.",
                "Give more text, raise `max_sequences`" + (f", or {instead}." if instead else "."),
            )
        fits = prod(shape[:-2]) if method.features == "inputs" else 1
        features = inputs if method.features == "inputs" else outputs
        size, room = NormalEquations.peak_bytes(features, outputs, fits), free_memory(value.device)
        if size > room:
            raise RepairError(
                f"The repair {repair} of layer {projection.layer.index} needs {describe_bytes(size)} of memory for the "
                f"products of {fits} x {features:,} inputs; {describe_bytes(room)} are free.",
                f"Use a machine with more memory, or {instead}." if instead else "Use a machine with more memory.",
            )

    def _require_plain(self, layer: int, path: str) -> None:
        """Raise RepairError if the files hold a weight in a form into which no repair can be written."""
        stored = self._stored((layer, path))
        if stored is None or not stored.is_floating_point() or stored.dtype.itemsize == 1:
            form = "under other names" if stored is None else f"as {str(stored.dtype).removeprefix('torch.')}"
            raise RepairError(
                f"The files hold '{path}' of layer {layer} {form}, quantized or fused: nothing can be added to it.",
                PLAIN_HINT,
            )

    def _sums(
        self, cut: RepairCut, projection: OutputProjection, step: FitStep, description: str
    ) -> tuple[list[tuple[NormalEquations, NormalEquations]], float, torch.Tensor]:
        """Sum the normal equations of a step over the text.

        Returns:
            For each matrix, the equations over the tokens to fit to and over the held-back tokens; the sum of |Y|^2
            over the held-back tokens, where Y are the whole model's hidden states; the mean of x^T x over the tokens
            to fit to, for the first matrix.
        """
        sums: list[list[NormalEquations]] = []
        size = counted = 0.0

        def add(number: int, whole: torch.Tensor, states: CutStates) -> None:
            nonlocal sums, size, counted
            split, target = self._splits[number], whole.to(states.hidden.device).float()
            scale = split.sink_scale(target)
            masks = [torch.from_numpy(mask).to(target.device) for mask in split.with_sinks()]
            missing = scale * (target - states.hidden.float())
            tokens = _Tokens(scale.flatten(0, 1), missing.flatten(0, 1), [m.flatten() for m in masks], split.weight)
            features = features_of(step, projection, states.linear, states.last)
            sums = [tokens.added(part, *old) for part, old in zip(features, sums or [[]] * len(features), strict=True)]
            counted += split.weight * float(scale[masks[0]].double().square().sum())
            size += split.weight * float((scale * target)[masks[1]].double().square().sum())

        read = projection.reading(step.features)
        self._source.visit(read, cut.last, add, tracked(self._indices, description))
        reduced, (size, counted) = self._all_reduce([equations for part in sums for equations in part], size, counted)
        pairs = list(zip(reduced[::2], reduced[1::2], strict=True))
        return pairs, size, pairs[0][0].gram / counted

    def _all_reduce(
        self, sums: Sequence[NormalEquations], *numbers: float
    ) -> tuple[list[NormalEquations], list[float]]:
        """Return equations and numbers, each summed over the copies that share the batches."""
        floats = torch.tensor(numbers, dtype=torch.float64, device=sums[0].gram.device)
        counts = torch.tensor([part.count for part in sums], device=floats.device)
        self._parallel.all_reduce([floats, counts, *(t for part in sums for t in (part.gram, part.cross, part.target))])
        return [replace(part, count=n) for part, n in zip(sums, counts.tolist(), strict=True)], floats.tolist()

    def _fold(
        self, projection: OutputProjection, step: FitStep, fits: Sequence[RidgeFit], moment: torch.Tensor
    ) -> None:
        """Fold fits into the weights of a projection. ``moment`` is that of `fold`."""
        fitted = fits[0].weights if len(fits) == 1 else torch.stack([fit.weights for fit in fits])
        layer = projection.layer.index
        paths = self._paths(projection)
        old = {field: self._parameter(layer, path) for field, path in paths.items()}
        device = fitted.device
        values = {field: tensor.to(device, torch.float64) for field, tensor in old.items()}
        bias = projection.biases(values["bias"]) if "bias" in values else None
        gain = values["gain"] + projection.offset if "gain" in values else None
        weights = ProjectionWeights(projection.matrix(values["linear"]), bias, gain)
        new = fold(step, weights, fitted, moment, projection.factor)
        folded = {
            "linear": projection.from_matrix(new.linear, values["linear"]),
            "bias": None if new.bias is None else projection.from_biases(new.bias, values["bias"]),
            "gain": None if new.gain is None else new.gain - projection.offset,
        }
        for field, path in paths.items():
            value = folded[field]
            assert value is not None
            self._change(layer, path, _as_stored(value, old[field], layer))

    def _change(self, layer: int, path: str, value: torch.Tensor) -> None:
        self.tensors[layer, path] = value
        self._source.change(layer, path, value)

    def _paths(self, projection: OutputProjection) -> Mapping[str, str]:
        """Return the paths of a projection's parameters. See `fold.parameter_paths`."""
        return parameter_paths(projection, bias=self._source.has(projection.layer.index, projection.bias))

    def _parameter(self, layer: int, path: str) -> torch.Tensor:
        """Return a parameter with the changes so far, as it would be written.

        Raises:
            RepairError: the model does not hold it as the files do, or not on a device that computes.
        """
        if (changed := self.tensors.get((layer, path))) is not None:
            return changed
        stored, loaded = self._stored((layer, path)), self._source.value(layer, path)
        if loaded.is_meta:
            raise RepairError(
                f"'{path}' of layer {layer} is kept off the devices that compute, and cannot be changed.",
                "Use `partition` single, or device_map with more `max_memory`.",
            )
        if stored is None or stored.shape != loaded.shape or not torch.equal(stored.to(loaded.dtype), loaded.cpu()):
            raise RepairError(
                f"The files hold '{path}' of layer {layer} in another form than the model does.", PLAIN_HINT
            )
        return stored


PLAIN_HINT = (
    "Repair the checkpoint that it was quantized from, and quantize the result; or save it again with transformers' "
    "save_pretrained, if it is not quantized."
)


_MEASURING = FitStep("output", "linear", "channel")
"""A step of which only the error before it is read."""


@dataclass(frozen=True, eq=False)
class _Tokens:
    """The tokens of a batch.

    Attributes:
        scale: float32[tokens, 1], see `FitSplit.sink_scale`.
        missing: float32[tokens, units], what is missing in the hidden states, scaled.
        masks: bool[tokens], the tokens to fit to, and the held-back tokens.
        weight: weight of each token.
    """

    scale: torch.Tensor
    missing: torch.Tensor
    masks: Sequence[torch.Tensor]
    weight: float

    def added(self, features: Features, *sums: NormalEquations) -> list[NormalEquations]:
        """Return equations, one for each mask, with those of the batch added. There are no ``sums`` at first."""
        reached = slice(None) if features.tokens is None else features.tokens
        x, y = self.scale[reached] * features.x, self.missing[reached]
        weight = self.weight if features.weight is None else self.weight * features.weight
        sums = sums or tuple(NormalEquations.empty(x.shape[1], y.shape[1], x.device) for _ in self.masks)
        return [
            total + NormalEquations.from_tokens(x[m], y[m], weight if isinstance(weight, float) else weight[m])
            if m.any()
            else total
            for total, m in zip(sums, (mask[reached] for mask in self.masks), strict=True)
        ]


def _fit(step: FitStep, fitted: NormalEquations, held_back: NormalEquations) -> RidgeFit:
    """Fit a matrix of a step. It stays zero for an expert that got no token."""
    if not fitted.count:
        return RidgeFit(torch.zeros_like(fitted.cross), None, float(held_back.target), float(held_back.target))
    return fit_ridge(fitted, held_back, step.form)


def _as_stored(value: torch.Tensor, old: torch.Tensor, layer: int) -> torch.Tensor:
    """Return a parameter in the dtype in which the files hold it.

    Raises:
        RepairError: its values do not fit into that dtype.
    """
    written = value.to(old.dtype).cpu().contiguous()
    if not torch.isfinite(written).all():
        raise RepairError(f"The repair of layer {layer} does not fit into {written.dtype}.", "Use another `repair`.")
    return written
