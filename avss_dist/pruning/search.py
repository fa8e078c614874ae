"""Searches among sets of layers by the loss of the model without them.

A search is a generator: it yields sets whose loss the caller must measure, is sent their losses, and returns the chosen
set. Its result depends on the losses, the choice and the effort alone.

Greedy: Song et al., SLEB, arXiv 2402.09025; over sublayers: Zhang et al., FinerCut, arXiv 2405.18218. Evolution by
exchange: Sieberling et al., EvoPress, arXiv 2410.14649.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from avss_dist.core.errors import ConfigError
from avss_dist.core.intervention import (
    Removal,
    Removals,
    can_be_added,
    count_removed,
    joined,
    layer_of,
    sublayers_of,
    whole_layers,
)
from avss_dist.core.validation import checked
from avss_dist.pruning.selection import Choice

WIDTH = 3  # default beam width: sets that are expanded
SIBLINGS = 8  # exchanges of one layer that are tried at once


@dataclass(frozen=True)
class Expansion:
    """Sets whose loss is requested: ``base`` with each of ``layers`` added, or ``base`` itself without any."""

    base: Removals
    layers: Removals = ()

    @property
    def sets(self) -> list[Removals]:
        """The sets, each in ascending order."""
        return [joined([*self.base, layer]) for layer in self.layers] or [self.base]


Layers = tuple[int, ...]
Search = Generator[list[Expansion], Mapping[Removals, float], Removals]


@checked
class Effort:
    """Limits of a search.

    Raises:
        ConfigError: values out of their range.
    """

    budget: Annotated[int, Field(ge=1)] | None = None
    """Maximum number of sets to evaluate. Each counts once, even if its loss is in the warehouse already."""
    width: Annotated[int, Field(ge=1)] | None = None
    """Sets that beam and evolve continue from at each step; 3 by default."""


def search_for(
    choice: Choice, effort: Effort, num_layers: int, starts: Sequence[Layers] = (), pool: Layers | None = None
) -> Search:
    """Return a search that has not begun.

    Args:
        choice: choice by one of ``registry.SEARCHES``.
        effort: limits of the search.
        num_layers: number of layers of the model.
        starts: sets that evolve begins with, beside those of its greedy steps.
        pool: candidate layers; by default all layers that ``choice`` does not protect.

    Raises:
        ConfigError: the effort does not apply to this search, or does not suffice for its first step.
        PlanError: see `Choice.number`.
    """
    free, count = pool or tuple(choice.unprotected(num_layers)), choice.number(num_layers)
    if choice.by == "greedy" and effort.width is not None:
        raise ConfigError(
            "`width` has no effect: a greedy search continues from one set.", "Use beam, or leave it out."
        )
    if choice.by != "evolve" and starts:
        raise ConfigError(f"A {choice.by} search begins with the whole model and takes no start sets.", "Use evolve.")
    steps: list[Removals] = [tuple(sublayers_of(free)), free] if choice.sublayers else [free]
    size = count * len(steps)
    minimum = _least_budget(len(steps[0]), size) + (choice.by == "evolve")
    if effort.budget is not None and effort.budget < minimum:
        raise ConfigError(
            f"`budget` {effort.budget} does not suffice for one step, with {count_removed(steps[0])} that may be "
            "dropped.",
            f"It must be at least {minimum}.",
        )
    width = effort.width or WIDTH
    if choice.by != "evolve":
        return _beam(steps, size, effort.budget, 1 if choice.by == "greedy" else width)
    if effort.budget is None:
        raise ConfigError(
            "The search evolve needs a `budget`: it searches until it is used up.",
            f"Set it to at least {minimum}; a greedy search takes {sum(range(len(free) - count + 1, len(free) + 1))}.",
        )
    return _evolve(free, count, effort.budget, width, starts, choice.seed)


def _least_budget(free: int, count: int) -> int:
    """Return the number of evaluations of one step and of the set that is chosen after it."""
    return free + (count > 1)


def _beam(steps: Sequence[Removals], size: int, budget: int | None, width: int) -> Search:
    """Expand the ``width`` best sets of each size, always including the set that greedy would take.

    The result is therefore no worse than greedy's. If the budget does not suffice for another step, the best set is
    completed by the lowest additions of the last step, and measured.

    Args:
        steps: removals that may be added to a set, by their size: 1, 2, ...
        size: size of the chosen set.
    """
    beams: list[list[Removals]] = [[()]]  # by size
    greedy: list[Removals] = [()]  # the sets of a greedy search, by size
    used = 0
    losses: Mapping[Removals, float] = {}
    while len(beams) <= size:
        expansions = _expand(_pairs(beams, steps))
        number = sum(len(expansion.layers) for expansion in expansions)
        if budget is not None and used + number + (len(beams) < size) > budget:
            break
        losses = yield expansions
        used += number
        reached = {joined([*base, more]) for base, more in _pairs([[base] for base in greedy], steps)}
        greedy.append(best_sets({drop: losses[drop] for drop in reached}, 1)[0])
        best = best_sets(losses, width)
        beams.append(best if greedy[-1] in best else [*best[:-1], greedy[-1]])
    else:
        return beams[-1][0]
    completed = _complete(beams, steps[0], size, losses)
    yield [Expansion(completed)]
    return completed


def _complete(
    beams: Sequence[Sequence[Removals]], candidates: Removals, size: int, losses: Mapping[Removals, float]
) -> Removals:
    """Return the best set, completed by the removals with the lowest loss when added to its parent."""
    best = beams[-1][0]
    parents = [base for base in beams[-2] for added in candidates if joined([*base, added]) == best]
    base = parents[0] if parents else beams[-2][0]
    others = {
        added: losses[joined([*base, added])]
        for added in candidates
        if can_be_added(added, base) and can_be_added(added, best)
    }
    lowest = sorted(others, key=lambda added: (_comparable(others[added]), added))
    return joined([*best, *lowest[: size + 1 - len(beams)]])


def _pairs(beams: Sequence[Sequence[Removals]], steps: Sequence[Removals]) -> Iterator[tuple[Removals, Removal]]:
    """Yield each set and each removal that extends it to the next size.

    Args:
        beams: sets by size.
        steps: removals by size.
    """
    for size, candidates in enumerate(steps[: len(beams)], 1):
        yield from ((base, added) for base in beams[-size] for added in candidates if can_be_added(added, base))


def _evolve(free: Layers, count: int, budget: int, width: int, starts: Sequence[Layers], seed: int) -> Search:
    """Spend half of the budget on greedy steps, then exchange one layer in the ``width`` best sets, again and again.

    The search ends early if all exchanges in these sets were tried.
    """
    known: dict[Removals, float] = {}
    yield from _recording(_beam([free], count, max(budget // 2, _least_budget(len(free), count)), 1), known)
    if new := [Expansion(start) for start in dict.fromkeys(starts) if start not in known]:
        known |= yield new[: budget - len(known)]
    rng = np.random.default_rng(seed)
    while remaining := budget - len(known):
        parents = best_sets({drop: loss for drop, loss in known.items() if len(drop) == count}, width)
        expansions = list(_exchanges(parents, free, {*known}, remaining, rng))
        if not expansions:
            break
        known |= yield expansions
    return best_sets({drop: loss for drop, loss in known.items() if len(drop) == count}, 1)[0]


def _recording(
    search: Search, known: dict[Removals, float]
) -> Generator[list[Expansion], Mapping[Removals, float], None]:
    """Run a search unchanged, and record the losses that it receives in ``known``."""
    expansions = next(search)
    while True:
        losses = yield expansions
        known |= losses
        try:
            expansions = search.send(losses)
        except StopIteration:
            return


def _exchanges(
    parents: Sequence[Removals], free: Layers, known: set[Removals], remaining: int, rng: np.random.Generator
) -> Iterator[Expansion]:
    """Yield, for each set, a random layer put back in exchange for others: its neighbours first, then random ones."""
    for parent in parents:
        for back in rng.permutation(whole_layers(parent)).tolist():
            base = tuple(layer for layer in parent if layer != back)
            new = [layer for layer in free if layer not in parent and joined([*base, layer]) not in known]
            if not new or not remaining:
                continue
            order = sorted(rng.permutation(new).tolist(), key=lambda layer: abs(layer - back) > 1)
            expansion = Expansion(base, tuple(sorted(order[: min(SIBLINGS, remaining)])))
            known.update(expansion.sets)
            remaining -= len(expansion.layers)
            yield expansion
            break


def _expand(pairs: Iterable[tuple[Removals, Removal]]) -> list[Expansion]:
    """Return each extended set once, from the base to which it adds the deepest layer, which is the cheapest."""
    origin: dict[Removals, tuple[int, Removals, Removal]] = {}
    for base, added in pairs:
        extended = joined([*base, added])
        origin[extended] = max(origin.get(extended, (-1, base, added)), (layer_of(added), base, added))
    by_base: dict[Removals, list[Removal]] = {}
    for _, base, added in origin.values():
        by_base.setdefault(base, []).append(added)
    return [Expansion(base, tuple(sorted(layers))) for base, layers in by_base.items()]


def best_sets(losses: Mapping[Removals, float], number: int) -> list[Removals]:
    """Return the sets with the lowest loss, in order. Ties are ordered by their layers."""
    return sorted(losses, key=lambda drop: (_comparable(losses[drop]), drop))[:number]


def _comparable(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss
