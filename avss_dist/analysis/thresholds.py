"""Scores at any threshold, and quantiles of abs(x), from the stored statistics of a run. No model is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import and_
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from avss_dist.stats.intervals import BOOTSTRAP_BLOCKS
from avss_dist.stats.layer_stats import Float64, LayerStats, merge_blocks
from avss_dist.stats.scores import Threshold, score_run
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.schema import SCHEMAS, columns_of

EXACT, INTERPOLATED = "exact", "interpolated"
SCORES = pa.schema(
    [
        *SCHEMAS["scores"],
        ("exactness", pa.string()),
        *((name, pa.float64()) for name in ("near_zero_low", "near_zero_high")),
    ]
)
"""Columns of ``scores``, with the exactness and the bounds of the near-zero count.

``exactness`` is ``exact`` or ``interpolated``. The bounds are equal if the count is exact: see `LayerStats.below`.
"""

_PLACE = [SCHEMAS["layer_stats"].field(name) for name in ("run_id", "model", "layer", "layer_name", "depth", "site")]
QUANTILES = pa.schema([*_PLACE, *((name, pa.float64()) for name in ("share", "value", "rms_multiple", "low", "high"))])
"""Columns of a quantile: ``share`` of the elements have abs(x) up to ``value``.

``rms_multiple`` is ``value`` over the RMS of the layer and site. The true quantile is between ``low`` and ``high``,
which equal ``value`` if it is exact.
"""


def scores_at(
    warehouse: Warehouse, runs: Sequence[Mapping[str, Any]], threshold: Threshold, *, sites: Sequence[str] | None = None
) -> pa.Table:
    """Return the scores of runs at one threshold, with intervals if the shards' statistics are kept.

    Near-zero counts of 16-bit dtypes are exact, because every value is counted. Float32 values are truncated to 128
    values per octave. Their near-zero counts are exact at these values and at counted thresholds, and interpolated
    linearly in between, with an error that seldom reaches 1%. The recipe ``unit`` is always exact.

    Args:
        runs: rows of ``runs`` of finished runs.
        sites: sites to score, by default all.

    Returns:
        A table of `SCORES`.

    Raises:
        WarehouseError: as `Warehouse.read_layer_stats`.
    """
    rows: list[dict[str, Any]] = []
    for run in runs:
        identity = {name: run[name] for name in ("run_id", "model", "revision", "family")}
        stats, shards = warehouse.readable_layer_stats(run["run_id"]), warehouse.read_partials(run)
        blocks = merge_blocks(shards, BOOTSTRAP_BLOCKS).blocks if shards else []  # as when the run was scored
        for row in score_run(stats, _layer_names(warehouse, run), blocks, [threshold], sites) if stats else ():
            measured = stats[row["layer"], row["site"]]
            _, low, high = measured.below(threshold.at(measured))
            if row["recipe"] == "unit" or low == high:
                low = high = row["near_zero_count"]
            rows.append(
                {
                    **identity,
                    **row,
                    "exactness": INTERPOLATED if low < high else EXACT,
                    "near_zero_low": low,
                    "near_zero_high": high,
                }
            )
    return pa.table(columns_of(rows, SCORES), SCORES)


def at_reading(
    site: str | None = None, recipe: str | None = None, threshold: float | None = None, kind: str | None = None
) -> pc.Expression:
    """Return the condition that a row of ``scores`` is of a reading of AVSS, where None is any."""
    place = {"site": site, "recipe": recipe, "threshold": threshold, "threshold_kind": kind}
    conditions = (pc.field(name) == value for name, value in place.items() if value is not None)
    return reduce(and_, conditions, pc.scalar(True))


def layer_scores(
    warehouse: Warehouse, runs: Sequence[Mapping[str, Any]], threshold: Threshold, *, site: str, recipe: str
) -> pa.Table:
    """Return the scores of runs at one threshold, site and recipe, ordered by run and layer.

    Stored scores are read, missing ones are computed by `scores_at`.

    Args:
        runs: rows of ``runs`` of finished runs.

    Returns:
        A table of `SCORES`, empty if no run has the site and recipe. Stored scores are exact at an absolute threshold;
        at a relative one, their ``exactness`` is null.

    Raises:
        WarehouseError: as `Warehouse.read_layer_stats`.
    """
    stored = warehouse.table(
        "scores",
        run_ids=[run["run_id"] for run in runs],
        where=at_reading(site, recipe, threshold.value, threshold.kind),
    )
    unscored = {run["run_id"]: run for run in runs} | dict.fromkeys(stored["run_id"].to_pylist())
    missing = [run for run in unscored.values() if run and site in (run["sites"] or [site])]
    computed = scores_at(warehouse, missing, threshold, sites=[site])
    is_exact = pc.equal(stored["threshold_kind"], "absolute")
    counts = pc.if_else(is_exact, stored["near_zero_count"].cast(pa.float64()), None)
    columns = {
        **{name: stored[name] for name in SCHEMAS["scores"].names},
        "exactness": pc.if_else(is_exact, EXACT, None),
        "near_zero_low": counts,
        "near_zero_high": counts,
    }
    of_recipe = computed.filter(pc.equal(computed["recipe"], recipe))
    scores = pa.concat_tables([pa.table(columns).cast(SCORES), of_recipe])
    return scores.sort_by([("run_id", "ascending"), ("layer", "ascending")])


def quantiles(
    warehouse: Warehouse, runs: Sequence[Mapping[str, Any]], shares: Sequence[float], sites: Sequence[str] | None = None
) -> pa.Table:
    """Return the quantiles of abs(x) by layer and site: the smallest values that given shares do not exceed.

    Args:
        runs: rows of ``runs`` of finished runs.
        shares: shares of the elements, each between 0 and 1.
        sites: sites to include, by default all.

    Returns:
        A table of `QUANTILES`.

    Raises:
        ValueError: if a share is not between 0 and 1.
        WarehouseError: as `Warehouse.read_layer_stats`.
    """
    if wrong := [share for share in shares if not 0 <= share <= 1]:
        raise ValueError(f"a share is between 0 and 1, not {wrong[0]}")
    rows: list[dict[str, Any]] = []
    for run in runs:
        names = _layer_names(warehouse, run)
        for (layer, site), stats in warehouse.readable_layer_stats(run["run_id"]).items():
            if sites is not None and site not in sites:
                continue
            place = {"site": site, "layer": layer, "layer_name": names[layer], "depth": (layer + 0.5) / len(names)}
            ends = (part.tolist() for part in quantiles_of(stats, shares))
            rows += (
                {
                    "run_id": run["run_id"],
                    "model": run["model"],
                    **place,
                    "share": share,
                    "value": value,
                    "rms_multiple": value / stats.rms if stats.rms > 0 else None,
                    "low": low,
                    "high": high,
                }
                for share, value, low, high in zip(shares, *ends, strict=True)
            )
    return pa.Table.from_pylist(rows, QUANTILES)


def quantiles_of(stats: LayerStats, shares: Sequence[float] | Float64) -> tuple[Float64, Float64, Float64]:
    """Return the quantiles of abs(x) and their lower and upper bounds, each float64[shares].

    A quantile is the smallest value that at least a share of the elements does not exceed. If values are cut,
    it is interpolated linearly between the bounds of the cut value, up to ``max_abs``. It is 0 if exact zeros make up
    the share, and NaN without elements.
    """
    ranks = np.asarray(shares, float) * stats.count
    if not stats.count:
        return (np.full(len(ranks), np.nan),) * 3
    lows, highs, counts = stats.bins
    cumulative = np.cumsum(counts)
    places = np.minimum(np.searchsorted(cumulative, ranks), len(cumulative) - 1)
    low, high = lows[places], np.minimum(highs[places], stats.max_abs)
    value = low + (high - low) * np.clip((ranks - cumulative[places]) / counts[places] + 1, 0, 1)
    nothing = ranks <= stats.zero_count
    return np.where(nothing, 0.0, value), np.where(nothing, 0.0, low), np.where(nothing, 0.0, high)


def _layer_names(warehouse: Warehouse, run: Mapping[str, Any]) -> list[str]:
    """Return the module path of every layer of the model. Layers that were not measured have an empty path."""
    rows = warehouse.table("layer_stats", run_ids=[run["run_id"]], columns=["layer", "layer_name"]).to_pylist()
    names = {row["layer"]: row["layer_name"] for row in rows}
    return [names.get(i, "") for i in range(max([run["num_layers"] or 0, *(i + 1 for i in names)]))]
