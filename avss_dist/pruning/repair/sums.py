"""Sums over calibration text from which one step of a repair is fitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from avss_dist.models.causal_lm import LanguageModel
from avss_dist.pruning.repair.fits import NormalEquations, features_of
from avss_dist.pruning.repair.hidden_states import CutStates
from avss_dist.pruning.repair.projection import OutputProjection
from avss_dist.pruning.repair.registry import RepairMethod
from avss_dist.pruning.repair.splits import FitSplit


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
