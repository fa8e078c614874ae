"""Comparison of a sparsity plan with the sparsity that it reaches on other text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from avss_dist.core.intervention import THRESHOLD
from avss_dist.sparsity.plan import SparsityPlan

POINT = 0.01


@dataclass(frozen=True, kw_only=True)
class RealizedSparsity:
    """Agreement of a plan's linear maps with their planned sparsity.

    Attributes:
        within: share of the maps that are within a percentage point of the plan.
        farthest: largest absolute deviation, as a share.
        map: description of the map with that deviation, for people.
        why: probable cause of deviations, for people.
    """

    within: float
    farthest: float
    map: str
    why: str

    @staticmethod
    def compare(plan: SparsityPlan, measured: Mapping[tuple[int, str], float]) -> RealizedSparsity | None:
        """Compare a plan with measured shares of zeros, by layer and path. Return None if no map of the plan ran."""
        deviations = {
            (entry.layer, entry.map): abs(measured[entry.layer, entry.map] - entry.sparsity)
            for entry in plan.projections
            if (entry.layer, entry.map) in measured
        }
        if not deviations:
            return None
        layer, path = max(deviations, key=lambda key: deviations[key])
        return RealizedSparsity(
            within=sum(value <= POINT for value in deviations.values()) / len(deviations),
            farthest=deviations[layer, path],
            map=f"{path} of layer {layer}",
            why=_probable_cause(plan),
        )

    @property
    def finding(self) -> str:
        """Finding for people."""
        if self.within == 1:
            return f"Every linear map is within a point of its sparsity; the farthest, {self.map}, by {self._points}."
        return (
            f"{self.within:.0%} of the linear maps are within a point of their sparsity; the farthest, {self.map}, is "
            f"off by {self._points}. {self.why}"
        )

    @property
    def _points(self) -> str:
        return f"{100 * self.farthest:.2g} points"


def _probable_cause(plan: SparsityPlan) -> str:
    """Return the probable cause of deviations from a plan, for people."""
    if any(entry.by != THRESHOLD for entry in plan.projections):
        return "Their share is right on average of the text that was counted alone."
    return "Thresholds are of other text, and of the dense model: maps after sparse ones read less."
