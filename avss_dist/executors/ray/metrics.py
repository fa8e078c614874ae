"""Progress as Ray metrics, which the dashboard and Prometheus show."""

from __future__ import annotations

from typing import Any

from ray.util.metrics import Counter, Gauge

from avss_dist.core.errors import AvssError
from avss_dist.stats.layer_stats import ShardResult
from avss_dist.tasks.cells import Cell
from avss_dist.warehouse.sharing import Receipt


class Metrics:
    """Counters of tokens, shards, cells and runs, and a gauge of replicas. The rate of ``avss_tokens`` is tokens/s."""

    def __init__(self) -> None:
        self._tokens = Counter("avss_tokens", description="Tokens measured, each once.")
        self._shards = Counter("avss_shards", description="Shards measured, each once.")
        self._runs = Counter("avss_runs", description="Runs that ended.", tag_keys=("status",))
        self._replicas = Gauge("avss_replicas", description="Replicas that have a place in the cluster.")
        self._cells = Counter("avss_cells", description="Cells of evaluations that ended.", tag_keys=("status",))

    def replicas(self, number: int) -> None:
        """Record the number of placed replicas."""
        self._replicas.set(number)

    def count(self, source: Any, result: Any, *, is_last: bool) -> None:
        """Count an outcome.

        Args:
            source: the run or the cell that the outcome belongs to.
            result: a result, or the error that ended the source.
            is_last: whether its queue has no unfinished unit.
        """
        status = {"status": "failed" if isinstance(result, AvssError) else "done"}
        if isinstance(source, Cell):
            self._cells.inc(tags=status)
            return
        if isinstance(result, ShardResult | Receipt):
            if result.num_tokens:
                self._tokens.inc(result.num_tokens)
            self._shards.inc()
        if is_last:
            self._runs.inc(tags=status)
