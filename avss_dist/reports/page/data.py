"""The data of the report's page: runs and scores, as columns of rounded numbers, and a matrix of many runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from avss_dist.analysis.agreement import RankMatrix, Scores, summarize
from avss_dist.analysis.chosen import run_labels
from avss_dist.analysis.thresholds import at_reading
from avss_dist.core.sites import EVERY_SITE, SITES
from avss_dist.core.text import basename, count_of, printable
from avss_dist.core.thresholds import PUBLISHED_THRESHOLD, describe_threshold
from avss_dist.core.values import NewObject, TableRow
from avss_dist.plans.criteria import PUBLISHED
from avss_dist.stats.catalog import BASELINES, FROM_ACTIVATIONS, RECIPES, SCORES
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
"""Columns of ``scores`` by their names on the page. Sparsity is near_zero / count."""
MIN_RUNS = 8  # of a matrix: of fewer, the charts show each
UNRANKED = -1  # in a matrix, in place of the rank of a layer without a score
STEPS = 100  # of a rank in a matrix between the least and the most important layer


def page_data(warehouse: Warehouse, runs: Sequence[TableRow], without: Sequence[TableRow]) -> NewObject:
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
    table = _scores_of_runs(warehouse, runs)
    blocks = _score_blocks(table, runs)
    choices = _choices(blocks)
    number_of_choice = {choice: number for number, choice in enumerate(choices)}
    published = ScoreChoice(SITES[0], RECIPES[0], "absolute", PUBLISHED_THRESHOLD)
    scores = [{"name": name, "title": SCORES[name].title} for name in FROM_ACTIVATIONS]
    sizes = [_without(run, measured) for run, measured in zip(runs, without, strict=True)]
    return {
        "scores": scores,
        "runs": _described(runs, table),
        "choices": [choice.as_json() for choice in choices],
        "first": number_of_choice.get(published, 0),
        "columns": _columns(table),
        "blocks": [block.as_json(number_of_choice[block.choice]) for block in blocks],
        "correlations": _correlations(table, blocks, choices),
        "rivals": _baseline_correlations(table, blocks),
        "without": sizes,
    }


class ScoreChoice(NamedTuple):
    """A choice that the page offers: where and how AVSS was read."""

    site: str
    recipe: str
    threshold_kind: str
    threshold: float

    def as_json(self) -> dict[str, str]:
        """Return the texts that the page shows."""
        threshold = describe_threshold(self.threshold, self.threshold_kind)
        return {"site": self.site, "recipe": self.recipe, "threshold": threshold}

    def order(self) -> tuple[int, int, bool, float]:
        """Return the sort key: site, recipe, absolute before relative thresholds, value of the threshold."""
        is_relative = self.threshold_kind == "rms"
        return EVERY_SITE.index(self.site), RECIPES.index(self.recipe), is_relative, self.threshold


class ScoreBlock(NamedTuple):
    """Consecutive rows of the sorted table of scores: those of a run at a choice.

    Attributes:
        run: position of the run.
        start, end: first row, and the row after the last.
    """

    run: int
    choice: ScoreChoice
    start: int
    end: int

    def as_json(self, choice: int) -> tuple[int, int, int, int, int]:
        """Return run, choice, first row, end, and how many layers are the lowest 25%."""
        return self.run, choice, self.start, self.end, count_lowest(self.end - self.start)


def _scores_of_runs(warehouse: Warehouse, runs: Sequence[TableRow]) -> pa.Table:
    """Return the rows of ``scores`` of runs, sorted by run, choice and layer."""
    table = warehouse.table(
        "scores",
        run_ids=[run["run_id"] for run in runs],
        columns=["run_id", *CHOICE, "layer_name", "depth", *COLUMNS.values(), *BASELINES],
    )
    return table.sort_by([(name, "ascending") for name in ("run_id", *CHOICE, "layer")])


def _score_blocks(table: pa.Table, runs: Sequence[TableRow]) -> list[ScoreBlock]:
    """Return the blocks of a sorted table of scores, in order."""
    positions = {run["run_id"]: position for position, run in enumerate(runs)}
    blocks = []
    for key, start, end in slices_by(table, ["run_id", *CHOICE]):
        choice = ScoreChoice(*(key[name] for name in CHOICE))
        blocks.append(ScoreBlock(positions[key["run_id"]], choice, start, end))
    return blocks


def _choices(blocks: Sequence[ScoreBlock]) -> list[ScoreChoice]:
    """Return the choices of blocks, each once, in the order of the page."""
    return sorted({block.choice for block in blocks}, key=ScoreChoice.order)


def _columns(table: pa.Table) -> dict[str, list[object]]:
    """Return the columns of scores by their names on the page, rounded."""
    columns = {}
    for name, column in COLUMNS.items():
        digits = FEWER if name in ("low", "high") else DIGITS
        columns[name] = rounded(table[column], digits)
    return columns


def _correlations(table: pa.Table, blocks: Sequence[ScoreBlock], choices: Sequence[ScoreChoice]) -> list[NewObject]:
    """Return the agreement of runs by AVSS, for each choice."""
    correlations = []
    for choice in choices:
        of_choice = [block for block in blocks if block.choice == choice]
        correlations.append(run_agreement(_profiles(table, of_choice, "avss_smoothed")))
    return correlations


def _baseline_correlations(table: pa.Table, blocks: Sequence[ScoreBlock]) -> dict[str, NewObject]:
    """Return the agreement of runs by each baseline, which is the same for every choice."""
    return {name: run_agreement(_profiles(table, blocks, name)) for name in BASELINES}


def _profiles(table: pa.Table, blocks: Sequence[ScoreBlock], column: str) -> dict[int, Scores]:
    """Return the depth and score of the layers of runs that have a score, by the position of the run."""
    depths = table["depth"].to_numpy()
    scores = table[column].to_numpy()
    by_run = {}
    for block in blocks:
        has_score = ~np.isnan(scores[block.start : block.end])
        rows = np.flatnonzero(has_score) + block.start
        if len(rows):
            by_run[block.run] = depths[rows], scores[rows]
    return by_run


def _without(run: TableRow, measured: TableRow) -> NewObject:
    """Return the measurements of a run without layers, rounded, with the share of the layers that each set is."""
    blocks = []
    for block in measured["blocks"]:
        blocks.append({**block, "distance": _round(block["distance"], DIGITS)})
    sets = []
    for entry in measured["sets"]:
        share = _round(entry["size"] / run["num_layers"], DIGITS)
        sets.append({**entry, "share": share, "kept": _round(entry["kept"], DIGITS)})
    return {"blocks": blocks, "kept": sets}


def _described(runs: Sequence[TableRow], table: pa.Table) -> list[NewObject]:
    """Return the label of each run, and the names and baselines of its layers, which are the same for every choice."""
    row_of_layer: dict[str, dict[int, int]] = {run["run_id"]: {} for run in runs}
    places = zip(table["run_id"].to_pylist(), table["layer"].to_pylist(), strict=True)
    for row, (run_id, layer) in enumerate(places):
        row_of_layer[run_id][layer] = row
    described = []
    for number, (run, label) in enumerate(zip(runs, run_labels(runs), strict=True), start=1):
        scored = row_of_layer[run["run_id"]]
        num_layers = max(run["num_layers"] or 0, max(scored, default=-1) + 1)
        row_numbers = pa.array([scored.get(layer) for layer in range(num_layers)], pa.int64())
        rows = table.take(row_numbers)
        entry: NewObject = {"label": f"{number}. {label}", "has_head": has_head(run)}
        for name in ("layer_name", *BASELINES):
            entry[name] = rounded(rows[name])
        described.append(entry)
    return described


def rounded(column: pa.ChunkedArray, digits: int = DIGITS) -> list[object]:
    """Return the values of a column, with floats rounded to ``digits`` significant digits.

    NaN and infinity become None.
    """
    if not pa.types.is_floating(column.type):
        return [_printable(value) for value in column.to_pylist()]
    return [_round(value, digits) for value in column.to_numpy().tolist()]


def _printable(value: object) -> object:
    """Return a value, and a text without characters that change the direction of others."""
    if isinstance(value, str):
        return printable(value)
    return value


def _round(value: float, digits: int) -> float | None:
    if not math.isfinite(value):
        return None
    short = float(f"{value:.{digits}g}")
    is_exact_integer = short.is_integer() and abs(short) < 2**53
    if is_exact_integer:
        return int(short)
    return short


def run_agreement(profiles: Mapping[int, Scores]) -> NewObject:
    """Return the rank correlations of every pair of runs as `analysis.comparison.compare` does, ready for JSON.

    Args:
        profiles: depth and score of the layers by run position: float64[layers] each, ascending in depth. Runs of
            fewer than `MIN_VALUES` layers are left out.

    Returns:
        ``pairs``: two runs, Spearman's rho, and the same given depth; first each run with itself, with its correlation
        with depth. ``summary``: a sentence with the median and the least similar pair, empty if none is defined; runs
        are numbered from 1, as in labels.
    """
    runs = []
    for run in sorted(profiles):
        depths, _ = profiles[run]
        if len(depths) >= MIN_VALUES:
            runs.append(run)
    positions = np.arange(len(runs))
    ranks = RankMatrix([profiles[run] for run in runs])
    rho_matrix, partial_matrix = ranks.correlations(positions, positions)
    first, second = np.triu_indices(len(runs), 1)
    rho = rho_matrix[first, second]
    partial = partial_matrix[first, second]
    pairs: list[list[int | float | None]] = []
    for run in runs:
        _, scores = profiles[run]
        pairs.append([run, run, _correlation(depth_correlation(scores.tolist())), None])
    for a, b, whole, given_depth in zip(first, second, rho, partial, strict=True):
        pairs.append([runs[a], runs[b], _correlation(whole), _correlation(given_depth)])
    return {"pairs": pairs, "summary": _describe_agreement(runs, rho, partial)}


def _describe_agreement(runs: Sequence[int], rho: Float64, partial: Float64) -> str:
    """Return a sentence with the median correlation and the least similar pair. Empty if none is defined.

    Args:
        runs: positions of the runs.
        rho, partial: float64[pairs], rank correlations of each two runs, and those given depth.
    """
    whole = summarize(rho)
    if not whole.count:
        return ""
    text = f"The median of {count_of(whole.count, 'pair')} is {whole.median:z.3f}"
    given_depth = summarize(partial)
    if given_depth.count:
        text += f", and {given_depth.median:z.3f} given depth"
    first, second = np.triu_indices(len(runs), 1)
    least = np.nanargmin(rho)
    a = runs[first[least]] + 1
    b = runs[second[least]] + 1
    return f"{text}; least alike are runs {a} and {b} ({whole.lowest:z.3f})."


def _correlation(value: float) -> float | None:
    """Return a correlation with three digits, or None if it is not defined."""
    if not math.isfinite(value):
        return None
    return round(float(value), 3) + 0.0  # which makes a negative zero positive


def matrix_data(warehouse: Warehouse, runs: Sequence[TableRow], labels: Sequence[str]) -> list[NewObject] | None:
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
    places = {}
    for key, start, stop in slices_by(scores, ["run_id"]):
        places[key["run_id"]] = _places(values[start:stop])
    matrix = []
    for run, label in zip(runs, labels, strict=True):
        if run["run_id"] in places:
            about = printable(f"{run['family']}, {run['dtype']}, {basename(str(run['corpus']))}")
            matrix.append({"label": label, "about": about, "places": places[run["run_id"]]})
    return matrix or None


def _places(scores: Float64) -> list[int]:
    """Return the place of each layer from 0 to `STEPS`, or `UNRANKED` where it has none.

    Layers with NaN have none, nor has the only layer with a score.
    """
    places = np.full(len(scores), UNRANKED)
    has_score = ~np.isnan(scores)
    number = has_score.sum()
    if number > 1:
        shares = (average_ranks(scores[has_score]) - 1) / (number - 1)
        places[has_score] = np.rint(shares * STEPS)
    return list(places.tolist())
