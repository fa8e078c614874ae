"""The scores of a run's layers as a table with bars, and the quantiles of their values, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import isnan
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from avss_dist.analysis.findings import TRACKS_DEPTH
from avss_dist.analysis.section import (
    BarColumn,
    ReportColumn,
    ReportTable,
    column_of,
    known_interval,
)
from avss_dist.analysis.thresholds import INTERPOLATED
from avss_dist.core.registry import LOWEST_SHARE, SCORES
from avss_dist.core.text import describe_count, describe_layers, describe_threshold
from avss_dist.reports.terminal.tables import FittedTable
from avss_dist.stats.intervals import why_no_interval
from avss_dist.stats.layer_stats import bin_edges
from avss_dist.stats.rankings import count_lowest, depth_correlation

OF_SHARDS = ("95% interval", "lowest 25%")  # columns that a run of too few shards does not have


def layer_table(run: Mapping[str, Any], scores: Sequence[Mapping[str, Any]], own: Sequence[str] = ()) -> RenderableType:
    """Return a table with a row for each layer: smoothed AVSS, its rank and certainty, block influence.

    Args:
        run: a row of ``runs``.
        scores: rows of ``scores`` of one site, recipe and threshold.
        own: names of the scores that people bring, which are columns of the rows.
    """
    first, count = scores[0], count_lowest(len(scores))
    lowest = [s["rank"] is not None and s["rank"] <= count for s in scores]
    threshold = describe_threshold(first["threshold"], first["threshold_kind"])
    column, number = partial(column_of, scores), "{:z.4g}".format
    intervals = [known_interval(s["avss_low"], s["avss_high"]) for s in scores]
    columns: list[ReportColumn | BarColumn] = [
        column("layer", "layer"),
        BarColumn(values=[s["avss_smoothed"] for s in scores], marked=lowest),
        column(SCORES["avss"].title, "avss_smoothed", number),
        ReportColumn("95% interval", intervals, lambda ends: "{:z.4g} .. {:z.4g}".format(*ends), priority=4),
        column("rank", "rank"),
        column("lowest 25%", "lowest_set_probability", "{:z.0%}".format, 3),
        column("variance", "variance", number, 6),
        column("near zero", "near_zero_count", "{:,.0f}".format, 5),
        column("block influence", "block_influence", number, 2),
        *(column(name, name, number, 1) for name in own),
    ]
    if why_no_interval(run["num_shards"] or 0):
        columns = [one for one in columns if isinstance(one, BarColumn) or one.heading not in OF_SHARDS]
    table = ReportTable(
        columns=columns,
        title=f"{run['model']}  {first['site']} / {first['recipe']} / |x| < {threshold}",
        caption=_caption(run, scores, count),
        marked=lowest,
    )
    notes = [Text(f"note: {note}", style="yellow") for note in run["notes"] or []]
    return Group(FittedTable(table), *notes)


def describe_exactness(scores: Sequence[Mapping[str, Any]]) -> str:
    """Return a sentence on the error of interpolated near-zero counts and the nearest exact ones, if any."""
    inexact = [s for s in scores if s["exactness"] == INTERPOLATED]
    if not inexact:
        return ""
    off = max(max(s["near_zero_high"] - k, k - s["near_zero_low"]) / k for s in inexact if (k := s["near_zero_count"]))
    where = (
        " Exact: {:.10g} and {:.10g}.".format(*bin_edges(scores[0]["threshold"]))
        if scores[0]["threshold_kind"] == "absolute"
        else ""
    )
    return (
        f"{len(inexact)} of {len(scores)} near-zero counts are interpolated from stored counts, and off by {off:.0%} "
        f"at the very most.{where}"
    )


def _caption(run: Mapping[str, Any], scores: Sequence[Mapping[str, Any]], lowest: int) -> str:
    noisy, weights = sum(s["quality"] != "ok" for s in scores), ""
    if run.get("quantization"):
        computed = f", computed by {run['quantized_modules']}" if run.get("quantized_modules") else ""
        weights = f"Weights: {run['quantization']}{computed}.\n"
    text = (
        f"{run['run_id']}: {describe_count(run['num_tokens'])} tokens of {run['corpus']}, "
        f"{run['dtype']} on {run['device']}.\n{weights}"
        f"* the {'layer' if lowest == 1 else f'{lowest} layers'} with the lowest {SCORES['avss'].title}, "
        f"{LOWEST_SHARE:.0%} of {len(scores)}"
    )
    resampled = "; 'lowest 25%' is the share of resamples of the shards in which a layer is among them."
    missing = why_no_interval(run["num_shards"] or 0)
    text += f".\n{missing}" if missing else resampled
    if unranked := [s["layer"] for s in scores if s["rank"] is None and s["avss_smoothed"] is not None]:
        text += f"\nNaN or infinite activations in layers {describe_layers(unranked)}: they have no rank."
    if noisy:
        text += f"\n{noisy} of {len(scores)} layers have fewer than 100 near-zero elements: their sparsity is noise."
    depth = depth_correlation([s["avss_smoothed"] for s in scores])
    if abs(depth) > TRACKS_DEPTH:
        text += f"\nThis score tracks depth (Spearman {depth:z.3f}): it says little beyond the layer's position."
    return text


def quantiles_table(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Return a table of the quantiles of one run and site: a row for each layer, a column for each share."""
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    texts = {
        (row["layer"], row["share"]): f"{row['value']:.4g}"
        + (f" ({row['rms_multiple']:.3g} x RMS)" if row["rms_multiple"] else "")
        for row in rows
        if row["value"] is not None and not isnan(row["value"])
    }
    columns = [
        ReportColumn(f"|x| below which {share:.4g}", [texts.get((layer, share)) for layer in layers])
        for share in dict.fromkeys(row["share"] for row in rows)
    ]
    exact = all(row["low"] == row["high"] for row in rows if row["low"] is not None)
    inexact = "The truth lies close by: --format csv has the edges between which it is."
    table = ReportTable(
        title=f"{rows[0]['run_id']}  {rows[0]['site']}",
        columns=[ReportColumn("layer", layers), *columns],
        caption="Every one is exact: each value was counted." if exact else inexact,
    )
    return FittedTable(table)
