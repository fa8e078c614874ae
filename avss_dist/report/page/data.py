"""The data of the report's page: the runs and their scores, as columns of rounded numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa

from avss_dist.analysis.across import RunAgreement, run_agreement
from avss_dist.analysis.labels import run_labels
from avss_dist.analysis.removal import WithoutLayers
from avss_dist.core.registry import BASELINES, FROM_ACTIVATIONS, RECIPES, SCORES
from avss_dist.core.settings import EVERY_SITE, PUBLISHED_THRESHOLD, SITES
from avss_dist.core.text import describe_threshold, printable
from avss_dist.stats.layer_stats import Float64
from avss_dist.stats.rankings import count_lowest
from avss_dist.warehouse.checks import has_head
from avss_dist.warehouse.reader import Warehouse

DIGITS = 4  # significant ones, as many as the page shows
CORRELATION_DIGITS = 3  # after the point
FEWER = 3  # significant digits of the ends of intervals, as many as a thousand resamples determine
CHOICE = ("site", "recipe", "threshold_kind", "threshold")
COLUMNS = {
    "layer": "layer",
    "rank": "rank",
    "avss": "avss_smoothed",
    "low": "avss_low",
    "high": "avss_high",
    "chance": "lowest_set_probability",
    "variance": "variance",
    "near_zero": "near_zero_count",
    "count": "count",
    "quality": "quality",
}
"""Columns of ``scores`` by their names on the page. Sparsity is near_zero / count."""
EXACT_POWER = 15  # of ten, which doubles hold exactly, as they do its product with the digits of a rounded value


def page_data(
    warehouse: Warehouse, runs: Sequence[Mapping[str, Any]], without: Sequence[WithoutLayers]
) -> dict[str, Any]:
    """Return the data of finished runs that the page draws, ready for JSON.

    Args:
        runs: rows of ``runs``.
        without: by run, see `without_layers`.

    Returns:
        ``scores``: name and title of each score from activations, AVSS first; ``runs``: their labels, and by layer its
        name and baselines; ``choices``: every site, recipe and threshold that was scored, ``first`` the position of the
        one to begin with; ``columns``: scores by layer; ``blocks``: the rows of a run at a choice: run, choice, first
        row, end, and how many layers are the lowest 25%; ``correlations`` by choice and of each of ``rivals``:
        ``pairs`` (two runs, Spearman's rho, and the same given depth; a run with itself has its correlation with
        depth) and a ``summary``; ``without``: by run, see `without_layers`, with the share that each size is.
    """
    positions = {run["run_id"]: i for i, run in enumerate(runs)}
    names = ["run_id", *CHOICE, "layer_name", "depth", *COLUMNS.values(), *BASELINES]
    table = warehouse.table("scores", run_ids=list(positions), columns=names)
    table = table.sort_by([(name, "ascending") for name in ("run_id", *CHOICE, "layer")])
    keys = zip(*(table[name].to_pylist() for name in ("run_id", *CHOICE)), strict=True)
    sizes = [(key, sum(1 for _ in rows)) for key, rows in groupby(keys)]
    choices = {choice: i for i, choice in enumerate(sorted({key[1:] for key, _ in sizes}, key=_order))}
    blocks, start = [], 0
    for (run_id, *choice), size in sizes:
        blocks.append((positions[run_id], choices[tuple(choice)], start, start + size, count_lowest(size)))
        start += size
    return {
        "scores": [{"name": name, "title": SCORES[name].title} for name in FROM_ACTIVATIONS],
        "runs": _described(runs, table),
        "choices": [_reading_label(*choice) for choice in choices],
        "first": choices.get((SITES[0], RECIPES[0], "absolute", PUBLISHED_THRESHOLD), 0),
        "columns": {
            name: rounded(table[column], FEWER if name in ("low", "high") else DIGITS)
            for name, column in COLUMNS.items()
        },
        "blocks": blocks,
        **_agreement(table, blocks, len(choices)),
        "without": [_without(known, run["num_layers"]) for run, known in zip(runs, without, strict=True)],
    }


def _without(known: WithoutLayers, layers: int) -> dict[str, Any]:
    blocks = [asdict(block) | {"distance": _round(block.distance, DIGITS)} for block in known.blocks]
    sets = [
        {
            "series": removed.series,
            "dropped": removed.dropped,
            "size": removed.size,
            "share": _round(removed.size / layers, DIGITS),
            "kept": _round(removed.retention, DIGITS),
        }
        for removed in known.sets
    ]
    return {"blocks": blocks, "kept": sets}


def _order(choice: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the sort key of a choice: site, recipe, absolute before relative thresholds, value of the threshold."""
    site, recipe, kind, threshold = choice
    return _index_or_end(site, EVERY_SITE), _index_or_end(recipe, RECIPES), kind == "rms", threshold or 0.0


def _index_or_end(name: str, names: Sequence[str]) -> int:
    return names.index(name) if name in names else len(names)


def _reading_label(site: str, recipe: str, kind: str, threshold: float) -> dict[str, Any]:
    return {"site": site, "recipe": recipe, "threshold": describe_threshold(threshold, kind)}


def _described(runs: Sequence[Mapping[str, Any]], table: pa.Table) -> list[dict[str, Any]]:
    """Return the label of each run, and the names and baselines of its layers, which are the same for every choice."""
    places = zip(table["run_id"].to_pylist(), table["layer"].to_pylist(), strict=True)
    row_of = {place: row for row, place in enumerate(places)}
    described = []
    for i, (run, label) in enumerate(zip(runs, run_labels(runs), strict=True)):
        scored = [layer for run_id, layer in row_of if run_id == run["run_id"]]
        size = max([run["num_layers"] or 0, *(layer + 1 for layer in scored)])
        rows = table.take(pa.array([row_of.get((run["run_id"], layer)) for layer in range(size)], pa.int64()))
        by_layer = {name: rounded(rows[name]) for name in ("layer_name", *BASELINES)}
        described.append({"label": f"{i + 1}. {label}", "has_head": has_head(run), **by_layer})
    return described


def rounded(column: pa.ChunkedArray, digits: int = DIGITS) -> list[Any]:
    """Return the values of a column. Floats have ``digits`` significant digits; NaN and infinity are None."""
    if pa.types.is_floating(column.type):
        return _rounded_floats(column.to_numpy().astype(np.float64), digits)
    return [printable(value) if isinstance(value, str) else value for value in column.to_pylist()]


def _rounded_floats(values: Float64, digits: int) -> list[float | None]:
    """Return values as `_round` does, float64[n]; all but very large and very small ones at once."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        shift = digits - 1 - np.floor(np.log10(np.abs(values)))  # decimal places that stay
        power = 10.0 ** np.abs(shift)
        short = np.where(shift >= 0, np.rint(values * power) / power, np.rint(values / power) * power)
    usual = (np.abs(shift) <= EXACT_POWER) & (np.abs(short) < 2.0**53)
    rounded: list[float | None] = short.tolist()
    for index in np.flatnonzero(usual & (short == np.rint(short))).tolist():
        rounded[index] = int(short[index])
    for index in np.flatnonzero(~usual).tolist():
        rounded[index] = _round(float(values[index]), digits)
    return rounded


def _round(value: float, digits: int) -> float | None:
    if not math.isfinite(value):
        return None
    short = float(f"{value:.{digits}g}")
    return int(short) if short.is_integer() and abs(short) < 2**53 else short


def _agreement(table: pa.Table, blocks: Sequence[tuple[int, ...]], choices: int) -> dict[str, Any]:
    """Return the rank agreement of the runs, by choice and by each baseline."""
    depth, avss = table["depth"].to_numpy(), table["avss_smoothed"].to_numpy()
    rivals = {name: table[name].to_numpy() for name in BASELINES}
    by_choice: list[dict[int, Any]] = [{} for _ in range(choices)]
    by_rival: dict[str, dict[int, Any]] = {name: {} for name in BASELINES}
    for run, choice, start, end, _ in blocks:
        for profiles, values in ((by_choice[choice], avss), *((by_rival[name], rivals[name]) for name in BASELINES)):
            scored = np.flatnonzero(~np.isnan(values[start:end])) + start
            if len(scored):
                profiles[run] = depth[scored], values[scored]
    return {
        "correlations": [packed_agreement(run_agreement(profiles)) for profiles in by_choice],
        "rivals": {name: packed_agreement(run_agreement(profiles)) for name, profiles in by_rival.items()},
    }


def packed_agreement(agreement: RunAgreement) -> dict[str, Any]:
    """Return an agreement of runs, ready for JSON."""
    with_depth = [[run, run, _correlation(rho), None] for run, rho in agreement.with_depth.items()]
    columns = agreement.pairs.tolist(), agreement.spearman, agreement.given_depth
    pairs = [[*pair, _correlation(rho), _correlation(given)] for pair, rho, given in zip(*columns, strict=True)]
    return {"pairs": with_depth + pairs, "summary": agreement.summary}


def _correlation(value: float) -> float | None:
    return round(float(value), CORRELATION_DIGITS) + 0.0 if math.isfinite(value) else None  # + 0.0: no negative zero
