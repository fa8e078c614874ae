"""Findings: warnings and notes about the scores of runs, as data and in words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from avss_dist.analysis.experts import expert_findings
from avss_dist.analysis.stats_findings import (
    NONFINITE,
    Columns,
    Row,
    Rows,
    describe,
    finding,
    layers_in_words,
    nonfinite_layers,
    of_digests,
)
from avss_dist.core.names import ROW_START
from avss_dist.core.registry import RECIPES
from avss_dist.core.settings import EVERY_SITE, PUBLISHED_THRESHOLD, SITES
from avss_dist.stats.intervals import why_no_interval
from avss_dist.stats.layer_stats import Float64
from avss_dist.stats.rankings import count_lowest, spearman_rows
from avss_dist.stats.row_start import RowStarts
from avss_dist.stats.scores import MINIMUM_NEAR_ZERO, NOISY_BELOW, Threshold
from avss_dist.warehouse.checks import settings_of
from avss_dist.warehouse.reader import Warehouse, slices_by

SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("run_id", "kind", "severity", "site", "recipe")),
        ("threshold", pa.float64()),
        ("threshold_kind", pa.string()),
        ("value", pa.float64()),
        ("message", pa.string()),
    ]
)
"""Columns of a finding. Site, recipe and threshold are null if it holds for all. ``value`` is the measured value."""

TRACKS_DEPTH = 0.9  # absolute Spearman correlation with depth above which a score is little more than depth
CHANGING = (0.1, 0.25)  # share of the lowest set that resampling changes: worth a note, a warning
DISAGREE = 0.5  # Spearman correlation of two recipes below which they tell different stories

_EVALUATED = ("run_id", "revision", "task", "metric", "value", "settings", "drop")
_OLD_ROWS = (
    "This run was measured before packed rows started with the tokenizer's special tokens. If its tokenizer adds any "
    "(BOS, CLS), score the model again; else nothing has changed."
)

KINDS = (
    "unreadable",
    "nonfinite",
    "identity_layer",
    "exact_zeros",
    "noisy_sparsity",
    "tracks_depth",
    "first_token",
    "dominant_unit",
    "idle_experts",
    "dominant_expert",
    "no_interval",
    "unstable_ranking",
    "recipes_disagree",
    "row_start",
)
"""Every kind of finding, in the order in which they are reported."""
OF_RANKINGS = {"nonfinite": False, "noisy_sparsity": True, "tracks_depth": True, "unstable_ranking": True}
"""Kinds of findings that bear on the correlation of two rankings, each with whether it concerns AVSS alone."""


def findings(
    warehouse: Warehouse,
    run_ids: Sequence[str] | None = None,
    *,
    threshold: Threshold | None = None,
    site: str | None = None,
    recipe: str | None = None,
    rankings_alone: bool = False,
) -> pa.Table:
    """Return the findings about the scores of runs.

    Args:
        warehouse: warehouse of the runs.
        run_ids: ids of finished runs, by default all of them. Unknown ids have no findings.
        threshold: a scored threshold, for the kinds that depend on one. By default, the published 1e-5.
        site, recipe: where to look; by default at all. Findings that hold for all sites or recipes are always there.
        rankings_alone: look for the kinds `OF_RANKINGS` alone, which takes a fraction of the time.

    Returns:
        A table of `SCHEMA`: warnings before notes, the default site and recipe before others, then ordered by `KINDS`.
    """
    threshold = threshold or Threshold(value=PUBLISHED_THRESHOLD, kind="absolute")
    runs = _finished(warehouse, run_ids)
    names = [run["run_id"] for run in runs]
    where = (pc.field("threshold") == threshold.value) & (pc.field("threshold_kind") == threshold.kind)
    if site is not None:
        where &= pc.field("site") == site
    if recipe is not None and rankings_alone:  # what else there is compares recipes
        where &= pc.field("recipe") == recipe
    rows: list[Row] = []
    for group in _groups(names):
        readings = _by_reading(warehouse.table("scores", run_ids=group, columns=SCORES, where=where))
        rows += _of_scores(readings, group, threshold)
        if rankings_alone:
            rows += _in_order(nonfinite_layers(warehouse.digests(group, NONFINITE)), group)
        else:
            rows += _in_order(of_digests(warehouse.digests(group), threshold, site), group)
    if not rankings_alone:
        rows += [{"run_id": name, **row} for name, row in expert_findings(warehouse, names)]
        rows += _no_intervals(runs)
        rows += _row_starts(warehouse, runs)
        rows += _unreadable(warehouse.damaged, run_ids)
    rows = [row for row in rows if _is_at(row, site, recipe)]
    rows.sort(key=_urgency)
    return pa.Table.from_pylist(rows, SCHEMA)


def _finished(warehouse: Warehouse, run_ids: Sequence[str] | None) -> list[Row]:
    """Return the columns `OF_RUNS` of the ``runs`` rows of finished runs, by default of all."""
    done = pc.field("status") == "done"
    runs = warehouse.runs().filter(
        done if run_ids is None else done & pc.field("run_id").isin(pa.array(run_ids, pa.string()))
    )
    return list(runs.select(OF_RUNS).to_pylist())


def _groups(names: Sequence[str]) -> Iterator[Sequence[str]]:
    """Yield `RUNS_AT_ONCE` names at once."""
    for start in range(0, len(names), RUNS_AT_ONCE):
        yield names[start : start + RUNS_AT_ONCE]


def _in_order(findings: Iterable[Row], run_ids: Sequence[str]) -> list[Row]:
    """Return findings in the order of the runs that they are about."""
    position = {run_id: index for index, run_id in enumerate(run_ids)}
    return sorted(findings, key=lambda row: position[row["run_id"]])


def of_rankings(table: pa.Table, score: str) -> pa.Table:
    """Return the findings that bear on a comparison of rankings by a score. See `OF_RANKINGS`."""
    kinds = [kind for kind, of_avss in OF_RANKINGS.items() if score == "avss" or not of_avss]
    return table.filter(pc.field("kind").isin(kinds))


def _no_intervals(runs: Rows) -> Iterator[Row]:
    """Yield a finding for each run that has too few shards for intervals."""
    for run in runs:
        shards = run["num_shards"]
        if shards and (message := why_no_interval(shards)):
            yield {"run_id": run["run_id"], **finding("no_interval", "note", shards, message)}


def _unreadable(damaged: Mapping[str, str], run_ids: Sequence[str] | None) -> Iterator[Row]:
    for run_id, reason in damaged.items():
        if run_ids is None or run_id in run_ids:
            yield {"run_id": run_id, **finding("unreadable", "warning", np.nan, f"This run cannot be read: {reason}.")}


def _is_at(row: Row, site: str | None, recipe: str | None) -> bool:
    """Whether a finding is about a site and a recipe, None for any, or about all of them."""
    return all(place is None or row.get(name) in (None, place) for name, place in (("site", site), ("recipe", recipe)))


def _urgency(row: Row) -> tuple[bool, bool, int, int, int]:
    """Return the sort key of a finding: warnings first, then the default site and recipe, then the order of `KINDS`."""
    site, recipe = row.get("site") or SITES[0], row.get("recipe") or RECIPES[0]
    elsewhere = (site, recipe) != (SITES[0], RECIPES[0])
    kind = KINDS.index(row["kind"])
    return row["severity"] == "note", elsewhere, kind, EVERY_SITE.index(site), RECIPES.index(recipe)


SCORES = (
    "run_id",
    "layer",
    "site",
    "recipe",
    "threshold",
    "threshold_kind",
    "depth",
    "near_zero_count",
    "avss_smoothed",
    "rank",
    "avss_low",
    "avss_high",
    "lowest_set_probability",
)


OF_RUNS = ["run_id", "model", "revision", "num_shards", "settings"]
"""Columns of ``runs`` that findings depend on."""
RUNS_AT_ONCE = 2048  # runs whose scores and digests are in memory together: 0.4 GB for 80 layers

Reading = tuple[str, str, str]  # run, site and recipe
PLACE = ("run_id", "site", "recipe")
"""Columns of a reading."""


def _of_scores(readings: Mapping[Reading, Columns], run_ids: Sequence[str], threshold: Threshold) -> list[Row]:
    """Return the findings that follow from the scores of runs at one threshold, in the order of the runs."""
    at = {"threshold": threshold.value, "threshold_kind": threshold.kind}
    found = [*_of_readings(readings, threshold), *_of_recipes(readings)]
    return [row | at for row in _in_order(found, run_ids)]


def _of_readings(readings: Mapping[Reading, Columns], threshold: Threshold) -> Iterator[Row]:
    """Yield the findings about the scores of a run at one site with one recipe."""
    with_depth = _correlations([(columns["avss_smoothed"], columns["depth"]) for columns in readings.values()])
    for ((run_id, site, recipe), columns), rho in zip(readings.items(), with_depth, strict=True):
        place = {"run_id": run_id, "site": site, "recipe": recipe}
        checks = _tracks_depth(columns, rho), _noisy_sparsity(columns, recipe, threshold), _unstable_ranking(columns)
        for kind, severity, value, message in chain.from_iterable(checks):
            yield finding(kind, severity, value, message) | place


def _of_recipes(readings: Mapping[Reading, Columns]) -> Iterator[Row]:
    """Yield a finding for each run and site of which two recipes rank the layers differently, on the worst pair."""
    pairs = [
        (run_id, site, recipe, other)
        for run_id, site, recipe in readings
        for other in RECIPES
        if recipe < other and (run_id, site, other) in readings
    ]
    values = [
        (readings[run_id, site, a]["avss_smoothed"], readings[run_id, site, b]["avss_smoothed"])
        for run_id, site, a, b in pairs
    ]
    worst: dict[tuple[str, str], tuple[float, str, str]] = {}
    for (run_id, site, a, b), rho in zip(pairs, _correlations(values), strict=True):
        if rho < DISAGREE:
            worst[run_id, site] = min(worst.get((run_id, site), (rho, a, b)), (rho, a, b))
    for (run_id, site), (rho, a, b) in worst.items():
        yield _recipes_disagree(rho, a, b) | {"run_id": run_id, "site": site}


def _by_reading(scores: pa.Table) -> dict[Reading, Columns]:
    """Return the columns of scores by run, site and recipe, ordered by layer."""
    scores = scores.sort_by([(name, "ascending") for name in (*PLACE, "layer")])
    columns = {name: scores[name].to_numpy() for name in scores.column_names if name not in PLACE}
    return {
        (key["run_id"], key["site"], key["recipe"]): {name: cells[start:stop] for name, cells in columns.items()}
        for key, start, stop in slices_by(scores, PLACE)
    }


def _correlations(pairs: Sequence[tuple[Float64, ...]]) -> list[float]:
    """Return Spearman's rho of each pair of scores; pairs of equal length are computed at once."""
    rho = np.full(len(pairs), np.nan)
    sizes = np.array([len(a) if len(a) == len(b) else 0 for a, b in pairs])
    for size in np.unique(sizes[sizes > 0]):
        members = np.flatnonzero(sizes == size)
        a, b = (np.array([pairs[index][side] for index in members.tolist()], np.float64) for side in (0, 1))
        rho[members] = spearman_rows(a, b)
    return rho.tolist()


Check = Iterator[tuple[str, str, float, str]]


def describe_depth(score: str, rho: float, layers: int) -> str | None:
    """Return a sentence on the correlation of a score with depth if it exceeds `TRACKS_DEPTH`, else None."""
    if not abs(rho) > TRACKS_DEPTH:
        return None
    return (
        f"{score} {'rises' if rho > 0 else 'falls'} with depth (Spearman {rho:z.3f} over {layers} layers): "
        "it says little beyond the layer's position."
    )


def _tracks_depth(group: Columns, rho: float) -> Check:
    if message := describe_depth("Smoothed AVSS", rho, len(group["layer"])):
        yield "tracks_depth", "warning", rho, message


def _noisy_sparsity(group: Columns, recipe: str, threshold: Threshold) -> Check:
    counts = group["near_zero_count"]
    layers, noisy = len(counts), int((counts < NOISY_BELOW).sum())
    if recipe == "unit" or not noisy:  # it counts units, of which there are few
        return
    fewest, most = np.nanmin(counts), np.nanmax(counts)
    no_interval = f" No interval below {MINIMUM_NEAR_ZERO}." if fewest < MINIMUM_NEAR_ZERO else ""
    yield (
        *("noisy_sparsity", "warning" if noisy > layers / 2 else "note", noisy / layers),
        f"{noisy} of {layers} layers have fewer than {NOISY_BELOW} elements with |x| < {describe(threshold)} "
        f"({fewest:,.0f} to {most:,.0f} in a layer): their sparsity is noise.{no_interval}",
    )


def _unstable_ranking(group: Columns) -> Check:
    layer, rank, probability = (group[name] for name in ("layer", "rank", "lowest_set_probability"))
    ranked = np.argsort(rank, kind="stable")[: int(np.isfinite(rank).sum())]
    size = count_lowest(len(layer))
    chosen, others = ranked[:size], ranked[size:]
    if not others.size or np.isnan(probability[chosen]).any():
        return
    changed = float((1 - probability[chosen]).mean())
    if changed <= CHANGING[0]:
        return
    unsure = layer[(probability > 0.05) & (probability < 0.95)].tolist()
    last, first = chosen[-1], others[0]
    overlap = group["avss_high"][last] > group["avss_low"][first]
    yield (
        *("unstable_ranking", "warning" if changed > CHANGING[1] else "note", changed),
        f"Resampling the shards changes {changed:.0%} of the {size} lowest layers on average; "
        f"{layers_in_words(unsure)} may or may not be among them"
        + (f" (the intervals of layers {layer[last]} and {layer[first]} overlap)." if overlap else "."),
    )


def _recipes_disagree(rho: float, a: str, b: str) -> Row:
    return finding(
        *("recipes_disagree", "warning" if rho < 0 else "note", rho),
        f"The recipes '{a}' and '{b}' rank the layers differently (Spearman {rho:z.2f}): "
        "which layers matter depends on how AVSS is read.",
    )


def _row_starts(warehouse: Warehouse, runs: Rows) -> Iterator[Row]:
    """Yield a finding for each run whose model expects another start of its rows.

    The evidence is an evaluation of the model on any text with the same ``row_start``. Runs on packed text from before
    rows started with special tokens get a finding, too.
    """
    where = pc.starts_with(pc.field("task"), ROW_START) & (pc.list_value_length(pc.field("drop")) == 0)
    losses: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for row in warehouse.table("evaluations", columns=_EVALUATED, where=where).to_pylist():
        key = row["revision"], settings_of(row).get("row_start", "none")
        losses.setdefault(key, {}).setdefault(row["task"], {})[row["metric"]] = row["value"]
    for run in runs:
        settings = settings_of(run)
        start = settings.get("row_start")
        if settings.get("layout", "packed") == "packed" and start is None:
            yield {"run_id": run["run_id"], **finding("row_start", "note", np.nan, _OLD_ROWS)}
        for task, by_metric in losses.get((run["revision"], start or ""), {}).items():
            starts = RowStarts.of_losses(by_metric)
            if starts and (sentence := starts.describe(run["model"], task.removeprefix(ROW_START))):
                yield {"run_id": run["run_id"], **finding("row_start", "warning", starts.ratio, sentence)}
