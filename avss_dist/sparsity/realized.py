"""What a sparsity plan makes zero of other text, beside what it says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from avss_dist.settings import THRESHOLD
from avss_dist.sparsity.plan import SparsityPlan

POINT = 0.01


@dataclass(frozen=True, kw_only=True)
class Realized:
    """How near the linear maps of a plan come to their sparsity.

    Attributes:
        within: the share of the maps that are within a point.
        farthest: how far the farthest is off.
        map: which that is, for people.
        why: what sets them apart.
    """

    within: float
    farthest: float
    map: str
    why: str

    @staticmethod
    def of(plan: SparsityPlan, measured: Mapping[tuple[int, str], float]) -> Realized | None:
        """Of the share of zeros that each map read, by layer and path; None where no map of the plan ran."""
        off = {
            (one.layer, one.map): abs(measured[one.layer, one.map] - one.sparsity)
            for one in plan.projections
            if (one.layer, one.map) in measured
        }
        if not off:
            return None
        layer, path = max(off, key=lambda key: off[key])
        return Realized(
            within=sum(value <= POINT for value in off.values()) / len(off),
            farthest=off[layer, path],
            map=f"{path} of layer {layer}",
            why=_why(plan),
        )

    @property
    def finding(self) -> str:
        """In words."""
        if self.within == 1:
            return f"Every linear map is within a point of its sparsity; the farthest, {self.map}, by {self._points}."
        return (
            f"{self.within:.0%} of the linear maps are within a point of their sparsity; the farthest, {self.map}, is "
            f"off by {self._points}. {self.why}"
        )

    @property
    def _points(self) -> str:
        return f"{100 * self.farthest:.2g} points"


def _why(plan: SparsityPlan) -> str:
    """What may set the maps of a plan apart from it."""
    if any(one.by != THRESHOLD for one in plan.projections):
        return "Their share is right on average of the text that was counted alone."
    if plan.why.get("corrections"):
        return "Thresholds are of other text."
    return (
        "Thresholds are of other text, and of the dense model: maps after sparse ones read less. Corrections fit that."
    )
