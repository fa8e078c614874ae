"""The data of the report's page: runs and scores, as columns of rounded numbers, and a matrix of many runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from avss_dist.analysis.agreement import RankMatrix, Scores, summarize
from avss_dist.analysis.chosen import run_labels
from avss_dist.analysis.thresholds import at_reading
from avss_dist.core.registry import BASELINES, FROM_ACTIVATIONS, RECIPES, SCORES
from avss_dist.core.settings import EVERY_SITE, PUBLISHED_THRESHOLD, SITES
from avss_dist.core.text import basename, count_of, describe_threshold, printable
from avss_dist.pruning.selection import PUBLISHED
from avss_dist.stats.layer_stats import Float64
from avss_dist.stats.rankings import MIN_VALUES, average_ranks, count_lowest, depth_correlation
from avss_dist.warehouse.checks import has_head
from avss_dist.warehouse.reader import Warehouse, slices_by

DIGITS = 4  # significant ones, as many as the page shows
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
_SCORED = {"avss": "avss_smoothed", **{name: name for name in BASELINES}}
"""Columns of ``scores`` by their names on the page. Sparsity is near_zero / count."""
MIN_RUNS = 8  # of a matrix: of fewer, the charts show each
UNRANKED = -1  # in a matrix, in place of the rank of a layer without a score
STEPS = 100  # of a rank in a matrix between the least and the most important layer


def page_data(
    warehouse: Warehouse, runs: Sequence[Mapping[str, Any]], without: Sequence[Mapping[str, Any]]
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
    table = warehouse.table(
        "scores",
        run_ids=list(positions),
        columns=["run_id", *CHOICE, "layer_name", "depth", *COLUMNS.values(), *BASELINES],
    )
    table = table.sort_by([(name, "ascending") for name in ("run_id", *CHOICE, "layer")])
    slices = [(tuple(key.values()), start, end) for key, start, end in slices_by(table, ["run_id", *CHOICE])]
    choices = {choice: i for i, choice in enumerate(sorted({key[1:] for key, _, _ in slices}, key=_order))}
    blocks = [
        (positions[run_id], choices[tuple(choice)], start, end, count_lowest(end - start))
        for (run_id, *choice), start, end in slices
    ]
    scored = {
        "depth": table["depth"].to_numpy(),
        **{name: table[column].to_numpy() for name, column in _SCORED.items()},
    }

    def profiles(name: str, choice: int | None = None) -> dict[int, Scores]:
        by_run = {}
        for run, place, start, end, _ in blocks:
            if choice in (None, place):
                at = np.flatnonzero(~np.isnan(scored[name][start:end])) + start
                if len(at):
                    by_run[run] = scored["depth"][at], scored[name][at]
        return by_run

    return {
        "scores": [{"name": name, "title": SCORES[name].title} for name in FROM_ACTIVATIONS],
        "runs": _described(runs, table),
        "choices": [
            {"site": site, "recipe": recipe, "threshold": describe_threshold(threshold, kind)}
            for site, recipe, kind, threshold in choices
        ],
        "first": choices.get((SITES[0], RECIPES[0], "absolute", PUBLISHED_THRESHOLD), 0),
        "columns": {
            name: rounded(table[column], FEWER if name in ("low", "high") else DIGITS)
            for name, column in COLUMNS.items()
        },
        "blocks": blocks,
        "correlations": [run_agreement(profiles("avss", choice)) for choice in choices.values()],
        "rivals": {name: run_agreement(profiles(name)) for name in BASELINES},
        "without": [
            {
                "blocks": [block | {"distance": _round(block["distance"], DIGITS)} for block in measured["blocks"]],
                "kept": [
                    {
                        **entry,
                        "share": _round(entry["size"] / run["num_layers"], DIGITS),
                        "kept": _round(entry["kept"], DIGITS),
                    }
                    for entry in measured["sets"]
                ],
            }
            for run, measured in zip(runs, without, strict=True)
        ],
    }


def _order(choice: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the sort key of a choice: site, recipe, absolute before relative thresholds, value of the threshold."""
    site, recipe, kind, threshold = choice
    return EVERY_SITE.index(site), RECIPES.index(recipe), kind == "rms", threshold or 0.0


def _described(runs: Sequence[Mapping[str, Any]], table: pa.Table) -> list[dict[str, Any]]:
    """Return the label of each run, and the names and baselines of its layers, which are the same for every choice."""
    places = zip(table["run_id"].to_pylist(), table["layer"].to_pylist(), strict=True)
    row_of = {place: row for row, place in enumerate(places)}
    described = []
    for i, (run, label) in enumerate(zip(runs, run_labels(runs), strict=True)):
        scored = [layer for run_id, layer in row_of if run_id == run["run_id"]]
        size = max([run["num_layers"] or 0, *(layer + 1 for layer in scored)])
        rows = table.take(pa.array([row_of.get((run["run_id"], layer)) for layer in range(size)], pa.int64()))
        described.append(
            {
                "label": f"{i + 1}. {label}",
                "has_head": has_head(run),
                **{name: rounded(rows[name]) for name in ("layer_name", *BASELINES)},
            }
        )
    return described


def rounded(column: pa.ChunkedArray, digits: int = DIGITS) -> list[Any]:
    """Return the values of a column, with floats rounded to ``digits`` significant digits.

    NaN and infinity become None.
    """
    if not pa.types.is_floating(column.type):
        return [printable(value) if isinstance(value, str) else value for value in column.to_pylist()]
    return [_round(value, digits) for value in column.to_numpy().tolist()]


def _round(value: float, digits: int) -> float | None:
    if not math.isfinite(value):
        return None
    short = float(f"{value:.{digits}g}")
    return int(short) if short.is_integer() and abs(short) < 2**53 else short


def run_agreement(profiles: Mapping[int, Scores]) -> dict[str, Any]:
    """Return the rank correlations of every pair of runs as `analysis.comparison.compare` does, ready for JSON.

    Args:
        profiles: depth and score of the layers by run position: float64[layers] each, ascending in depth. Runs of
            fewer than `MIN_VALUES` layers are left out.

    Returns:
        ``pairs``: two runs, Spearman's rho, and the same given depth; first each run with itself, with its correlation
        with depth. ``summary``: a sentence with the median and the least similar pair, empty if none is defined; runs
        are numbered from 1, as in labels.
    """
    runs = [run for run in sorted(profiles) if len(profiles[run][0]) >= MIN_VALUES]
    positions, (first, second) = np.arange(len(runs)), np.triu_indices(len(runs), 1)
    matrices = RankMatrix([profiles[run] for run in runs]).correlations(positions, positions)
    rho, partial = (matrix[first, second] for matrix in matrices)
    pairs = [[run, run, _correlation(depth_correlation(profiles[run][1].tolist())), None] for run in runs]
    for a, b, *correlations in zip(first, second, rho, partial, strict=True):
        pairs.append([runs[a], runs[b], *map(_correlation, correlations)])
    whole, given_depth, text = summarize(rho), summarize(partial), ""
    if whole.count:
        least = np.nanargmin(rho)
        beside_depth = f", and {given_depth.median:z.3f} given depth" if given_depth.count else ""
        text = (
            f"The median of {count_of(whole.count, 'pair')} is {whole.median:z.3f}{beside_depth}; least alike are runs "
            f"{runs[first[least]] + 1} and {runs[second[least]] + 1} ({whole.lowest:z.3f})."
        )
    return {"pairs": pairs, "summary": text}


def _correlation(value: float) -> float | None:
    return round(float(value), 3) + 0.0 if math.isfinite(value) else None  # + 0.0: no negative zero


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
    scores = warehouse.table(
        "scores",
        run_ids=[run["run_id"] for run in runs],
        columns=["run_id", "layer", "avss_smoothed"],
        where=at_reading(*PUBLISHED),
    ).sort_by([("run_id", "ascending"), ("layer", "ascending")])
    values = scores["avss_smoothed"].to_numpy()
    places = {key["run_id"]: _places(values[start:stop]) for key, start, stop in slices_by(scores, ["run_id"])}
    return [
        {
            "label": label,
            "about": printable(f"{run['family']}, {run['dtype']}, {basename(str(run['corpus']))}"),
            "places": places[run["run_id"]],
        }
        for run, label in zip(runs, labels, strict=True)
        if run["run_id"] in places
    ] or None


def _places(scores: Float64) -> list[int]:
    """Return the place of each layer from 0 to `STEPS`, or `UNRANKED` where it has none.

    Layers with NaN have none, nor has the only layer with a score.
    """
    places, scored = np.full(len(scores), UNRANKED), ~np.isnan(scores)
    if scored.sum() > 1:
        places[scored] = np.rint((average_ranks(scores[scored]) - 1) / (scored.sum() - 1) * STEPS)
    return list(places.tolist())
