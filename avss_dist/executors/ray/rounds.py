"""What gangs are doing: rounds, by the references that they wait for and by gang."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from avss_dist.executors.ray.gang import Gang
from avss_dist.executors.ray.queue import UnitQueue

Awaited = dict[Any, Sequence[int]]  # units by the reference to their results


@dataclass(eq=False, kw_only=True)
class Round:
    """What a gang is doing: waiting for a place, opening a model (both without units), or measuring.

    Attributes:
        queue: whose model it opens or measures with; of one that waits for a place, the one that it was hired for.
        awaited: references, each with the units that it gives the results of.
        rows: of a batch.
        begun: when the gang was given it, or was done with the one before it.
    """

    gang: Gang
    queue: UnitQueue[Any]
    units: Sequence[int]
    awaited: Awaited
    rows: int
    begun: float = field(default_factory=time.monotonic)

    @property
    def is_coming(self) -> bool:
        """Whether its gang waits for a place."""
        return self.gang.placed in self.awaited


class Rounds:
    """The rounds that are under way: of each gang one, or two, of which the second waits for the first."""

    def __init__(self) -> None:
        self._by_reference: dict[Any, Round] = {}
        self._by_gang: dict[Gang, list[Round]] = {}

    def __iter__(self) -> Iterator[Round]:
        return iter([round_ for of_gang in self._by_gang.values() for round_ in of_gang])

    @property
    def references(self) -> list[Any]:
        """What is waited for."""
        return list(self._by_reference)

    @property
    def gangs(self) -> Collection[Gang]:
        """Those that are in a round."""
        return self._by_gang.keys()

    def find(self, reference: Any) -> Round | None:
        """The round that waits for a reference, if one does."""
        return self._by_reference.get(reference)

    def of(self, gang: Gang) -> list[Round]:
        """What a gang does, and what it does next."""
        return self._by_gang.get(gang, [])

    def waits(self, round_: Round) -> bool:
        """Whether its gang does something else before it."""
        return self._by_gang[round_.gang][0] is not round_

    def begin(self, round_: Round) -> None:
        """A gang is given a round."""
        self._by_reference |= dict.fromkeys(round_.awaited, round_)
        self._by_gang.setdefault(round_.gang, []).append(round_)

    def receive(self, reference: Any) -> Sequence[int]:
        """A reference has come; the units that it gives the results of."""
        return self._by_reference.pop(reference).awaited.pop(reference)

    def end(self, round_: Round) -> None:
        """A round is done, or given up; its gang begins the next one."""
        for reference in round_.awaited:
            self._by_reference.pop(reference, None)
        first, *rest = self._by_gang.pop(round_.gang)
        if round_ is not first:
            self._by_gang[round_.gang] = [first]
        elif rest:
            rest[0].begun = time.monotonic()
            self._by_gang[round_.gang] = rest

    def clear(self) -> None:
        """Wait for nothing any more."""
        self._by_reference.clear()
        self._by_gang.clear()
