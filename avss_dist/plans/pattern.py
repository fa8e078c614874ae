"""Choices of layers after which programs that derive the kinds of layers from their places read the rest as it is.

Some programs that run models go by a rule for the kind of a layer, such as full attention at every sixth layer,
whatever the configuration lists. A set of remaining layers fits if each of them stands where the rule gives its kind.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from functools import cache
from math import inf

import numpy as np


class Pattern:
    """Kinds of a model's layers, and those that are derived from the number of layers.

    Args:
        kinds: kind of each layer of the whole model.
        derive: returns the kind at each place of a model with so many layers.
    """

    def __init__(self, kinds: Sequence[Hashable], derive: Callable[[int], Sequence[Hashable]]) -> None:
        self.kinds = tuple(kinds)
        self.derived = cache(lambda number: tuple(derive(number)))

    def fits(self, keep: Sequence[int]) -> bool:
        """Whether each of the remaining layers, ascending, has the kind that is derived at its new place."""
        return tuple(self.kinds[layer] for layer in keep) == self.derived(len(keep))

    def fits_without(self, dropped: Collection[int]) -> bool:
        """Whether the layers that remain without some have the kinds that are derived at their new places."""
        return self.fits([layer for layer in range(len(self.kinds)) if layer not in dropped])

    def sizes(self, candidates: Collection[int], required: Collection[int] = ()) -> list[int]:
        """Return the numbers of layers that can be dropped so that the rest fits, ascending; 0 is not among them.

        Args:
            candidates: layers that may be dropped.
            required: layers among them that are dropped in any case.
        """
        at_least = max(1, len(required))
        at_most = min(len(candidates), len(self.kinds) - 1)
        return [number for number in range(at_least, at_most + 1) if self._count(number, candidates, required) > 0]

    def cheapest(self, costs: Sequence[float], number: int, candidates: Collection[int]) -> tuple[int, ...] | None:
        """Return the layers to drop, ascending, with the least sum of costs so that the rest fits; None if none does.

        It is the shortest path over the layers: with i layers seen and j of them kept, the least cost is that of
        dropping layer i, or of keeping it, where its kind is the one that is derived at place j.

        Args:
            costs: cost of dropping each layer.
            number: number of layers to drop.
            candidates: layers that may be dropped.
        """
        kept_number = len(self.kinds) - number
        derived = self.derived(kept_number)
        droppable = set(candidates)
        # least[j]: least cost of the layers seen so far, of which j are kept.
        least = [0.0] + [inf] * kept_number
        is_dropped: list[list[bool]] = []
        for layer, kind in enumerate(self.kinds):
            dropping = [cost + costs[layer] if layer in droppable else inf for cost in least]
            keeping = [inf] * (kept_number + 1)
            for place in range(kept_number):
                if derived[place] == kind:
                    keeping[place + 1] = least[place]
            # Of equal sums, the one that drops earlier layers is taken, as of equal scores.
            is_dropped.append([drop < keep for drop, keep in zip(dropping, keeping, strict=True)])
            least = [min(drop, keep) for drop, keep in zip(dropping, keeping, strict=True)]
        if least[kept_number] == inf:
            return None
        dropped = []
        place = kept_number
        for layer in reversed(range(len(self.kinds))):
            if is_dropped[layer][place]:
                dropped.append(layer)
            else:
                place -= 1
        return tuple(reversed(dropped))

    def draw(self, number: int, candidates: Collection[int], seed: int) -> tuple[int, ...] | None:
        """Return layers to drop at random, each set after which the rest fits with equal probability; None without any.

        Args:
            number, candidates: as for `cheapest`.
        """
        counts = self._counts(number, candidates, ())
        place = len(self.kinds) - number
        if counts[-1][place] == 0:
            return None
        rng = np.random.default_rng(seed)
        droppable = set(candidates)
        dropped = []
        for layer in reversed(range(len(self.kinds))):
            # The number of sets whose first layers lead here, with this layer dropped, of all of them.
            dropping = counts[layer][place] if layer in droppable else 0
            if _below(rng, counts[layer + 1][place]) < dropping:
                dropped.append(layer)
            else:
                place -= 1
        return tuple(reversed(dropped))

    def can_complete(self, dropped: Collection[int], number: int, candidates: Collection[int]) -> bool:
        """Whether more layers can be dropped, up to a number in all, so that the rest fits.

        Args:
            dropped: layers that are dropped already.
            number, candidates: as for `cheapest`.
        """
        return self._count(number, candidates, dropped) > 0

    def _count(self, number: int, candidates: Collection[int], required: Collection[int]) -> int:
        """Return the number of sets of layers to drop after which the rest fits."""
        return self._counts(number, candidates, required)[-1][len(self.kinds) - number]

    def _counts(self, number: int, candidates: Collection[int], required: Collection[int]) -> list[list[int]]:
        """Return, by the number of layers seen and of those kept, in how many ways they can be dropped and kept."""
        kept_number = len(self.kinds) - number
        derived = self.derived(kept_number)
        droppable = set(candidates)
        ways = [1] + [0] * kept_number
        counts = [ways]
        for layer, kind in enumerate(self.kinds):
            after = list(ways) if layer in droppable else [0] * (kept_number + 1)
            if layer not in required:
                for place in range(kept_number):
                    if derived[place] == kind:
                        after[place + 1] += ways[place]
            ways = after
            counts.append(ways)
        return counts


def _below(rng: np.random.Generator, bound: int) -> int:
    """Return a random integer below a bound that may be larger than 64 bits hold."""
    length = bound.bit_length()
    while True:
        value = int.from_bytes(rng.bytes((length + 7) // 8), "little") >> (-length % 8)
        if value < bound:
            return value
