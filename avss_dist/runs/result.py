"""The result of scoring one checkpoint, as people hold it. It is read without torch."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from avss_dist.core.results import TabularResult
from avss_dist.core.sites import SITES
from avss_dist.core.thresholds import PUBLISHED_THRESHOLD
from avss_dist.stats.catalog import BASELINES, RECIPES
from avss_dist.warehouse.reader import Warehouse

SHOWN = ("layer", "depth", "avss_smoothed", "avss_low", "avss_high", "rank", "variance", "sparsity", *BASELINES)
"""Columns of the table of a run, in order, of those that its scores have."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Run(TabularResult):
    """One checkpoint scored on one corpus. Its table has the scores.

    Attributes:
        run_id: id in the warehouse.
        model: the model as the user named it.
        warehouse: folder or URI of its warehouse.
        status: ``done``, ``skipped`` (it was done before) or ``failed``.
        num_shards, resumed_shards: number of shards, and of those that an earlier attempt measured.
        num_tokens: tokens that count in the statistics.
        seconds: wall time of this attempt, since its text was read.
        error: error message of a failed run, or None.
    """

    run_id: str
    model: str
    warehouse: str
    status: str
    num_shards: int = 0
    resumed_shards: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    error: str | None = None

    _bars = ("avss_smoothed",)

    def table(self) -> pa.Table:
        """Return the scores at the published site, recipe and threshold, by layer. See `scores` for others."""
        scores = self.scores(site=SITES[0], recipe=RECIPES[0], threshold=PUBLISHED_THRESHOLD, threshold_kind="absolute")
        shown = [name for name in SHOWN if name in scores.column_names]
        return scores.sort_by("layer").select(shown)

    def summary(self) -> str:
        """Return the run id, status and number of tokens, in a line."""
        return f"{self.run_id}, {self.status}, {self.num_tokens:,} tokens"

    def scores(self, **equals: object) -> pa.Table:
        """Return this run's rows of ``scores`` whose columns equal the given values: ``run.scores(site="block")``."""
        return Warehouse(self.warehouse).scores(run_id=self.run_id, **equals)
