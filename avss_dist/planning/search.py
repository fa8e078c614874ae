"""Greedy search of a set of layers to drop, by the loss without it. The caller measures the losses.

See SLEB, Song et al., arXiv 2402.09025.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from math import inf, isnan
from typing import TYPE_CHECKING

from avss_dist.plans.choice import require_pattern_size
from avss_dist.plans.criteria import Layers
from avss_dist.plans.pattern import Pattern

if TYPE_CHECKING:
    from avss_dist.tasks.results import Result

CHOSEN_HERE = "The set was chosen for its loss on this very text: on other text, its loss will be higher."
"""Finding that speaks against a set of layers that a search has chosen."""

Losses = Callable[[Layers, Layers], "dict[Layers, Result]"]
"""Function that returns the loss without a base set and each of some other layers, or without the base set alone.

It raises AvssError if a cell fails. Other cells remain in the warehouse.
"""


@dataclass(frozen=True, kw_only=True)
class SearchStep:
    """The end of a round of a search.

    Attributes:
        best: loss without the best set of the round.
        sets: number of sets with a known loss, those of this round included.
    """

    best: Result
    sets: int


def greedy_search(
    candidates: Collection[int],
    count: int,
    losses: Losses,
    on_step: Callable[[SearchStep], None] | None = None,
    pattern: Pattern | None = None,
) -> tuple[Layers, list[SearchStep]]:
    """Return the layers that a greedy search removes, and its rounds.

    Each round removes the layer without which the loss is least.

    Args:
        candidates: layers that may be removed.
        count: number of layers to remove.
        losses: measures the losses of a round.
        on_step: receives each round.
        pattern: kinds of layers that the search keeps where they are derived: it goes only to sets that can be
            completed by other candidates.

    Raises:
        PlanError: no set of so many candidates keeps the pattern.
    """
    if pattern is not None:
        require_pattern_size(pattern, count, candidates)
    chosen: Layers = ()
    steps: list[SearchStep] = []
    num_sets = 0
    while len(chosen) < count:
        remaining = tuple(layer for layer in candidates if layer not in chosen)
        if pattern is not None:
            remaining = tuple(layer for layer in remaining if pattern.can_complete((*chosen, layer), count, candidates))
        results = losses(chosen, remaining)
        num_sets += len(results)
        chosen = _best_set(results)
        step = SearchStep(best=results[chosen], sets=num_sets)
        steps.append(step)
        if on_step is not None:
            on_step(step)
    return chosen, steps


def _best_set(results: dict[Layers, Result]) -> Layers:
    """Return the set without which the loss is least, and of equal ones the first. A loss that is NaN is the worst."""
    losses = {}
    for removed, result in results.items():
        losses[removed] = inf if isnan(result.value) else result.value
    return min(losses, key=lambda removed: (losses[removed], removed))


def expand(base: Layers, layers: Layers) -> list[Layers]:
    """Return the base set with each of the layers added, in ascending order, or the base set without any."""
    if not layers:
        return [base]
    return [tuple(sorted([*base, layer])) for layer in layers]
