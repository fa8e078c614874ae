"""Events that functions of the package tell of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

Event = TypeVar("Event")


def events_of(kind: type[Event], events: Iterable[Any]) -> list[Event]:
    """Return the events of a kind, in their order."""
    return [event for event in events if isinstance(event, kind)]
