"""Bounded memory for the statistics of many blocks: large arrays beyond the limit are mapped from a file."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

import numpy as np

from avss_dist.stats.layer_stats import LayerKey, LayerStats, StratumKey

KEPT_BYTES = 128 << 20
_LARGE = ("histogram", "unit_sum", "unit_sum_sq")

Key = TypeVar("Key", LayerKey, StratumKey)


class Spill:
    """Store of statistics that keeps at most `KEPT_BYTES` of large arrays in memory.

    Further arrays are written to unnamed temporary files, which vanish with the process. If a file cannot be written,
    the arrays stay in memory.
    """

    def __init__(self) -> None:
        self._room = KEPT_BYTES

    def keep(self, stats: Mapping[Key, LayerStats]) -> Mapping[Key, LayerStats]:
        """Return the same statistics, to be treated as read-only. Their arrays may be mapped from a file."""
        self._room -= sum(getattr(layer_stats, name).nbytes for layer_stats in stats.values() for name in _LARGE)
        if self._room >= 0 or not stats:
            return stats
        try:
            return _mapped(stats)
        except OSError:
            return stats


def _mapped(stats: Mapping[Key, LayerStats]) -> Mapping[Key, LayerStats]:
    """Return the same statistics with their large fields in one memory-mapped file."""
    with tempfile.TemporaryFile() as file:
        for layer_stats in stats.values():
            for name in _LARGE:
                file.write(getattr(layer_stats, name).tobytes())
        file.flush()
        whole = np.asarray(np.memmap(file, np.uint8, "r"))
    mapped, at = {}, 0
    for key, layer_stats in stats.items():
        fields = {}
        for name in _LARGE:
            field = getattr(layer_stats, name)
            fields[name] = whole[at : at + field.nbytes].view(field.dtype)
            at += field.nbytes
        mapped[key] = replace(layer_stats, **fields)
    return mapped
