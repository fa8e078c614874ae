"""Rounds of gangs, indexed by awaited reference and by gang."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from avss_dist.executors.ray.gang import Gang
from avss_dist.executors.ray.queue import UnitQueue

Awaited = dict[Any, Sequence[int]]  # units by the reference to their results


@dataclass(eq=False, kw_only=True)
class Round:
    """Current work of a gang: waiting for a place, opening a model (both without units), or measuring.

    Attributes:
        queue: queue whose model is opened or measured; for a gang that waits for a place, the queue that started it.
        awaited: units by the reference to their results.
        rows: rows in a batch.
        begun: monotonic time when the gang got the round, or finished the one before it.
    """

    gang: Gang
    queue: UnitQueue[Any]
    units: Sequence[int]
    awaited: Awaited
    rows: int
    begun: float

    @property
    def is_coming(self) -> bool:
        """Whether its gang waits for a place."""
        return self.gang.placed in self.awaited


class Rounds:
    """Rounds that are under way. A gang has one, or two of which the second waits for the first.

    Args:
        clock: returns the monotonic time in seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._by_reference: dict[Any, Round] = {}
        self._by_gang: dict[Gang, list[Round]] = {}

    def __iter__(self) -> Iterator[Round]:
        return iter([round_ for rounds in self._by_gang.values() for round_ in rounds])

    @property
    def references(self) -> list[Any]:
        """Awaited references."""
        return list(self._by_reference)

    @property
    def gangs(self) -> Collection[Gang]:
        """Gangs that have a round."""
        return self._by_gang.keys()

    def find(self, reference: Any) -> Round | None:
        """Return the round that awaits a reference, or None."""
        return self._by_reference.get(reference)

    def rounds_of(self, gang: Gang) -> list[Round]:
        """Return the rounds of a gang: the current one, then the next."""
        return self._by_gang.get(gang, [])

    def waits(self, round_: Round) -> bool:
        """Whether a round waits for an earlier round of its gang."""
        return self._by_gang[round_.gang][0] is not round_

    def begin(self, round_: Round) -> None:
        """Add a round to those of its gang."""
        self._by_reference |= dict.fromkeys(round_.awaited, round_)
        self._by_gang.setdefault(round_.gang, []).append(round_)

    def receive(self, reference: Any) -> Sequence[int]:
        """Stop awaiting a reference, and return the units that it holds the results of."""
        return self._by_reference.pop(reference).awaited.pop(reference)

    def end(self, round_: Round) -> None:
        """Remove a round that is done or given up. The next one of its gang begins."""
        for reference in round_.awaited:
            self._by_reference.pop(reference, None)
        first, *later = self._by_gang.pop(round_.gang)
        if round_ is not first:
            self._by_gang[round_.gang] = [first]
        elif later:
            later[0].begun = self._clock()
            self._by_gang[round_.gang] = later

    def clear(self) -> None:
        """Forget all rounds."""
        self._by_reference.clear()
        self._by_gang.clear()
