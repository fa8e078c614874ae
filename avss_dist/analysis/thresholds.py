"""Scores at any threshold, and quantiles of abs(x), from the stored statistics of a run. No model is run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from avss_dist.core.values import NewRow, TableRow
from avss_dist.stats.intervals import BOOTSTRAP_BLOCKS
from avss_dist.stats.layer_stats import Float64, LayerStats, merge_blocks
from avss_dist.stats.scores import Threshold, score_run
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.schema import SCHEMAS, columns_of

EXACT = "exact"
INTERPOLATED = "interpolated"
SCORES = pa.schema(
    [
        *SCHEMAS["scores"],
        ("exactness", pa.string()),
        ("near_zero_low", pa.float64()),
        ("near_zero_high", pa.float64()),
    ]
)
"""Columns of ``scores``, with the exactness and the bounds of the near-zero count.

``exactness`` is ``exact`` or ``interpolated``. The bounds are equal if the count is exact: see `LayerStats.below`.
"""

_PLACE = [SCHEMAS["layer_stats"].field(name) for name in ("run_id", "model", "layer", "layer_name", "depth", "site")]
QUANTILES = pa.schema(
    [
        *_PLACE,
        ("share", pa.float64()),
        ("value", pa.float64()),
        ("rms_multiple", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
    ]
)
"""Columns of a quantile: ``share`` of the elements have abs(x) up to ``value``.

``rms_multiple`` is ``value`` over the RMS of the layer and site. The true quantile is between ``low`` and ``high``,
which equal ``value`` if it is exact.
"""


def scores_at(
    warehouse: Warehouse, runs: Sequence[TableRow], threshold: Threshold, *, sites: Sequence[str] | None = None
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
    rows: list[NewRow] = []
    for run in runs:
        rows += _scores_of_run(warehouse, run, threshold, sites)
    return pa.table(columns_of(rows, SCORES), SCORES)


def _scores_of_run(
    warehouse: Warehouse, run: TableRow, threshold: Threshold, sites: Sequence[str] | None
) -> list[NewRow]:
    """Return the rows of `scores_at` of one run."""
    stats = warehouse.readable_layer_stats(run["run_id"])
    shards = warehouse.read_partials(run)
    if not stats:
        return []
    blocks: Sequence[Mapping[tuple[int, str], LayerStats]] = []
    if shards:
        # The same blocks are resampled as when the run was scored.
        blocks = merge_blocks(shards, BOOTSTRAP_BLOCKS).blocks
    rows = []
    for score in score_run(stats, _layer_names(warehouse, run), blocks, [threshold], sites):
        measured = stats[score["layer"], score["site"]]
        _, low, high = measured.below(threshold.at(measured))
        is_exact = score["recipe"] == "unit" or low == high
        if is_exact:
            low = score["near_zero_count"]
            high = score["near_zero_count"]
        row = {name: run[name] for name in ("run_id", "model", "revision", "family")}
        row |= score
        row["exactness"] = INTERPOLATED if low < high else EXACT
        row["near_zero_low"] = low
        row["near_zero_high"] = high
        rows.append(row)
    return rows


def at_reading(
    site: str | None = None, recipe: str | None = None, threshold: float | None = None, kind: str | None = None
) -> pc.Expression:
    """Return the condition that a row of ``scores`` is of a reading of AVSS, where None is any."""
    condition = pc.scalar(True)
    if site is not None:
        condition = condition & (pc.field("site") == site)
    if recipe is not None:
        condition = condition & (pc.field("recipe") == recipe)
    if threshold is not None:
        condition = condition & (pc.field("threshold") == threshold)
    if kind is not None:
        condition = condition & (pc.field("threshold_kind") == kind)
    return condition


def layer_scores(
    warehouse: Warehouse, runs: Sequence[TableRow], threshold: Threshold, *, site: str, recipe: str
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
    with_scores = set(stored["run_id"].to_pylist())
    unscored: dict[str, TableRow] = {}
    for run in runs:
        sites = run["sites"] or [site]
        if run["run_id"] not in with_scores and site in sites:
            unscored[run["run_id"]] = run
    computed = scores_at(warehouse, list(unscored.values()), threshold, sites=[site])
    computed = computed.filter(pc.equal(computed["recipe"], recipe))
    scores = pa.concat_tables([_with_exactness(stored), computed])
    return scores.sort_by([("run_id", "ascending"), ("layer", "ascending")])


def _with_exactness(stored: pa.Table) -> pa.Table:
    """Return rows of ``scores`` as a table of `SCORES`, where the counts at absolute thresholds are exact."""
    is_exact = pc.equal(stored["threshold_kind"], "absolute")
    counts = pc.if_else(is_exact, stored["near_zero_count"].cast(pa.float64()), None)
    columns = {name: stored[name] for name in SCHEMAS["scores"].names}
    columns["exactness"] = pc.if_else(is_exact, EXACT, None)
    columns["near_zero_low"] = counts
    columns["near_zero_high"] = counts
    return pa.table(columns).cast(SCORES)


def quantiles(
    warehouse: Warehouse, runs: Sequence[TableRow], shares: Sequence[float], sites: Sequence[str] | None = None
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
    for share in shares:
        if not 0 <= share <= 1:
            raise ValueError(f"a share is between 0 and 1, not {share}")
    rows: list[NewRow] = []
    for run in runs:
        names = _layer_names(warehouse, run)
        for (layer, site), stats in warehouse.readable_layer_stats(run["run_id"]).items():
            if sites is not None and site not in sites:
                continue
            for row in _quantile_rows(stats, shares):
                row["run_id"] = run["run_id"]
                row["model"] = run["model"]
                row["layer"] = layer
                row["layer_name"] = names[layer]
                row["depth"] = (layer + 0.5) / len(names)
                row["site"] = site
                rows.append(row)
    return pa.Table.from_pylist(rows, QUANTILES)


def _quantile_rows(stats: LayerStats, shares: Sequence[float]) -> Iterator[NewRow]:
    """Yield the quantile of each share at one layer and site, without the columns that name these."""
    values, lows, highs = quantiles_of(stats, shares)
    rms = stats.rms
    for share, value, low, high in zip(shares, values.tolist(), lows.tolist(), highs.tolist(), strict=True):
        rms_multiple = value / rms if rms > 0 else None
        yield {"share": share, "value": value, "rms_multiple": rms_multiple, "low": low, "high": high}


def quantiles_of(stats: LayerStats, shares: Sequence[float] | Float64) -> tuple[Float64, Float64, Float64]:
    """Return the quantiles of abs(x) and their lower and upper bounds, each float64[shares].

    A quantile is the smallest value that at least a share of the elements does not exceed. If values are cut,
    it is interpolated linearly between the bounds of the cut value, up to ``max_abs``. It is 0 if exact zeros make up
    the share, and NaN without elements.
    """
    ranks = np.asarray(shares, float) * stats.count
    if not stats.count:
        unknown = np.full(len(ranks), np.nan)
        return unknown, unknown, unknown
    bin_lows, bin_highs, counts = stats.bins
    cumulative = np.cumsum(counts)
    bins = np.minimum(np.searchsorted(cumulative, ranks), len(cumulative) - 1)
    low = bin_lows[bins]
    high = np.minimum(bin_highs[bins], stats.max_abs)
    share_of_bin = np.clip((ranks - cumulative[bins]) / counts[bins] + 1, 0, 1)
    value = low + (high - low) * share_of_bin
    is_zero = ranks <= stats.zero_count
    return np.where(is_zero, 0.0, value), np.where(is_zero, 0.0, low), np.where(is_zero, 0.0, high)


def _layer_names(warehouse: Warehouse, run: TableRow) -> list[str]:
    """Return the module path of every layer of the model. Layers that were not measured have an empty path."""
    rows = warehouse.table("layer_stats", run_ids=[run["run_id"]], columns=["layer", "layer_name"]).to_pylist()
    names = {row["layer"]: row["layer_name"] for row in rows}
    num_layers = max([run["num_layers"] or 0, *(layer + 1 for layer in names)])
    return [names.get(layer, "") for layer in range(num_layers)]
