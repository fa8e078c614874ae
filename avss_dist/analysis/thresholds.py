"""Scores at any threshold, and quantiles of abs(x), from what a run stored: no model runs again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from avss_dist.stats.intervals import BOOTSTRAP_BLOCKS
from avss_dist.stats.layer_stats import Float64, LayerKey, LayerStats
from avss_dist.stats.merging import merge_blocks
from avss_dist.stats.scores import Threshold, score_run
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.schema import SCHEMAS

EXACT, INTERPOLATED = "exact", "interpolated"
SCORES = pa.schema(
    [
        *SCHEMAS["scores"],
        ("exactness", pa.string()),
        *((name, pa.float64()) for name in ("near_zero_low", "near_zero_high")),
    ]
)
"""The columns of ``scores``; ``exactness``, ``exact`` or ``interpolated``; and between what the near-zero count
certainly is, which is itself where it is exact: see `LayerStats.below`.
"""

_PLACE = [SCHEMAS["layer_stats"].field(name) for name in ("run_id", "model", "layer", "layer_name", "depth", "site")]
QUANTILES = pa.schema([*_PLACE, *((name, pa.float64()) for name in ("share", "value", "rms_multiple", "low", "high"))])
"""``share`` of the elements have abs(x) up to ``value``, which is ``rms_multiple`` times the RMS of the layer and site.

The truth is between ``low`` and ``high``, which are ``value`` where it is exact.
"""


def scores_at(
    warehouse: Warehouse, runs: Sequence[Mapping[str, Any]], threshold: Threshold, *, sites: Sequence[str] | None = None
) -> pa.Table:
    """The scores of runs at one threshold, with intervals where the shards' statistics are kept.

    Near-zero counts are exact in 16-bit dtypes, of which every value is counted. Float32 ones are counted cut to 128
    values an octave: exact at these and where the threshold was counted, else linear in between, and seldom as much as
    1% off. The recipe ``unit`` is always exact.

    Args:
        runs: rows of ``runs``, of runs that are done.
        sites: which ones; all of them by default.

    Returns:
        A table of `SCORES`.

    Raises:
        WarehouseError: as `Warehouse.read_layer_stats`.
    """
    rows: list[dict[str, Any]] = []
    for run in runs:
        identity = {name: run[name] for name in ("run_id", "model", "revision", "family")}
        stats, shards = warehouse.readable_layer_stats(run["run_id"]), _blocks(warehouse, run)
        if not stats:
            continue
        for row in score_run(stats, _layer_names(warehouse, run), shards, [threshold], sites):
            measured = stats[row["layer"], row["site"]]
            below = measured.below(threshold.at(measured))
            cut = row["recipe"] != "unit" and below.low < below.high
            low, high = below[1:] if cut else (row["near_zero_count"],) * 2
            exactness = INTERPOLATED if cut else EXACT
            rows.append({**identity, **row, "exactness": exactness, "near_zero_low": low, "near_zero_high": high})
    arrays = [pa.array([row[f.name] for row in rows], f.type, from_pandas=True) for f in SCORES]
    return pa.Table.from_arrays(arrays, schema=SCORES)


def layer_scores(
    warehouse: Warehouse, runs: Sequence[Mapping[str, Any]], threshold: Threshold, *, site: str, recipe: str
) -> pa.Table:
    """The scores of runs at one threshold, site and recipe, by run and layer: those that are stored, else `scores_at`.

    Args:
        runs: rows of ``runs``, of runs that are done.

    Returns:
        A table of `SCORES`. Of scores stored at an absolute threshold, every count is exact; of others that are
        stored, ``exactness`` is null. It is empty where no run has that site and recipe.

    Raises:
        WarehouseError: as `Warehouse.read_layer_stats`.
    """
    at = {"site": site, "recipe": recipe, "threshold": threshold.value, "threshold_kind": threshold.kind}
    where = pc.scalar(True)
    for name, wanted in at.items():
        where &= pc.field(name) == wanted
    stored = warehouse.table("scores", run_ids=[run["run_id"] for run in runs], where=where)
    left = {run["run_id"]: run for run in runs} | dict.fromkeys(stored["run_id"].to_pylist())
    missing = [run for run in left.values() if run and site in (run["sites"] or [site])]
    computed = scores_at(warehouse, missing, threshold, sites=[site])
    found = pa.concat_tables([_with_exactness(stored), computed.filter(pc.field("recipe") == recipe)])
    return found.sort_by([("run_id", "ascending"), ("layer", "ascending")])


def _with_exactness(stored: pa.Table) -> pa.Table:
    """Rows of ``scores`` as `SCORES` has them."""
    exact = pc.equal(stored["threshold_kind"], "absolute")
    counts = pc.if_else(exact, stored["near_zero_count"].cast(pa.float64()), None)
    columns = {name: stored[name] for name in SCHEMAS["scores"].names}
    columns |= {"exactness": pc.if_else(exact, EXACT, None), "near_zero_low": counts, "near_zero_high": counts}
    return pa.table(columns).cast(SCORES)


def quantiles(
    warehouse: Warehouse, runs: Sequence[Mapping[str, Any]], shares: Sequence[float], sites: Sequence[str] | None = None
) -> pa.Table:
    """Quantiles of abs(x) by layer and site: the threshold at which a share of the elements is near zero.

    Args:
        runs: rows of ``runs``, of runs that are done.
        shares: each between 0 and 1.
        sites: which ones; all of them by default.

    Returns:
        A table of `QUANTILES`.

    Raises:
        ValueError: a share is not between 0 and 1.
        WarehouseError: as `Warehouse.read_layer_stats`.
    """
    if wrong := [share for share in shares if not 0 <= share <= 1]:
        raise ValueError(f"a share is between 0 and 1, not {wrong[0]}")
    return pa.Table.from_pylist([row for run in runs for row in _quantiles(warehouse, run, shares, sites)], QUANTILES)


def _quantiles(
    warehouse: Warehouse, run: Mapping[str, Any], shares: Sequence[float], sites: Sequence[str] | None
) -> Iterator[dict[str, Any]]:
    measured = warehouse.readable_layer_stats(run["run_id"])
    names = _layer_names(warehouse, run)
    for (layer, site), stats in measured.items():
        if sites is not None and site not in sites:
            continue
        for share, value, low, high in zip(shares, *quantiles_of(stats, shares), strict=True):
            yield {
                "run_id": run["run_id"],
                "model": run["model"],
                "layer": layer,
                "layer_name": names[layer],
                "depth": (layer + 0.5) / len(names),
                "site": site,
                "share": share,
                "value": float(value),
                "rms_multiple": float(value / stats.rms) if stats.rms > 0 else None,
                "low": float(low),
                "high": float(high),
            }


def quantiles_of(stats: LayerStats, shares: Sequence[float]) -> tuple[Float64, Float64, Float64]:
    """Quantiles of abs(x), and between what each certainly is, each float64[shares].

    The smallest value that a share of the elements does not exceed; where values are cut, or only the histogram is
    known, linear between the edges that the truth lies in. 0 where exact zeros alone are that many, at most
    ``max_abs``, NaN without elements.
    """
    wanted = np.asarray(shares, float) * stats.count
    if not stats.count:
        return (np.full(len(wanted), np.nan),) * 3
    lows, highs, counts = stats.bins
    upto = np.cumsum(counts)
    at = np.minimum(np.searchsorted(upto, wanted), len(upto) - 1)
    low, high = lows[at], np.minimum(highs[at], stats.max_abs)
    value = low + (high - low) * np.clip((wanted - upto[at]) / counts[at] + 1, 0, 1)
    nothing = wanted <= stats.zero_count
    return np.where(nothing, 0.0, value), np.where(nothing, 0.0, low), np.where(nothing, 0.0, high)


def _layer_names(warehouse: Warehouse, run: Mapping[str, Any]) -> list[str]:
    """Module path of every layer of the model; empty for one that was not measured."""
    rows = warehouse.table("layer_stats", run_ids=[run["run_id"]], columns=["layer", "layer_name"]).to_pylist()
    names = {row["layer"]: row["layer_name"] for row in rows}
    return [names.get(i, "") for i in range(max([run["num_layers"] or 0, *(i + 1 for i in names)]))]


def _blocks(warehouse: Warehouse, run: Mapping[str, Any]) -> list[Mapping[LayerKey, LayerStats]]:
    """The run's partials as they were resampled when it was scored; none where some are gone."""
    shards = warehouse.read_partials(run)
    return merge_blocks(shards, BOOTSTRAP_BLOCKS).blocks if shards else []
