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

from avss_dist.analysis.experts import experts_by_layer
from avss_dist.analysis.thresholds import at_reading
from avss_dist.core.registry import RECIPES, ROW_START
from avss_dist.core.settings import EVERY_SITE, PUBLISHED_THRESHOLD, SITES
from avss_dist.core.text import describe_layers, describe_threshold
from avss_dist.stats.intervals import why_no_interval
from avss_dist.stats.layer_stats import Float64, share_of_m2
from avss_dist.stats.metrics import row_start_warning
from avss_dist.stats.rankings import count_lowest, spearman_rows
from avss_dist.stats.scores import MINIMUM_NEAR_ZERO, NOISY_BELOW, Threshold
from avss_dist.warehouse.checks import settings_of
from avss_dist.warehouse.reader import Warehouse, grouped, slices_by

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

DOMINANT = 0.5  # share of the variance that one unit, or the first tokens, carry, or of what experts add
EXACT = 0.5  # share of exact zeros among near zeros
IDENTITY = 1e-4  # mean |out - in| / |in| of a layer that does nothing
MAX_NAMED = 4  # layers whose experts a finding names
_BY_LAYER = [(name, "ascending") for name in ("run_id", "site", "layer")]
RUNS_AT_ONCE = 2048  # runs whose scores and digests are in memory together: 0.4 GB for 80 layers
PLACE = ("run_id", "site", "recipe")
"""Columns of a reading."""
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

Row = dict[str, Any]
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
    threshold = threshold or Threshold(value=PUBLISHED_THRESHOLD, kind="absolute")
    table = warehouse.runs()
    table = table.filter(pc.equal(table["status"], "done"))
    if run_ids is not None:
        table = table.filter(pc.is_in(table["run_id"], pa.array(run_ids, pa.string())))
    runs = table.select(["run_id", "model", "revision", "num_shards", "settings"]).to_pylist()
    names = [run["run_id"] for run in runs]
    # All other findings compare recipes.
    where = at_reading(site, recipe if rankings_alone else None, threshold.value, threshold.kind)
    at = {"threshold": threshold.value, "threshold_kind": threshold.kind}
    rows: list[Row] = []
    for start in range(0, len(names), RUNS_AT_ONCE):
        group = names[start : start + RUNS_AT_ONCE]
        scores = warehouse.table("scores", run_ids=group, columns=(*PLACE, *_SCORED), where=where).sort_by(
            [(name, "ascending") for name in (*PLACE, "layer")]
        )
        columns = {name: scores[name].to_numpy() for name in _SCORED}
        readings = {
            (key["run_id"], key["site"], key["recipe"]): {name: cells[begin:end] for name, cells in columns.items()}
            for key, begin, end in slices_by(scores, PLACE)
        }
        rows += [row | at for row in chain(_of_readings(readings, threshold), _of_recipes(readings))]
        if rankings_alone:
            rows += nonfinite_layers(warehouse.digests(group, ("run_id", "site", "layer", "count", "nonfinite_count")))
        else:
            rows += of_digests(warehouse.digests(group), threshold, site)
    if not rankings_alone:
        rows += expert_findings(warehouse, names)
        rows += (
            finding("no_interval", "note", shards, message, run_id=run["run_id"])
            for run in runs
            if (shards := run["num_shards"]) and (message := why_no_interval(shards))
        )
        rows += _row_starts(warehouse, runs)
        rows += (
            finding("unreadable", "warning", np.nan, f"This {damage.subject} cannot be read: {damage}.", run_id=run_id)
            for run_id, damage in warehouse.damaged.items()
            if run_ids is None or run_id in run_ids
        )
    place = (("site", site), ("recipe", recipe))
    rows = [row for row in rows if all(value is None or row.get(name) in (None, value) for name, value in place)]
    position = {name: index for index, name in enumerate(names)}
    rows.sort(key=lambda row: (*_urgency(row), position.get(row["run_id"], len(names))))
    return pa.Table.from_pylist(rows, SCHEMA)


def of_rankings(table: pa.Table, score: str) -> pa.Table:
    """Return the findings that bear on a comparison of rankings by a score. See `OF_RANKINGS`."""
    kinds = [kind for kind, of_avss in OF_RANKINGS.items() if score == "avss" or not of_avss]
    return table.filter(pc.is_in(table["kind"], pa.array(kinds, pa.string())))


def _urgency(row: Row) -> tuple[bool, bool, int, int, int]:
    """Return the sort key of a finding: warnings first, then the default site and recipe, then the order of `KINDS`."""
    site, recipe = EVERY_SITE.index(row.get("site") or SITES[0]), RECIPES.index(row.get("recipe") or RECIPES[0])
    return (
        row["severity"] == "note",
        (site, recipe) != (0, 0),
        KINDS.index(row["kind"]),
        site,
        recipe,
    )


def _of_readings(readings: Mapping[tuple[str, str, str], Columns], threshold: Threshold) -> Iterator[Row]:
    """Yield the findings about the scores of a run at one site with one recipe."""
    with_depth = _correlations([(columns["avss_smoothed"], columns["depth"]) for columns in readings.values()])
    for ((run_id, site, recipe), columns), rho in zip(readings.items(), with_depth, strict=True):
        place = {"run_id": run_id, "site": site, "recipe": recipe}
        if message := describe_depth("Smoothed AVSS", rho, len(columns["layer"])):
            yield finding("tracks_depth", "warning", rho, message, **place)
        for row in chain(_noisy_sparsity(columns, recipe, threshold), _unstable_ranking(columns)):
            yield row | place


def _of_recipes(readings: Mapping[tuple[str, str, str], Columns]) -> Iterator[Row]:
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
    disagree = ((rho, *pair) for pair, rho in zip(pairs, _correlations(values), strict=True) if rho < DISAGREE)
    for (run_id, site), of_site in grouped(disagree, itemgetter(1, 2)).items():
        rho, _, _, a, b = min(of_site)
        yield finding(
            "recipes_disagree",
            "warning" if rho < 0 else "note",
            rho,
            f"The recipes '{a}' and '{b}' rank the layers differently (Spearman {rho:z.2f}): "
            "which layers matter depends on how AVSS is read.",
            run_id=run_id,
            site=site,
        )


def _correlations(pairs: Sequence[tuple[Float64, ...]]) -> list[float]:
    """Return Spearman's rho of each pair of scores, or NaN for scores of different lengths.

    Pairs of equal length are computed at once.
    """
    rho = np.full(len(pairs), np.nan)
    sizes = np.array([len(a) if len(a) == len(b) else 0 for a, b in pairs])
    for size in np.unique(sizes[sizes > 0]):
        members = np.flatnonzero(sizes == size)
        a, b = (np.array([pairs[index][side] for index in members.tolist()], np.float64) for side in (0, 1))
        rho[members] = spearman_rows(a, b)
    return rho.tolist()


def describe_depth(score: str, rho: float, layers: int) -> str | None:
    """Return a sentence on the correlation of a score with depth if it exceeds `TRACKS_DEPTH`, else None."""
    if not abs(rho) > TRACKS_DEPTH:
        return None
    return (
        f"{score} {'rises' if rho > 0 else 'falls'} with depth (Spearman {rho:z.3f} over {layers} layers): "
        "it says little beyond the layer's position."
    )


def _noisy_sparsity(group: Columns, recipe: str, threshold: Threshold) -> Iterator[Row]:
    counts = group["near_zero_count"]
    layers, noisy = len(counts), int((counts < NOISY_BELOW).sum())
    if recipe == "unit" or not noisy:  # it counts units, of which there are few
        return
    minimum, maximum = np.nanmin(counts), np.nanmax(counts)
    no_interval = f" No interval below {MINIMUM_NEAR_ZERO}." if minimum < MINIMUM_NEAR_ZERO else ""
    yield finding(
        *("noisy_sparsity", "warning" if noisy > layers / 2 else "note", noisy / layers),
        f"{noisy} of {layers} layers have fewer than {NOISY_BELOW} elements with |x| < {describe(threshold)} "
        f"({minimum:,.0f} to {maximum:,.0f} in a layer): their sparsity is noise.{no_interval}",
    )


def _unstable_ranking(group: Columns) -> Iterator[Row]:
    layer, rank, probability = (group[name] for name in ("layer", "rank", "lowest_set_probability"))
    ranked = np.argsort(rank, kind="stable")[: int(np.isfinite(rank).sum())]
    size = count_lowest(len(layer))
    chosen, rest = ranked[:size], ranked[size:]
    if not rest.size or np.isnan(probability[chosen]).any():
        return
    changed = float((1 - probability[chosen]).mean())
    if changed <= CHANGING[0]:
        return
    unsure = layer[(probability > 0.05) & (probability < 0.95)].tolist()
    last, first = chosen[-1], rest[0]
    message = (
        f"Resampling the shards changes {changed:.0%} of the {size} lowest layers on average; "
        f"{layers_in_words(unsure)} may or may not be among them"
    )
    if group["avss_high"][last] > group["avss_low"][first]:
        message += f" (the intervals of layers {layer[last]} and {layer[first]} overlap)"
    yield finding("unstable_ranking", "warning" if changed > CHANGING[1] else "note", changed, f"{message}.")


def _row_starts(warehouse: Warehouse, runs: Sequence[Row]) -> Iterator[Row]:
    """Yield a finding for each run whose model expects another start of its rows.

    The evidence is an evaluation of the model on any text with the same ``row_start``. Runs on packed text from before
    rows started with special tokens get a finding, too.
    """
    where = pc.starts_with(pc.field("task"), ROW_START) & (pc.list_value_length(pc.field("drop")) == 0)
    columns = ("revision", "task", "metric", "value", "settings")
    losses = grouped(
        warehouse.table("evaluations", columns=columns, where=where).to_pylist(),
        lambda row: (row["revision"], settings_of(row).get("row_start", "none")),
    )
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
        for task, rows in grouped(losses.get((run["revision"], start or ""), ()), itemgetter("task")).items():
            by_metric = {row["metric"]: row["value"] for row in rows}
            if warning := row_start_warning(by_metric, run["model"], task.removeprefix(ROW_START)):
                yield finding("row_start", "warning", *warning, run_id=run["run_id"])


def _numbers(table: pa.Table) -> dict[str, NDArray[Any]]:
    """Return the columns of numbers of a table."""
    return {
        field.name: table[field.name].to_numpy()
        for field in table.schema
        if pa.types.is_integer(field.type) or pa.types.is_floating(field.type)
    }


def finding(kind: str, severity: str, value: float, message: str, **place: Any) -> Row:
    """Return a finding. ``place`` is where it holds."""
    return {"kind": kind, "severity": severity, "value": float(value), "message": message, **place}


def of_digests(digests: pa.Table, threshold: Threshold, site: str | None = None) -> Iterator[Row]:
    """Yield the findings that follow from the statistics of runs, in the order of run ids and sites.

    Args:
        digests: rows of `compaction.DIGEST`.
        threshold: a threshold that was counted.
        site: where to look, by default everywhere. Layers that do nothing are reported in any case.
    """
    table = digests.sort_by(_BY_LAYER)
    thresholds, counts = table["thresholds"].combine_chunks(), table["near_zero"].combine_chunks()
    at = pc.list_flatten(thresholds).to_numpy() == threshold.value  # there are no counts if it was not counted
    row_of_count, counted = pc.list_parent_indices(counts).to_numpy()[at], pc.list_flatten(counts).to_numpy()[at]
    columns = _numbers(table) | {"near_zero": np.bincount(row_of_count, counted, len(table)).astype(np.int64)}
    first, m2 = (columns["first_count"], columns["first_mean"], columns["first_m2"]), columns["m2"]
    has_others = (m2 > 0) & (columns["count"] > columns["first_count"])  # elements that are not of the first token
    columns["first_share"] = np.where(has_others, share_of_m2(first, columns["mean"], m2), np.nan)
    tokens, change = columns["token_count"], columns["relative_magnitude_sum"]
    columns["change"] = np.divide(change, tokens, out=np.full(len(tokens), np.nan), where=tokens > 0)
    unmoved = pc.equal(table["site"], "update").to_numpy() & (columns["count"] > 0) & (columns["max_abs"] == 0)
    columns["is_still"] = unmoved | (columns["change"] < IDENTITY)
    shares = ("mean_unit_share", "element_unit_share", "first_share")
    notable = (columns["nonfinite_count"] > 0) | np.any([columns[name] > DOMINANT for name in shares], axis=0)
    groups = [group for group in slices_by(table, ["run_id", "site"]) if site in (None, group[0]["site"])]
    for key, start, stop in groups:
        zeros, near_zero = (int(np.nansum(columns[name][start:stop])) for name in ("zero_count", "near_zero"))
        yield from (key | row for row in _exact_zeros(key["site"], zeros, near_zero, threshold))
    for key, layers in _with_any(groups, notable, columns):
        yield from (key | row for row in chain(_nonfinite(layers), _dominant_units(layers), _first_token(layers)))
    for key, layers in _with_any(slices_by(table, ["run_id"]), columns["is_still"], columns):
        yield key | _identity_layers(layers)


def _with_any(
    groups: Sequence[tuple[Row, int, int]], mask: NDArray[np.bool_], columns: Columns
) -> Iterator[tuple[Row, Columns]]:
    """Yield key and columns of the groups of rows that have a row of a mask."""
    for key, start, stop in groups:
        if mask[start:stop].any():
            yield key, {name: values[start:stop] for name, values in columns.items()}


def nonfinite_layers(digests: pa.Table) -> Iterator[Row]:
    """Yield the findings on NaN and infinite elements of runs, in the order of run ids and sites.

    Args:
        digests: run, site, layer and the two counts of elements of `compaction.DIGEST`.
    """
    table = digests.filter(pc.greater(digests["nonfinite_count"], 0)).sort_by(_BY_LAYER)
    columns = _numbers(table)
    for key, start, stop in slices_by(table, ["run_id", "site"]):
        yield from (key | row for row in _nonfinite({name: cells[start:stop] for name, cells in columns.items()}))


def _nonfinite(layers: Columns) -> Iterator[Row]:
    """Yield a finding on layers with NaN or infinite elements, which every other statistic leaves out."""
    affected = layers["nonfinite_count"] > 0
    if affected.any():
        nonfinite, names = layers["nonfinite_count"][affected], layers["layer"][affected].tolist()
        largest = (nonfinite / (layers["count"][affected] + nonfinite)).max()
        yield finding(
            "nonfinite",
            "warning",
            largest,
            f"{layers_in_words(names).capitalize()} {'has' if len(names) == 1 else 'have'} NaN or infinite activations "
            f"(up to {largest:.2g} of the elements): AVSS ranks no such layer. Is the dtype wide enough?",
        )


def _exact_zeros(site: str, zeros: int, near_zero: int, threshold: Threshold) -> Iterator[Row]:
    """Yield a finding if most near-zero elements of a site are zeros."""
    if threshold.kind != "absolute" or near_zero < NOISY_BELOW or zeros <= EXACT * near_zero:
        return
    share = zeros / near_zero
    severity, reason = (
        ("note", "the activation function cuts them off, and the threshold hardly matters.")
        if site == "neuron"
        else ("warning", "the count reflects rounding in this dtype, not the layer.")
    )
    message = f"{share:.0%} of the elements with |x| < {describe(threshold)} are exactly zero: {reason}"
    at = {"threshold": threshold.value, "threshold_kind": threshold.kind}
    yield from (finding("exact_zeros", severity, share, message, recipe=r, **at) for r in ("pooled", "element"))


def _dominant_units(layers: Columns) -> Iterator[Row]:
    """Yield findings on layers in which one unit carries more than half of the variance.

    The variance is over elements, (x - mean)^2, or over unit means, (unit mean - mean)^2, depending on the recipe.
    """
    for recipe, name in (("pooled", "mean_unit"), ("element", "element_unit"), ("unit", "mean_unit")):
        shares = layers[f"{name}_share"]
        dominated = np.flatnonzero(shares > DOMINANT)
        if not dominated.size:
            continue
        places = (values[dominated].tolist() for values in (shares, layers[name], layers["layer"]))
        share, unit, layer = max(zip(*places, strict=True))
        units = sorted({int(number) for number in layers[name][dominated]})
        defined = int(np.isfinite(shares).sum())
        first_units = f"; units {', '.join(map(str, units[:5]))}{', ...' if len(units) > 5 else ''}"
        yield finding(
            "dominant_unit",
            "warning" if len(dominated) > defined / 2 else "note",
            share,
            f"One unit carries more than half of the variance in {len(dominated)} of {defined} layers "
            f"(unit {int(unit)} carries {share:.0%} in layer {layer}{first_units if len(units) > 1 else ''}): "
            "the score is that unit's.",
            recipe=recipe,
        )


def _first_token(layers: Columns) -> Iterator[Row]:
    """Yield a finding if the first token of each row carries more than half of the variance over elements."""
    shares = layers["first_share"]
    defined, dominated = int(np.isfinite(shares).sum()), np.flatnonzero(shares > DOMINANT)
    if dominated.size:
        largest = dominated[shares[dominated].argmax()]
        yield finding(
            "first_token",
            "warning" if len(dominated) > defined / 2 else "note",
            shares[largest],
            f"The first token that counts in each row carries more than half of the variance in {len(dominated)} of "
            f"{defined} layers ({shares[largest]:.1%} in layer {layers['layer'][largest]}): it is an "
            "attention sink. To see the other tokens, leave it out: --skip-first-tokens 1.",
            recipe="element",
        )


def _identity_layers(layers: Columns) -> Row:
    """Return a finding on the layers, one or more, whose update is zero, or negligible relative to their input."""
    still = set(layers["layer"][layers["is_still"]].tolist())
    defined = np.isfinite(layers["change"])
    change = dict(zip(layers["layer"][defined].tolist(), layers["change"][defined].tolist(), strict=True))
    value = max(change.get(layer, 0.0) for layer in still)
    are = "gives out what it takes" if len(still) == 1 else "give out what they take"
    return finding(
        *("identity_layer", "warning", value),
        f"{layers_in_words(sorted(still)).capitalize()} {are} in (|out - in| / |in| is at most {value:.1g}): "
        "removing them would change nothing.",
    )


def describe(threshold: Threshold) -> str:
    return describe_threshold(threshold.value, threshold.kind)


def layers_in_words(layers: Sequence[int]) -> str:
    """Return layers in words, such as ``layers 0-3, 7``."""
    return f"layer{'s' if len(layers) != 1 else ''} {describe_layers(layers)}"


def expert_findings(warehouse: Warehouse, run_ids: Sequence[str]) -> Iterator[Row]:
    """Yield the findings of the runs whose experts were measured: on idle experts, and on dominant ones."""
    rows = warehouse.table("expert_stats", run_ids=run_ids)
    for run_id in dict.fromkeys(rows["run_id"].to_pylist()):
        layers = experts_by_layer(rows.filter(pc.equal(rows["run_id"], run_id)))
        if affected := [layer for layer in layers if layer.idle]:
            idle, number = sum(len(layer.idle) for layer in layers), sum(len(layer.load) for layer in layers)
            lists = "; ".join(
                f"layer {layer.layer}: {', '.join(map(str, layer.idle[:8]))}" for layer in affected[:MAX_NAMED]
            )
            yield finding(
                "idle_experts",
                "warning" if idle > number / 4 else "note",
                idle / number,
                f"{idle} of {number} experts got no token of this text, in "
                f"{layers_in_words([layer.layer for layer in affected])} ({lists}"
                f"{'; ...' if len(affected) > MAX_NAMED else ''}): nothing is known of them but that.",
                run_id=run_id,
            )
        if affected := [layer for layer in layers if len(layer.carried) > 1 and layer.carried.max() > DOMINANT]:
            extreme = max(affected, key=lambda layer: float(layer.carried.max()))
            share = float(extreme.carried.max())
            yield finding(
                "dominant_expert",
                "warning" if len(affected) > len(layers) / 2 else "note",
                share,
                "One expert gives more than half of what all experts add, in "
                f"{layers_in_words([layer.layer for layer in affected])} (expert {int(extreme.carried.argmax())} gives "
                f"{share:.0%} in layer {extreme.layer}).",
                run_id=run_id,
            )
