"""A run's layers as a table with bars, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from avss_dist.analysis.findings import TRACKS_DEPTH
from avss_dist.settings import LOWEST_SHARE
from avss_dist.stats.rankings import count_lowest, depth_correlation
from avss_dist.text import describe_layers, describe_threshold

BAR_WIDTH = 18
LOWEST = "bold red"


def layer_table(run: Mapping[str, Any], scores: Sequence[Mapping[str, Any]]) -> RenderableType:
    """One row a layer: AVSS as a bar and a number, its rank and certainty, and block influence beside it.

    Args:
        run: a row of ``runs``.
        scores: rows of ``scores`` of one site, recipe and threshold.
    """
    first = scores[0]
    lowest = count_lowest(len(scores))
    largest = max((s["avss_smoothed"] or 0.0 for s in scores), default=0.0) or 1.0
    threshold = describe_threshold(first["threshold"], first["threshold_kind"])
    table = Table(
        title=Text(f"{run['model']}  {first['site']} / {first['recipe']} / |x| < {threshold}"),
        caption=_caption(run, scores, lowest),
        caption_justify="left",
        title_style="bold",
    )
    table.add_column("layer", justify="right")
    table.add_column("AVSS", width=BAR_WIDTH)
    for name in ("", "95% interval", "rank", "lowest 25%", "variance", "near zero", "block influence"):
        table.add_column(name, justify="right")
    for s in scores:
        is_lowest = s["rank"] is not None and s["rank"] <= lowest
        table.add_row(
            f"{s['layer']}{' *' if is_lowest else '  '}",
            Bar(largest, 0, s["avss_smoothed"] or 0.0, width=BAR_WIDTH, color="red" if is_lowest else "cyan"),
            _number(s["avss_smoothed"]),
            f"{_number(s['avss_low'])} .. {_number(s['avss_high'])}" if s["avss_low"] is not None else "-",
            str(s["rank"] or "-"),
            _percent(s["lowest_set_probability"]),
            _number(s["variance"]),
            f"{s['near_zero_count']:,.0f}",
            _number(s["block_influence"]),
            style=LOWEST if is_lowest else None,
        )
    notes = [Text(f"note: {note}", style="yellow") for note in run["notes"] or []]
    return Group(table, *notes)


def _caption(run: Mapping[str, Any], scores: Sequence[Mapping[str, Any]], lowest: int) -> Text:
    noisy = sum(s["quality"] != "ok" for s in scores)
    text = (
        f"{run['run_id']}: {run['num_tokens']:,} tokens of {run['corpus']}, {run['dtype']} on {run['device']}.\n"
        f"* the {'layer' if lowest == 1 else f'{lowest} layers'} with the lowest AVSS, "
        f"{LOWEST_SHARE:.0%} of {len(scores)}; "
        "'lowest 25%' is how often a layer is among them when shards are resampled."
    )
    if unranked := [s["layer"] for s in scores if s["rank"] is None and s["avss_smoothed"] is not None]:
        text += f"\nNaN or infinite activations in layers {describe_layers(unranked)}: they have no rank."
    if noisy:
        text += f"\n{noisy} of {len(scores)} layers have fewer than 100 near-zero elements: their sparsity is noise."
    depth = depth_correlation([s["avss_smoothed"] for s in scores])
    if abs(depth) > TRACKS_DEPTH:
        text += f"\nThis score tracks depth (Spearman {depth:.3f}): it says little that the layer's number does not."
    return Text(text)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """Any query's result; values are shown as they are, never as markup."""
    table = Table()
    for name in columns:
        table.add_column(Text(str(name)), overflow="fold")
    for row in rows:
        table.add_row(*(Text("" if value is None else str(value)) for value in row))
    return table
