"""Cuts of a plan: the places at which a repair is fitted."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from avss_dist.core.text import describe_layers
from avss_dist.plans.choice import PlanError
from avss_dist.plans.plan import Plan


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
