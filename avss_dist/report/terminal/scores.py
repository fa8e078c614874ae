"""A run's layers as a table with bars, for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isnan
from typing import Any

from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.text import Text

from avss_dist.analysis.findings import TRACKS_DEPTH
from avss_dist.analysis.thresholds import INTERPOLATED
from avss_dist.report.terminal.tables import Column, FittedTable
from avss_dist.settings import LOWEST_SHARE
from avss_dist.stats.histogram import bin_edges
from avss_dist.stats.intervals import why_no_interval
from avss_dist.stats.rankings import count_lowest, depth_correlation
from avss_dist.text import describe_count, describe_layers, describe_threshold

BAR_WIDTH = 18
LOWEST = "bold red"
OF_SHARDS = ("95% interval", "lowest 25%")  # columns that a run of too few shards does not have


def layer_table(run: Mapping[str, Any], scores: Sequence[Mapping[str, Any]]) -> RenderableType:
    """One row a layer: AVSS as a bar and a number, its rank and certainty, and block influence beside it.

    Args:
        run: a row of ``runs``.
        scores: rows of ``scores`` of one site, recipe and threshold.
    """
    first, count = scores[0], count_lowest(len(scores))
    lowest = [s["rank"] is not None and s["rank"] <= count for s in scores]
    threshold = describe_threshold(first["threshold"], first["threshold_kind"])
    table = FittedTable(
        _layer_columns(scores, lowest, has_intervals=why_no_interval(run["num_shards"] or 0) is None),
        title=f"{run['model']}  {first['site']} / {first['recipe']} / |x| < {threshold}",
        caption=_caption(run, scores, count),
        styles=[LOWEST if marked else "" for marked in lowest],
    )
    notes = [Text(f"note: {note}", style="yellow") for note in run["notes"] or []]
    return Group(table, *notes)


def _layer_columns(scores: Sequence[Mapping[str, Any]], lowest: Sequence[bool], *, has_intervals: bool) -> list[Column]:
    texts: list[tuple[str, int, Callable[[Mapping[str, Any]], str]]] = [
        ("AVSS", 0, lambda s: _number(s["avss_smoothed"])),
        ("95% interval", 4, _interval),
        ("rank", 0, lambda s: str(s["rank"] or "-")),
        ("lowest 25%", 3, lambda s: _percent(s["lowest_set_probability"])),
        ("variance", 6, lambda s: _number(s["variance"])),
        ("near zero", 5, lambda s: _count(s["near_zero_count"])),
        ("block influence", 2, lambda s: _number(s["block_influence"])),
    ]
    if not has_intervals:
        texts = [one for one in texts if one[0] not in OF_SHARDS]
    return [
        Column(title="layer", cells=layer_cells([s["layer"] for s in scores], lowest)),
        Column(title="", cells=bar_cells([s["avss_smoothed"] for s in scores], lowest), width=BAR_WIDTH, priority=1),
        *(Column(title=title, cells=[text(s) for s in scores], priority=priority) for title, priority, text in texts),
    ]


def describe_exactness(scores: Sequence[Mapping[str, Any]]) -> str:
    """How far computed near-zero counts are known, and where they would be exact; nothing where all are exact."""
    inexact = [s for s in scores if s["exactness"] == INTERPOLATED]
    if not inexact:
        return ""
    off = max(max(s["near_zero_high"] - k, k - s["near_zero_low"]) / k for s in inexact if (k := s["near_zero_count"]))
    absolute = scores[0]["threshold_kind"] == "absolute"
    where = " Exact: {:.10g} and {:.10g}.".format(*bin_edges(scores[0]["threshold"])) if absolute else ""
    said = f"{len(inexact)} of {len(scores)} near-zero counts are interpolated from stored counts"
    return f"{said}, and off by {off:.0%} at the very most.{where}"


def layer_cells(layers: Sequence[int], marked: Sequence[bool]) -> list[str]:
    """Layers by number, a star behind those that are marked."""
    return [f"{layer}{' *' if star else '  '}" for layer, star in zip(layers, marked, strict=True)]


def bar_cells(values: Sequence[float | None], marked: Sequence[bool]) -> list[Bar]:
    """A bar for each value of a column, red where it is marked."""
    largest = max((value or 0.0 for value in values), default=0.0)
    size = largest if largest > 0 else 1.0
    return [
        Bar(size, 0, max(0.0, value or 0.0), width=BAR_WIDTH, color="red" if red else "cyan")
        for value, red in zip(values, marked, strict=True)
    ]


def _caption(run: Mapping[str, Any], scores: Sequence[Mapping[str, Any]], lowest: int) -> Text:
    noisy = sum(s["quality"] != "ok" for s in scores)
    text = (
        f"{run['run_id']}: {describe_count(run['num_tokens'])} tokens of {run['corpus']}, "
        f"{run['dtype']} on {run['device']}.\n"
        f"* the {'layer' if lowest == 1 else f'{lowest} layers'} with the lowest AVSS, "
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
    return Text(text)


def _number(value: float | None) -> str:
    return "-" if value is None or isnan(value) else f"{value:z.4g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _interval(score: Mapping[str, Any]) -> str:
    return "-" if score["avss_low"] is None else f"{_number(score['avss_low'])} .. {_number(score['avss_high'])}"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"
