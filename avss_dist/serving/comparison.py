"""Comparison of a server's predictions with those of transformers, position by position.

A server computes in 16 bits, in another order. What that may change is measured: by transformers itself, in float32
against the same dtype on the same rows. A position differs if more changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from avss_dist.core.values import NewRow
from avss_dist.corpus.documents import Tokenizer
from avss_dist.serving.reference import Expected, Reference
from avss_dist.serving.server import Int64, Predictions
from avss_dist.stats.layer_stats import Float64

QUANTILE = 0.99
"""Share of positions at which transformers itself, in the server's dtype, stays below the deviation that counts."""
MULTIPLE = 4.0
"""Multiple of that deviation that a server may deviate, as it sums in another order, and caches keys and values."""
FLOOR = 1e-3
"""Least tolerance, in nats: servers sum probabilities in float32, and round what they print."""
LIMIT = 0.01
"""Share of positions that may differ. Of 10,000 positions, a few exceed any tolerance."""
LEAST = 2
"""Number of positions that must differ: a single one may be rounding."""
ALLOWANCE = 2.0
"""Multiple of the share in which the whole model differs on its server that its cut may differ, in addition."""
TOO_DIFFERENT = 0.2
"""Share of positions in which the whole model differs, above which nothing can be said about its cut."""
ENOUGH = 20
"""Number of positions below which nothing is said: a server may write nothing, or parts of characters alone."""
EVERYWHERE = "all"


@dataclass(frozen=True, eq=False, kw_only=True)
class Judged:
    """Positions that count of some predictions.

    Attributes:
        positions: int64[n], indices of the predicted tokens in their row.
        equal: bool[n], the most likely token is the same.
        differs: bool[n], more differs than rounding explains.
        losses: float64[n], loss of the row's token by transformers.
        server_losses: float64[n], the same by the server; NaN where it is not known.
        differences: float64[n], margin of transformers' token over the server's, or difference of the losses, whichever
            is more.
    """

    positions: Int64
    equal: NDArray[np.bool_]
    differs: NDArray[np.bool_]
    losses: Float64
    server_losses: Float64
    differences: Float64

    def part(self, index: slice | NDArray[np.bool_]) -> Judged:
        """Return some of the positions."""
        values = {}
        for column in fields(self):
            values[column.name] = getattr(self, column.name)[index]
        return Judged(**values)

    @staticmethod
    def join(parts: Sequence[Judged]) -> Judged:
        """Return the positions of several parts."""
        values = {}
        for column in fields(Judged):
            values[column.name] = np.concatenate([getattr(part, column.name) for part in parts])
        return Judged(**values)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Positions that are judged together: all, or those within or beyond a window of the model's attention.

    Attributes:
        name: number of tokens before the predicted ones: ``all``, ``up to 512`` or ``513 or more``.
        positions: number of positions.
        equal: number of equal next tokens.
        ties: number of other next tokens that rounding explains.
        differences: number of positions at which more differs.
        loss: mean loss by transformers where the server's is known; None if it is nowhere.
        server_loss: mean loss by the server.
        largest: largest difference of a position, in nats.
        first: number of the first token that differs in its row, from 1; None if none does.
    """

    name: str
    positions: int
    equal: int
    ties: int
    differences: int
    loss: float | None
    server_loss: float | None
    largest: float
    first: int | None

    @property
    def share_equal(self) -> float:
        """Share of equal next tokens."""
        return self.equal / self.positions

    @property
    def share_different(self) -> float:
        """Share of positions that differ."""
        return self.differences / self.positions

    def is_different(self, whole: Group | None = None) -> bool:
        """Whether more positions differ than single ones.

        Args:
            whole: the same group of the whole model on its server.
        """
        allowed = LIMIT
        if whole is not None:
            allowed += ALLOWANCE * whole.share_different
        return self.differences >= LEAST and self.share_different > allowed

    def row(self) -> NewRow:
        """Return the values of the group by name."""
        return {
            "tokens_before": self.name,
            "positions": self.positions,
            "equal": self.share_equal,
            "ties": self.ties,
            "differences": self.differences,
            "loss": self.loss,
            "server_loss": self.server_loss,
            "largest": self.largest,
            "first": self.first,
        }


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A checkpoint on a server against transformers.

    Attributes:
        groups: the groups, which have each position once.
        tolerance: difference that rounding explains, in nats.
        dtype: dtype that gave the tolerance.
    """

    groups: tuple[Group, ...]
    tolerance: float
    dtype: str

    @property
    def positions(self) -> int:
        """Number of compared positions."""
        return sum(group.positions for group in self.groups)

    @property
    def share_equal(self) -> float:
        """Share of equal next tokens."""
        return sum(group.equal for group in self.groups) / self.positions

    @property
    def share_different(self) -> float:
        """Share of positions that differ."""
        return sum(group.differences for group in self.groups) / self.positions

    @property
    def largest(self) -> float:
        """Largest difference of a position, in nats."""
        return max(group.largest for group in self.groups)

    @property
    def loss(self) -> float | None:
        """Mean loss by transformers, or None if the server does not tell its own everywhere."""
        return self._mean([group.loss for group in self.groups])

    @property
    def server_loss(self) -> float | None:
        """Mean loss by the server, or None if it does not tell it everywhere."""
        return self._mean([group.server_loss for group in self.groups])

    def _mean(self, losses: Sequence[float | None]) -> float | None:
        """Return the mean over all positions of a loss by group."""
        total = 0.0
        for group, loss in zip(self.groups, losses, strict=True):
            if loss is None:
                return None
            total += loss * group.positions
        return total / self.positions

    def different_groups(self, whole: Comparison | None = None) -> list[Group]:
        """Return the groups that differ.

        Args:
            whole: comparison of the whole model on its server.
        """
        by_name = {group.name: group for group in whole.groups} if whole else {}
        return [group for group in self.groups if group.is_different(by_name.get(group.name))]


def compare_predictions(
    predictions: Sequence[Predictions],
    reference: Reference,
    tokenizer: Tokenizer,
    windows: Sequence[int],
    dtype: str,
) -> Comparison | None:
    """Return the comparison of a server's predictions, or None if there is none.

    Args:
        windows: number of tokens of each window of the model's attention, ascending.
        dtype: dtype of the reference's deviations.
    """
    if not len(reference.deviations):
        return None
    tolerance = max(FLOOR, MULTIPLE * float(np.quantile(reference.deviations, QUANTILE)))
    judged = []
    for written, expected in zip(predictions, reference.expected, strict=True):
        result = _judge(written, expected, tolerance)
        if written.until_difference:
            result = result.part(slice(_number_counted(written, expected, result, tokenizer)))
        judged.append(result)
    groups = _groups(Judged.join(judged), windows)
    return Comparison(groups=tuple(groups), tolerance=tolerance, dtype=dtype)


def _judge(written: Predictions, expected: Expected, tolerance: float) -> Judged:
    """Return all positions of a prediction, judged."""
    equal = written.best == expected.best
    margins = expected.best_logs - expected.chosen_logs
    losses = -expected.label_logs
    by_loss = np.nan_to_num(np.abs(written.losses - losses))
    differences = np.maximum(margins, by_loss)
    return Judged(
        positions=written.positions,
        equal=equal,
        differs=differences > tolerance,
        losses=losses,
        server_losses=written.losses,
        differences=differences,
    )


def _number_counted(written: Predictions, expected: Expected, judged: Judged, tokenizer: Tokenizer) -> int:
    """Return how many positions count of a text that the server wrote by itself: those up to the first difference.

    A difference counts itself, unless transformers goes on with the same text in other tokens.
    """
    for number, is_equal in enumerate(judged.equal):
        if is_equal:
            continue
        rest = tokenizer.decode(written.ids[written.positions[number] :].tolist())
        own = tokenizer.decode([int(expected.best[number])])
        if own and rest.startswith(own):
            return number
        return number + 1
    return len(judged.equal)


def _groups(judged: Judged, windows: Sequence[int]) -> list[Group]:
    """Return the positions in groups: those within the first window, beyond it, beyond the second, ..."""
    groups = []
    start = 0
    for window in windows:
        inside = (judged.positions >= start) & (judged.positions <= window)
        if inside.any():
            name = f"{start:,} to {window:,}" if start else f"up to {window:,}"
            groups.append(_group(judged.part(inside), name))
        start = window + 1
    inside = judged.positions >= start
    if inside.any():
        name = f"{start:,} or more" if start else EVERYWHERE
        groups.append(_group(judged.part(inside), name))
    return groups


def _group(judged: Judged, name: str) -> Group:
    """Return positions as a group."""
    different = judged.positions[judged.differs]
    ties = ~judged.equal & ~judged.differs
    is_known = np.isfinite(judged.server_losses)
    loss = None
    server_loss = None
    if is_known.any():
        loss = float(judged.losses[is_known].mean())
        server_loss = float(judged.server_losses[is_known].mean())
    return Group(
        name=name,
        positions=len(judged.positions),
        equal=int(judged.equal.sum()),
        ties=int(ties.sum()),
        differences=len(different),
        loss=loss,
        server_loss=server_loss,
        largest=float(judged.differences.max()),
        first=1 + int(different.min()) if len(different) else None,
    )
