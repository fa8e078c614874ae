"""The matrix of a page: the ranking of every run by relative depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc

from avss_dist.analysis.compare import READING
from avss_dist.core.text import basename, printable
from avss_dist.pruning.selection import PUBLISHED
from avss_dist.stats.layer_stats import Float64
from avss_dist.stats.rankings import average_ranks
from avss_dist.warehouse.reader import Warehouse, slices_by

MIN_RUNS = 8  # of fewer, the charts show each
UNRANKED = -1  # in place of the rank of a layer without a score
STEPS = 100  # of a rank between the least and the most important layer


def matrix_data(
    warehouse: Warehouse, runs: Sequence[Mapping[str, Any]], labels: Sequence[str]
) -> list[dict[str, Any]] | None:
    """Return the rows of the matrix, ready for JSON. None if no run has a score at the published reading of AVSS.

    Args:
        runs: rows of ``runs``.
        labels: the name of each run.

    Returns:
        For each run with scores: ``label``, ``about`` with its properties, and ``places``, that of each layer from 0
        (least important) to `STEPS`, `UNRANKED` without a score.
    """
    where = pc.scalar(True)
    for name, value in zip(READING, PUBLISHED, strict=True):
        where = where & (pc.field(name) == value)
    columns = ["run_id", "layer", "avss_smoothed"]
    scores = warehouse.table("scores", run_ids=[run["run_id"] for run in runs], columns=columns, where=where)
    scores = scores.sort_by([("run_id", "ascending"), ("layer", "ascending")])
    values = scores["avss_smoothed"].to_numpy()
    places = {key["run_id"]: _places(values[start:stop]) for key, start, stop in slices_by(scores, ["run_id"])}
    described = [
        {"label": label, "about": _properties(run), "places": places[run["run_id"]]}
        for run, label in zip(runs, labels, strict=True)
        if run["run_id"] in places
    ]
    return described or None


def _properties(run: Mapping[str, Any]) -> str:
    return printable(f"{run['family']}, {run['dtype']}, {basename(str(run['corpus']))}")


def _places(scores: Float64) -> list[int]:
    """Return the place of each layer from 0 to `STEPS`; `UNRANKED` for NaN, and where one layer has a score."""
    places = np.full(len(scores), UNRANKED)
    known = ~np.isnan(scores)
    if known.sum() > 1:
        places[known] = np.rint((average_ranks(scores[known]) - 1) / (known.sum() - 1) * STEPS)
    return list(places.tolist())
