"""The repair by borrowed neurons: neurons of removed layers take the places of a layer's least useful ones.

`neurons` has their rows, and `neuron_choice` decides which ones stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from avss_dist.models.change.patches import Patch
from avss_dist.pruning.repair.cuts import RepairCut
from avss_dist.pruning.repair.fits import fold
from avss_dist.pruning.repair.fitter import CutFit, RepairFitter
from avss_dist.pruning.repair.neuron_choice import (
    NeuronFit,
    choose_neurons,
    kept_of_piece,
    largest_errors,
    removal_errors,
    spare_columns,
)
from avss_dist.pruning.repair.neurons import BorrowedNeurons, NotBorrowed, Recipient
from avss_dist.pruning.repair.projection import OutputProjection
from avss_dist.pruning.repair.registry import REPAIRS, RepairMethod
from avss_dist.pruning.repair.sums import StepSums

ROUNDS_BEFORE_NORM = 3
"""Maximum number of rounds in which weights before a norm and its gain are fitted in turn."""


class BorrowFitter(RepairFitter):
    """Fits repairs that borrow neurons of removed layers. See `RepairFitter`."""

    def _fit(self, cut: RepairCut, projection: OutputProjection, method: RepairMethod, description: str) -> CutFit:
        """Fit the layer before a cut with borrowed neurons, or as `refit` does if none helps."""
        fit = self._borrow(cut, projection, method, description)
        if fit is None:
            return super()._fit(cut, projection, method, description)
        return fit

    def _borrow(
        self, cut: RepairCut, projection: OutputProjection, method: RepairMethod, description: str
    ) -> CutFit | None:
        """Fit the layer before a cut with neurons of the removed layers in place of its least useful ones.

        Returns:
            None if there are none that it could borrow, or if none helps before a norm.
        """
        recipient, pool = self._find_neurons(cut, projection)
        if recipient is None or pool is None:
            return None
        unchanged = dict(self._source.changed)
        self._source.changed.update(recipient.changed)
        pool, sums = self._preselect(cut, projection, method, recipient, pool, description)
        (matrix,) = sums.matrices
        number = recipient.neurons.number
        start = self._start(projection, len(pool), matrix.fitted.gram.device)
        constants = len(start) - number - len(pool)
        choice = choose_neurons(matrix.fitted, matrix.held_back, start, number, constants)
        before = float(matrix.held_back.target)
        borrowed = 0
        if choice.fit.ridge is not None:
            borrowed = self._fold_neurons(projection, method, recipient, pool, choice, sums.moment)
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
        start = _feature_weights(weights, borrowed)
        gain = weights.get("gain")
        if gain is None:
            return start
        return start * gain

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
            best = piece[largest_errors(errors[number : number + len(piece)], kept_of_piece(spare)).cpu()]

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
        folding = {"linear": _feature_weights(weights, len(pool))[features]}
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


def _feature_weights(weights: Mapping[str, torch.Tensor], borrowed: int) -> torch.Tensor:
    """Return the weights of all features before a fit, [features, channels]: borrowed neurons have none yet.

    Args:
        weights: weights of the output projection by role: ``linear``, and perhaps ``bias``.
        borrowed: number of neurons that could be borrowed.
    """
    linear = weights["linear"]
    parts = [linear, linear.new_zeros(borrowed, linear.shape[1])]
    if "bias" in weights:
        parts.append(weights["bias"][None])
    return torch.cat(parts)
