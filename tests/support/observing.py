"""Observation of a model's layers in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from avss_dist.measure.observer import Observer, attached
from avss_dist.models.structure.layers import Layer


@contextmanager
def observe(
    layers: Sequence[Layer],
    sites: Sequence[str],
    thresholds: Sequence[float],
    *,
    passes: int | None = None,
    heartbeat: Callable[[], None] | None = None,
) -> Iterator[Observer]:
    """Attach hooks and yield an observer. The hooks are removed on exit, also after an exception."""
    with attached(layers, sites) as hooks:
        yield Observer(hooks, thresholds, passes=passes, heartbeat=heartbeat)
