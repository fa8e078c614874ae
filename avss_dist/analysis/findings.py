"""Findings: warnings and notes about the scores, statistics and experts of runs, as data and in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from avss_dist.analysis.experts import LayerExperts, experts_by_layer
from avss_dist.analysis.thresholds import at_reading
from avss_dist.core.sites import EVERY_SITE, SITES
from avss_dist.core.text import describe_layers
from avss_dist.core.thresholds import PUBLISHED_THRESHOLD, describe_threshold
from avss_dist.core.values import NewRow
from avss_dist.stats.catalog import RECIPES
from avss_dist.stats.intervals import why_no_interval
from avss_dist.stats.layer_stats import Float64, share_of_m2
from avss_dist.stats.metrics import row_start_warning
from avss_dist.stats.rankings import count_lowest, spearman_rows
from avss_dist.stats.scores import MINIMUM_NEAR_ZERO, NOISY_BELOW, Threshold
from avss_dist.warehouse.checks import settings_of
from avss_dist.warehouse.names import ROW_START
from avss_dist.warehouse.reader import Warehouse, grouped, slices_by

SCHEMA = pa.schema(
    [
        ("run_id", pa.string()),
        ("kind", pa.string()),
        ("severity", pa.string()),
        ("site", pa.string()),
        ("recipe", pa.string()),
        ("threshold", pa.float64()),
        ("threshold_kind", pa.string()),
        ("value", pa.float64()),
        ("message", pa.string()),
    ]
)
"""Columns of a finding. Site, recipe and threshold are null if it holds for all. ``value`` is the measured value."""

TRACKS_DEPTH = 0.9  # absolute Spearman correlation with depth above which a score is little more than depth
CHANGING_NOTED = 0.1  # share of the lowest set that resampling changes, above which a note says so
CHANGING_WARNED = 0.25  # the same share, above which the note is a warning
DISAGREE = 0.5  # Spearman correlation of two recipes below which they tell different stories

DOMINANT = 0.5  # share of the variance that one unit, or the first tokens, carry, or of what experts add
EXACT = 0.5  # share of exact zeros among near zeros
IDENTITY = 1e-4  # mean |out - in| / |in| of a layer that does nothing
MAX_NAMED = 4  # layers whose experts a finding names
MAX_IDLE = 8  # idle experts of a layer that a finding names
MAX_UNITS = 5  # units that a finding names
_BY_LAYER = [(name, "ascending") for name in ("run_id", "site", "layer")]
RUNS_AT_ONCE = 2048  # runs whose scores and digests are in memory together: 0.4 GB for 80 layers
PLACE = ("run_id", "site", "recipe")
"""Columns of a reading."""
_Place = tuple[str, str, str]
"""Run, site and recipe of a reading."""
_SCORED = (
    "layer",
    "depth",
    "near_zero_count",
    "avss_smoothed",
    "rank",
    "avss_low",
    "avss_high",
    "lowest_set_probability",
)

# Between these probabilities, it is not sure whether a layer is among the lowest.
UNSURE_ABOVE = 0.05
UNSURE_BELOW = 0.95
Columns = Mapping[str, NDArray[Any]]
"""Values of each layer by column; missing numbers are NaN."""

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
    if threshold is None:
        threshold = Threshold(value=PUBLISHED_THRESHOLD, kind="absolute")
    runs = _finished_runs(warehouse, run_ids)
    names = [run["run_id"] for run in runs]
    # The other kinds compare recipes, so that all of them are read.
    where = at_reading(site, recipe if rankings_alone else None, threshold.value, threshold.kind)
    rows: list[NewRow] = []
    for start in range(0, len(names), RUNS_AT_ONCE):
        group = names[start : start + RUNS_AT_ONCE]
        readings = _read_readings(warehouse, group, where)
        for row in chain(_of_readings(readings, threshold), _of_recipes(readings)):
            rows.append(row | {"threshold": threshold.value, "threshold_kind": threshold.kind})
        if rankings_alone:
            rows += nonfinite_layers(warehouse.digests(group, ("run_id", "site", "layer", "count", "nonfinite_count")))
        else:
            rows += of_digests(warehouse.digests(group), threshold, site)
    if not rankings_alone:
        rows += expert_findings(warehouse, names)
        rows += _without_interval(runs)
        rows += _row_starts(warehouse, runs)
        # Last, because the reads above are what finds damaged files.
        rows += _unreadable(warehouse, run_ids)
    rows = [row for row in rows if _holds_for(row, "site", site)]
    rows = [row for row in rows if _holds_for(row, "recipe", recipe)]
    position = {name: index for index, name in enumerate(names)}
    rows.sort(key=lambda row: (*_urgency(row), position.get(row["run_id"], len(names))))
    return pa.Table.from_pylist(rows, SCHEMA)


def _finished_runs(warehouse: Warehouse, run_ids: Sequence[str] | None) -> list[NewRow]:
    """Return the rows of the finished runs among some, by default among all."""
    table = warehouse.runs()
    table = table.filter(pc.equal(table["status"], "done"))
    if run_ids is not None:
        table = table.filter(pc.is_in(table["run_id"], pa.array(run_ids, pa.string())))
    return list(table.select(["run_id", "model", "revision", "num_shards", "settings"]).to_pylist())


def _read_readings(warehouse: Warehouse, run_ids: Sequence[str], where: pc.Expression) -> dict[_Place, Columns]:
    """Return the columns `_SCORED` of each run, site and recipe, ordered by layer.

    Args:
        where: condition on the rows of ``scores``.
    """
    scores = warehouse.table("scores", run_ids=run_ids, columns=(*PLACE, *_SCORED), where=where)
    scores = scores.sort_by([(name, "ascending") for name in (*PLACE, "layer")])
    columns = {name: scores[name].to_numpy() for name in _SCORED}
    readings: dict[_Place, Columns] = {}
    for key, start, stop in slices_by(scores, PLACE):
        readings[key["run_id"], key["site"], key["recipe"]] = _slice(columns, start, stop)
    return readings


def _slice(columns: Columns, start: int, stop: int) -> Columns:
    """Return the rows of columns from a start up to a stop."""
    return {name: values[start:stop] for name, values in columns.items()}


def _without_interval(runs: Sequence[NewRow]) -> Iterator[NewRow]:
    """Yield a finding for each run of too few shards for intervals."""
    for run in runs:
        shards = run["num_shards"]
        if not shards:
            continue
        message = why_no_interval(shards)
        if message:
            yield finding("no_interval", "note", shards, message, run_id=run["run_id"])


def _unreadable(warehouse: Warehouse, run_ids: Sequence[str] | None) -> Iterator[NewRow]:
    """Yield a finding for each damaged run among some, by default among all."""
    for run_id, damage in warehouse.damaged.items():
        if run_ids is None or run_id in run_ids:
            message = f"This {damage.subject} cannot be read: {damage}."
            yield finding("unreadable", "warning", np.nan, message, run_id=run_id)


def _holds_for(row: NewRow, name: str, value: str | None) -> bool:
    """Whether a finding holds for a value of a column. None is any value, in the finding and as the argument."""
    return value is None or row.get(name) in (None, value)


def of_rankings(table: pa.Table, score: str) -> pa.Table:
    """Return the findings that bear on a comparison of rankings by a score. See `OF_RANKINGS`."""
    kinds = []
    for kind, concerns_avss_alone in OF_RANKINGS.items():
        if score == "avss" or not concerns_avss_alone:
            kinds.append(kind)
    return table.filter(pc.is_in(table["kind"], pa.array(kinds, pa.string())))


def _urgency(row: NewRow) -> tuple[bool, bool, int, int, int]:
    """Return the sort key of a finding: warnings first, then the default site and recipe, then the order of `KINDS`."""
    site = EVERY_SITE.index(row.get("site") or SITES[0])
    recipe = RECIPES.index(row.get("recipe") or RECIPES[0])
    is_note = row["severity"] == "note"
    is_elsewhere = site != 0 or recipe != 0
    return is_note, is_elsewhere, KINDS.index(row["kind"]), site, recipe


def _of_readings(readings: Mapping[_Place, Columns], threshold: Threshold) -> Iterator[NewRow]:
    """Yield the findings about the scores of a run at one site with one recipe."""
    with_depth = _correlations([(columns["avss_smoothed"], columns["depth"]) for columns in readings.values()])
    for (run_id, site, recipe), rho in zip(readings, with_depth, strict=True):
        columns = readings[run_id, site, recipe]
        place = {"run_id": run_id, "site": site, "recipe": recipe}
        message = describe_depth("Smoothed AVSS", rho, len(columns["layer"]))
        if message is not None:
            yield finding("tracks_depth", "warning", rho, message, **place)
        for row in chain(_noisy_sparsity(columns, recipe, threshold), _unstable_ranking(columns)):
            yield row | place


def _of_recipes(readings: Mapping[_Place, Columns]) -> Iterator[NewRow]:
    """Yield a finding for each run and site of which two recipes rank the layers differently, on the worst pair."""
    pairs: list[tuple[_Place, _Place]] = []
    for run_id, site, recipe in readings:
        for other in RECIPES:
            if recipe < other and (run_id, site, other) in readings:
                pairs.append(((run_id, site, recipe), (run_id, site, other)))
    scores = []
    for first, second in pairs:
        scores.append((readings[first]["avss_smoothed"], readings[second]["avss_smoothed"]))
    disagreements: dict[tuple[str, str], list[tuple[float, str, str]]] = {}
    for (first, second), rho in zip(pairs, _correlations(scores), strict=True):
        if rho < DISAGREE:
            run_id, site, recipe = first
            disagreements.setdefault((run_id, site), []).append((rho, recipe, second[2]))
    for (run_id, site), of_site in disagreements.items():
        rho, recipe, other = min(of_site)
        severity = "warning" if rho < 0 else "note"
        message = (
            f"The recipes '{recipe}' and '{other}' rank the layers differently (Spearman {rho:z.2f}): "
            "which layers matter depends on how AVSS is read."
        )
        yield finding("recipes_disagree", severity, rho, message, run_id=run_id, site=site)


def _correlations(pairs: Sequence[tuple[Float64, Float64]]) -> list[float]:
    """Return Spearman's rho of each pair of scores, or NaN for scores of different lengths.

    Pairs of equal length are computed at once.
    """
    rho = np.full(len(pairs), np.nan)
    by_size: dict[int, list[int]] = {}
    for index, (first, second) in enumerate(pairs):
        if len(first) == len(second) > 0:
            by_size.setdefault(len(first), []).append(index)
    for members in by_size.values():
        first_scores = np.array([pairs[index][0] for index in members], np.float64)
        second_scores = np.array([pairs[index][1] for index in members], np.float64)
        rho[members] = spearman_rows(first_scores, second_scores)
    return rho.tolist()


def describe_depth(score: str, rho: float, layers: int) -> str | None:
    """Return a sentence on the correlation of a score with depth if it exceeds `TRACKS_DEPTH`, else None."""
    # The comparison with NaN is false.
    if not abs(rho) > TRACKS_DEPTH:
        return None
    direction = "rises" if rho > 0 else "falls"
    return (
        f"{score} {direction} with depth (Spearman {rho:z.3f} over {layers} layers): "
        "it says little beyond the layer's position."
    )


def _noisy_sparsity(group: Columns, recipe: str, threshold: Threshold) -> Iterator[NewRow]:
    """Yield a finding if some layers have so few elements near zero that their number is noise."""
    # It counts units, of which there are few.
    if recipe == "unit":
        return
    counts = group["near_zero_count"]
    layers = len(counts)
    noisy = int((counts < NOISY_BELOW).sum())
    if noisy == 0:
        return
    minimum = np.nanmin(counts)
    maximum = np.nanmax(counts)
    message = (
        f"{noisy} of {layers} layers have fewer than {NOISY_BELOW} elements with |x| < {describe(threshold)} "
        f"({minimum:,.0f} to {maximum:,.0f} in a layer): their sparsity is noise."
    )
    if minimum < MINIMUM_NEAR_ZERO:
        message += f" No interval below {MINIMUM_NEAR_ZERO}."
    severity = "warning" if noisy > layers / 2 else "note"
    yield finding("noisy_sparsity", severity, noisy / layers, message)


def _unstable_ranking(group: Columns) -> Iterator[NewRow]:
    """Yield a finding if resampling changes many of the lowest layers."""
    layer = group["layer"]
    rank = group["rank"]
    probability = group["lowest_set_probability"]
    num_ranked = int(np.isfinite(rank).sum())
    ranked = np.argsort(rank, kind="stable")[:num_ranked]
    size = count_lowest(len(layer))
    lowest = ranked[:size]
    others = ranked[size:]
    if not others.size or np.isnan(probability[lowest]).any():
        return
    changed = float((1 - probability[lowest]).mean())
    if changed <= CHANGING_NOTED:
        return
    is_unsure = (probability > UNSURE_ABOVE) & (probability < UNSURE_BELOW)
    unsure = layer[is_unsure].tolist()
    message = (
        f"Resampling the shards changes {changed:.0%} of the {size} lowest layers on average; "
        f"{layers_in_words(unsure)} may or may not be among them"
    )
    last_inside = lowest[-1]
    first_outside = others[0]
    if group["avss_high"][last_inside] > group["avss_low"][first_outside]:
        message += f" (the intervals of layers {layer[last_inside]} and {layer[first_outside]} overlap)"
    severity = "warning" if changed > CHANGING_WARNED else "note"
    yield finding("unstable_ranking", severity, changed, f"{message}.")


def _row_starts(warehouse: Warehouse, runs: Sequence[NewRow]) -> Iterator[NewRow]:
    """Yield a finding for each run whose model expects another start of its rows.

    The evidence is an evaluation of the model on any text with the same ``row_start``. Runs on packed text from before
    rows started with special tokens get a finding, too.
    """
    where = pc.starts_with(pc.field("task"), ROW_START) & (pc.list_value_length(pc.field("drop")) == 0)
    columns = ("revision", "task", "metric", "value", "settings")
    evaluations = warehouse.table("evaluations", columns=columns, where=where).to_pylist()
    by_start = grouped(evaluations, lambda row: (row["revision"], settings_of(row).get("row_start", "none")))
    for run in runs:
        settings = settings_of(run)
        start = settings.get("row_start")
        if settings.get("layout", "packed") == "packed" and start is None:
            yield finding(
                "row_start",
                "note",
                np.nan,
                "This run was measured before packed rows started with the tokenizer's special tokens. If its "
                "tokenizer adds any (BOS, CLS), score the model again; else nothing has changed.",
                run_id=run["run_id"],
            )
        same_start = by_start.get((run["revision"], start or ""), [])
        for task, of_task in grouped(same_start, itemgetter("task")).items():
            losses = {row["metric"]: row["value"] for row in of_task}
            warning = row_start_warning(losses, run["model"], task.removeprefix(ROW_START))
            if warning is not None:
                ratio, message = warning
                yield finding("row_start", "warning", ratio, message, run_id=run["run_id"])


def _numbers(table: pa.Table) -> dict[str, NDArray[Any]]:
    """Return the columns of numbers of a table."""
    columns = {}
    for field in table.schema:
        if pa.types.is_integer(field.type) or pa.types.is_floating(field.type):
            columns[field.name] = table[field.name].to_numpy()
    return columns


def finding(kind: str, severity: str, value: float, message: str, **place: float | str | None) -> NewRow:
    """Return a finding. ``place`` is where it holds."""
    return {"kind": kind, "severity": severity, "value": float(value), "message": message, **place}


def of_digests(digests: pa.Table, threshold: Threshold, site: str | None = None) -> Iterator[NewRow]:
    """Yield the findings that follow from the statistics of runs, in the order of run ids and sites.

    Args:
        digests: rows of `compaction.DIGEST`.
        threshold: a threshold that was counted.
        site: where to look, by default everywhere. Layers that do nothing are reported in any case.
    """
    table = digests.sort_by(_BY_LAYER)
    columns = _digest_columns(table, threshold)
    is_notable = columns["nonfinite_count"] > 0
    for name in ("mean_unit_share", "element_unit_share", "first_share"):
        is_notable = is_notable | (columns[name] > DOMINANT)
    groups = []
    for key, start, stop in slices_by(table, ["run_id", "site"]):
        if site in (None, key["site"]):
            groups.append((key, start, stop))
    for key, start, stop in groups:
        zeros = int(np.nansum(columns["zero_count"][start:stop]))
        near_zero = int(np.nansum(columns["near_zero"][start:stop]))
        for row in _exact_zeros(key["site"], zeros, near_zero, threshold):
            yield key | row
    for key, layers in _with_any(groups, is_notable, columns):
        for row in chain(_nonfinite(layers), _dominant_units(layers), _first_token(layers)):
            yield key | row
    for key, layers in _with_any(slices_by(table, ["run_id"]), columns["is_still"], columns):
        yield key | _identity_layers(layers)


def _digest_columns(table: pa.Table, threshold: Threshold) -> Columns:
    """Return the numbers of digests, and what follows from them.

    Returns:
        The columns of numbers, and in each row: ``near_zero``, the number of elements below the threshold, 0 if it was
        not counted; ``first_share``, the share of the first token in the variance; ``change``, the mean of
        |out - in| / |in|; and ``is_still``, true for a layer that does nothing.
    """
    columns = _numbers(table)
    columns["near_zero"] = _near_zero_counts(table, threshold)

    first_token = (columns["first_count"], columns["first_mean"], columns["first_m2"])
    m2 = columns["m2"]
    has_other_tokens = (m2 > 0) & (columns["count"] > columns["first_count"])
    first_share = share_of_m2(first_token, columns["mean"], m2)
    columns["first_share"] = np.where(has_other_tokens, first_share, np.nan)

    tokens = columns["token_count"]
    unknown = np.full(len(tokens), np.nan)
    change = np.divide(columns["relative_magnitude_sum"], tokens, out=unknown, where=tokens > 0)
    columns["change"] = change
    is_update = pc.equal(table["site"], "update").to_numpy()
    is_zero_update = is_update & (columns["count"] > 0) & (columns["max_abs"] == 0)
    columns["is_still"] = is_zero_update | (change < IDENTITY)
    return columns


def _near_zero_counts(table: pa.Table, threshold: Threshold) -> NDArray[np.int64]:
    """Return the number of elements below a threshold in each row of digests, 0 if it was not counted."""
    thresholds = table["thresholds"].combine_chunks()
    counts = table["near_zero"].combine_chunks()
    is_at_threshold = pc.list_flatten(thresholds).to_numpy() == threshold.value
    row_of_count = pc.list_parent_indices(counts).to_numpy()[is_at_threshold]
    counted = pc.list_flatten(counts).to_numpy()[is_at_threshold]
    return np.bincount(row_of_count, counted, len(table)).astype(np.int64)


def _with_any(
    groups: Sequence[tuple[NewRow, int, int]], mask: NDArray[np.bool_], columns: Columns
) -> Iterator[tuple[NewRow, Columns]]:
    """Yield key and columns of the groups of rows that have a row of a mask."""
    for key, start, stop in groups:
        if mask[start:stop].any():
            yield key, _slice(columns, start, stop)


def nonfinite_layers(digests: pa.Table) -> Iterator[NewRow]:
    """Yield the findings on NaN and infinite elements of runs, in the order of run ids and sites.

    Args:
        digests: run, site, layer and the two counts of elements of `compaction.DIGEST`.
    """
    table = digests.filter(pc.greater(digests["nonfinite_count"], 0)).sort_by(_BY_LAYER)
    columns = _numbers(table)
    for key, start, stop in slices_by(table, ["run_id", "site"]):
        for row in _nonfinite(_slice(columns, start, stop)):
            yield key | row


def _nonfinite(layers: Columns) -> Iterator[NewRow]:
    """Yield a finding on layers with NaN or infinite elements, which every other statistic leaves out."""
    is_affected = layers["nonfinite_count"] > 0
    if not is_affected.any():
        return
    nonfinite = layers["nonfinite_count"][is_affected]
    finite = layers["count"][is_affected]
    largest = (nonfinite / (finite + nonfinite)).max()
    affected = layers["layer"][is_affected].tolist()
    have = "has" if len(affected) == 1 else "have"
    message = (
        f"{layers_in_words(affected).capitalize()} {have} NaN or infinite activations "
        f"(up to {largest:.2g} of the elements): AVSS ranks no such layer. Is the dtype wide enough?"
    )
    yield finding("nonfinite", "warning", largest, message)


def _exact_zeros(site: str, zeros: int, near_zero: int, threshold: Threshold) -> Iterator[NewRow]:
    """Yield a finding for each recipe that counts elements, if most near-zero elements of a site are zeros."""
    if threshold.kind != "absolute" or near_zero < NOISY_BELOW or zeros <= EXACT * near_zero:
        return
    share = zeros / near_zero
    if site == "neuron":
        severity = "note"
        reason = "the activation function cuts them off, and the threshold hardly matters."
    else:
        severity = "warning"
        reason = "the count reflects rounding in this dtype, not the layer."
    message = f"{share:.0%} of the elements with |x| < {describe(threshold)} are exactly zero: {reason}"
    for recipe in ("pooled", "element"):
        yield finding(
            "exact_zeros",
            severity,
            share,
            message,
            recipe=recipe,
            threshold=threshold.value,
            threshold_kind=threshold.kind,
        )


def _dominant_units(layers: Columns) -> Iterator[NewRow]:
    """Yield findings on layers in which one unit carries more than half of the variance.

    The variance is over elements, (x - mean)^2, or over unit means, (unit mean - mean)^2, depending on the recipe.
    """
    for recipe, name in (("pooled", "mean_unit"), ("element", "element_unit"), ("unit", "mean_unit")):
        shares = layers[f"{name}_share"]
        dominated = np.flatnonzero(shares > DOMINANT)
        if not dominated.size:
            continue
        extreme = max(dominated.tolist(), key=lambda row: (shares[row], layers[name][row], layers["layer"][row]))
        unit = int(layers[name][extreme])
        layer = layers["layer"][extreme]
        units = sorted({int(unit) for unit in layers[name][dominated]})
        defined = int(np.isfinite(shares).sum())
        message = (
            f"One unit carries more than half of the variance in {len(dominated)} of {defined} layers "
            f"(unit {unit} carries {shares[extreme]:.0%} in layer {layer}{_further_units(units)}): "
            "the score is that unit's."
        )
        severity = _severity(len(dominated), defined)
        yield finding("dominant_unit", severity, shares[extreme], message, recipe=recipe)


def _further_units(units: Sequence[int]) -> str:
    """Return the units that dominate some layer as the end of a list. Empty if there is one."""
    if len(units) == 1:
        return ""
    listed = ", ".join(str(unit) for unit in units[:MAX_UNITS])
    if len(units) > MAX_UNITS:
        listed += ", ..."
    return f"; units {listed}"


def _severity(affected: int, number: int) -> str:
    """Return the severity of a finding on some of a number of layers: a warning if they are more than half."""
    return "warning" if affected > number / 2 else "note"


def _first_token(layers: Columns) -> Iterator[NewRow]:
    """Yield a finding if the first token of each row carries more than half of the variance over elements."""
    shares = layers["first_share"]
    dominated = np.flatnonzero(shares > DOMINANT)
    if not dominated.size:
        return
    extreme = dominated[shares[dominated].argmax()]
    layer = layers["layer"][extreme]
    defined = int(np.isfinite(shares).sum())
    message = (
        f"The first token that counts in each row carries more than half of the variance in {len(dominated)} of "
        f"{defined} layers ({shares[extreme]:.1%} in layer {layer}): it is an "
        "attention sink. To see the other tokens, leave it out: --skip-first-tokens 1."
    )
    severity = _severity(len(dominated), defined)
    yield finding("first_token", severity, shares[extreme], message, recipe="element")


def _identity_layers(layers: Columns) -> NewRow:
    """Return a finding on the layers, one or more, whose update is zero, or negligible relative to their input."""
    still = sorted(set(layers["layer"][layers["is_still"]].tolist()))
    # A layer has a row for each site, of which some do not know the change.
    is_known = np.isfinite(layers["change"])
    with_change = layers["layer"][is_known].tolist()
    change = dict(zip(with_change, layers["change"][is_known].tolist(), strict=True))
    largest = max(change.get(layer, 0.0) for layer in still)
    are = "gives out what it takes" if len(still) == 1 else "give out what they take"
    message = (
        f"{layers_in_words(still).capitalize()} {are} in (|out - in| / |in| is at most {largest:.1g}): "
        "removing them would change nothing."
    )
    return finding("identity_layer", "warning", largest, message)


def describe(threshold: Threshold) -> str:
    return describe_threshold(threshold.value, threshold.kind)


def layers_in_words(layers: Sequence[int]) -> str:
    """Return layers in words, such as ``layers 0-3, 7``."""
    noun = "layer" if len(layers) == 1 else "layers"
    return f"{noun} {describe_layers(layers)}"


def expert_findings(warehouse: Warehouse, run_ids: Sequence[str]) -> Iterator[NewRow]:
    """Yield the findings of the runs whose experts were measured: on idle experts, and on dominant ones."""
    rows = warehouse.table("expert_stats", run_ids=run_ids)
    for run_id in dict.fromkeys(rows["run_id"].to_pylist()):
        layers = experts_by_layer(rows.filter(pc.equal(rows["run_id"], run_id)))
        for row in chain(_idle_experts(layers), _dominant_experts(layers)):
            yield row | {"run_id": run_id}


def _idle_experts(layers: Sequence[LayerExperts]) -> Iterator[NewRow]:
    """Yield a finding if some experts of a run got no token."""
    affected = [layer for layer in layers if layer.idle]
    if not affected:
        return
    idle = sum(len(layer.idle) for layer in layers)
    number = sum(len(layer.load) for layer in layers)
    lists = []
    for layer in affected[:MAX_NAMED]:
        named = ", ".join(str(expert) for expert in layer.idle[:MAX_IDLE])
        lists.append(f"layer {layer.layer}: {named}")
    if len(affected) > MAX_NAMED:
        lists.append("...")
    where = layers_in_words([layer.layer for layer in affected])
    message = (
        f"{idle} of {number} experts got no token of this text, in {where} ({'; '.join(lists)}): "
        "nothing is known of them but that."
    )
    severity = "warning" if idle > number / 4 else "note"
    yield finding("idle_experts", severity, idle / number, message)


def _dominant_experts(layers: Sequence[LayerExperts]) -> Iterator[NewRow]:
    """Yield a finding if one of several experts of a layer adds more than half of what all of them add."""
    with_several = [layer for layer in layers if len(layer.carried) > 1]
    affected = [layer for layer in with_several if layer.carried.max() > DOMINANT]
    if not affected:
        return
    extreme = max(affected, key=lambda layer: float(layer.carried.max()))
    share = float(extreme.carried.max())
    expert = int(extreme.carried.argmax())
    where = layers_in_words([layer.layer for layer in affected])
    message = (
        f"One expert gives more than half of what all experts add, in {where} (expert {expert} gives "
        f"{share:.0%} in layer {extreme.layer})."
    )
    yield finding("dominant_expert", _severity(len(affected), len(layers)), share, message)
