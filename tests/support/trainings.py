"""Shards of the checkpoints of made-up trainings."""

from __future__ import annotations

from functools import cache

import numpy as np

from support.warehouses import Stats, stats_of

LAYERS = 5
SCALES = (1.0, 2.0, 4.0, 8.0, 16.0)
CHANGED = (1.0, 7.0, 4.0, 8.0, 16.0)  # layer 1 passes layer 2


@cache
def shards_of(step: int, scales: tuple[float, ...], shards: int = 16) -> list[Stats]:
    """Statistics of shards of two rows, whose noise differs between steps, layers and shards."""
    random = np.random.default_rng(step // 100)
    shape = (shards, LAYERS, 2, 2, 16)
    x = random.normal(size=shape) * np.array(scales)[:, None, None, None]
    return stats_of(np.where(random.random(shape) < 0.1, 1e-7, x).astype(np.float32).astype(np.float64))
