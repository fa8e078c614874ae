"""Searches among sets of layers, by the loss of the model without them; it is measured elsewhere.

A search is a generator: it yields the sets that it wants to know the loss of, is sent their losses, and returns the set
that it chooses. It depends on those losses, its choice and its effort alone: not on who measures, or when.

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

from avss_dist.errors import ConfigError
from avss_dist.intervention import (
    Removal,
    Removals,
    can_be_added,
    count_removed,
    joined,
    layer_of,
    sublayers_of,
    whole_layers,
)
from avss_dist.pruning.selection import Choice
from avss_dist.settings import checked

WIDTH = 3  # sets that are gone on from
SIBLINGS = 8  # exchanges of one layer that are tried at once


@dataclass(frozen=True)
class Expansion:
    """Sets whose loss is wanted: a set and one more of some layers and sublayers; without any, the set itself."""

    base: Removals
    layers: Removals = ()

    @property
    def sets(self) -> list[Removals]:
        """Each ascending."""
        return [joined([*self.base, layer]) for layer in self.layers] or [self.base]


Layers = tuple[int, ...]
Search = Generator[list[Expansion], Mapping[Removals, float], Removals]


@checked
class Effort:
    """How far is searched.

    Raises:
        ConfigError: values out of their range.
    """

    budget: Annotated[int, Field(ge=1)] | None = None
    """Sets whose loss is measured at most, each counted once, and again by a search that finds it in the warehouse."""
    width: Annotated[int, Field(ge=1)] | None = None
    """Sets that are gone on from at each step of beam and evolve; 3 by default."""


def search_for(
    choice: Choice, effort: Effort, num_layers: int, starts: Sequence[Layers] = (), pool: Layers | None = None
) -> Search:
    """A search, not begun.

    Args:
        choice: by one of ``settings.SEARCHES``.
        pool: the layers among which is searched; all that ``choice`` does not protect by default.
        starts: sets that evolve begins with, beside those of its greedy steps.

    Raises:
        ConfigError: the effort is no effort of this search, or does not suffice for its first step.
        PlanError: see `Choice.number`.
    """
    free, count = pool or tuple(choice.unprotected(num_layers)), choice.number(num_layers)
    if choice.by == "greedy" and effort.width is not None:
        raise ConfigError("`width` has no effect: a greedy search goes on from one set.", "Use beam, or leave it out.")
    if choice.by != "evolve" and starts:
        raise ConfigError(f"A {choice.by} search begins with the whole model, with no other set.", "Use evolve.")
    steps: list[Removals] = [tuple(sublayers_of(free)), free] if choice.sublayers else [free]
    size = count * len(steps)
    least = _least_budget(len(steps[0]), size) + (choice.by == "evolve")
    if effort.budget is not None and effort.budget < least:
        raise ConfigError(
            f"`budget` {effort.budget} does not suffice for one step, with {count_removed(steps[0])} that may be "
            "dropped.",
            f"{least} is the least.",
        )
    width = effort.width or WIDTH
    if choice.by != "evolve":
        return _beam(steps, size, effort.budget, 1 if choice.by == "greedy" else width)
    if effort.budget is None:
        raise ConfigError(
            "evolve goes on as long as its `budget` lasts, and none is given.",
            f"At least {least}; a greedy search takes {sum(range(len(free) - count + 1, len(free) + 1))}.",
        )
    return _evolve(free, count, effort.budget, width, starts, choice.seed)


def _least_budget(free: int, count: int) -> int:
    """One step, and the set that is chosen after it."""
    return free + (count > 1)


def _beam(steps: Sequence[Removals], size: int, budget: int | None, width: int) -> Search:
    """Of the sets of each size, the ``width`` best are gone on from, and always the one that greedy would take.

    So it finds nothing worse than greedy does. Where the budget does not suffice for another step, what is lowest in
    the last one completes the best set, which is measured.

    Args:
        steps: what a set may be larger by: by 1, by 2, ...
        size: of the set that is chosen.
    """
    kept: list[list[Removals]] = [[()]]  # by size
    line: list[Removals] = [()]  # those that greedy would have
    used = 0
    losses: Mapping[Removals, float] = {}
    while len(kept) <= size:
        expansions = _expand(_pairs(kept, steps))
        number = sum(len(one.layers) for one in expansions)
        if budget is not None and used + number + (len(kept) < size) > budget:
            break
        losses = yield expansions
        used += number
        reached = {joined([*base, more]) for base, more in _pairs([[one] for one in line], steps)}
        line.append(best_sets({drop: losses[drop] for drop in reached}, 1)[0])
        best = best_sets(losses, width)
        kept.append(best if line[-1] in best else [*best[:-1], line[-1]])
    else:
        return kept[-1][0]
    completed = _completed(kept, steps[0], size, losses)
    yield [Expansion(completed)]
    return completed


def _completed(
    kept: Sequence[Sequence[Removals]], more: Removals, size: int, losses: Mapping[Removals, float]
) -> Removals:
    """The best set, and what was lowest beside the one that it was made of."""
    best = kept[-1][0]
    made_of = [base for base in kept[-2] for one in more if joined([*base, one]) == best]
    base = made_of[0] if made_of else kept[-2][0]
    others = {one: losses[joined([*base, one])] for one in more if can_be_added(one, base) and can_be_added(one, best)}
    lowest = sorted(others, key=lambda one: (_comparable(others[one]), one))
    return joined([*best, *lowest[: size + 1 - len(kept)]])


def _pairs(kept: Sequence[Sequence[Removals]], steps: Sequence[Removals]) -> Iterator[tuple[Removals, Removal]]:
    """Sets, by size, and what each may be larger by, for the next size."""
    for by, more in enumerate(steps[: len(kept)], 1):
        yield from ((base, one) for base in kept[-by] for one in more if can_be_added(one, base))


def _evolve(free: Layers, count: int, budget: int, width: int, starts: Sequence[Layers], seed: int) -> Search:
    """Greedy steps with half of the budget; then, again and again, exchanges of one layer in the ``width`` best sets.

    Ends before the budget does where no exchange in any of them is left to try.
    """
    known: dict[Removals, float] = {}
    yield from _noted(_beam([free], count, max(budget // 2, _least_budget(len(free), count)), 1), known)
    if new := [Expansion(start) for start in dict.fromkeys(starts) if start not in known]:
        known |= yield new[: budget - len(known)]
    rng = np.random.default_rng(seed)
    while left := budget - len(known):
        parents = best_sets({drop: loss for drop, loss in known.items() if len(drop) == count}, width)
        expansions = list(_exchanges(parents, free, {*known}, left, rng))
        if not expansions:
            break
        known |= yield expansions
    return best_sets({drop: loss for drop, loss in known.items() if len(drop) == count}, 1)[0]


def _noted(search: Search, known: dict[Removals, float]) -> Generator[list[Expansion], Mapping[Removals, float], None]:
    """A search as it is; the losses that it gets are kept."""
    expansions = next(search)
    while True:
        losses = yield expansions
        known |= losses
        try:
            expansions = search.send(losses)
        except StopIteration:
            return


def _exchanges(
    parents: Sequence[Removals], free: Layers, known: set[Removals], left: int, rng: np.random.Generator
) -> Iterator[Expansion]:
    """Of each set, one layer put back, by chance, and others taken out for it: its neighbours, and some by chance."""
    for parent in parents:
        for back in rng.permutation(whole_layers(parent)).tolist():
            base = tuple(layer for layer in parent if layer != back)
            new = [layer for layer in free if layer not in parent and joined([*base, layer]) not in known]
            if not new or not left:
                continue
            order = sorted(rng.permutation(new).tolist(), key=lambda layer: abs(layer - back) > 1)
            made = Expansion(base, tuple(sorted(order[: min(SIBLINGS, left)])))
            known.update(made.sets)
            left -= len(made.layers)
            yield made
            break


def _expand(pairs: Iterable[tuple[Removals, Removal]]) -> list[Expansion]:
    """Every set with one more, once: from the base to which it adds what is deepest, which costs least."""
    origin: dict[Removals, tuple[int, Removals, Removal]] = {}
    for base, more in pairs:
        made = joined([*base, more])
        origin[made] = max(origin.get(made, (-1, base, more)), (layer_of(more), base, more))
    added: dict[Removals, list[Removal]] = {}
    for _, base, more in origin.values():
        added.setdefault(base, []).append(more)
    return [Expansion(base, tuple(sorted(layers))) for base, layers in added.items()]


def best_sets(losses: Mapping[Removals, float], number: int) -> list[Removals]:
    """The sets of least loss; equal ones in the order of their layers."""
    return sorted(losses, key=lambda drop: (_comparable(losses[drop]), drop))[:number]


def _comparable(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss
