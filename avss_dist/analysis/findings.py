"""Warnings that a careful reader of scores would raise, as data and in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from avss_dist.settings import PUBLISHED_THRESHOLD, RECIPES, SITES
from avss_dist.stats.layer_stats import Float64
from avss_dist.stats.rankings import count_lowest, spearman
from avss_dist.stats.scores import NOISY_BELOW, Threshold
from avss_dist.system.progress_bar import tracked
from avss_dist.text import describe_layers, describe_threshold
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.schema import settings_of

SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("run_id", "kind", "severity", "site", "recipe")),
        ("threshold", pa.float64()),
        ("threshold_kind", pa.string()),
        ("value", pa.float64()),
        ("message", pa.string()),
    ]
)
"""A finding: site, recipe and threshold are null where it holds whatever they are; ``value`` is what was measured."""

TRACKS_DEPTH = 0.9  # absolute Spearman correlation with depth above which a score is little more than depth
DOMINANT = 0.5  # share of the variance that one unit, or the first tokens, carry
EXACT = 0.5  # share of exact zeros among near zeros
CHANGING = (0.1, 0.25)  # share of the lowest set that resampling changes: worth a note, a warning
DISAGREE = 0.5  # Spearman correlation of two recipes below which they tell different stories
IDENTITY = 1e-4  # mean |out - in| / |in| of a layer that does nothing

KINDS = (
    "nonfinite",
    "identity_layer",
    "exact_zeros",
    "noisy_sparsity",
    "tracks_depth",
    "first_token",
    "dominant_unit",
    "unstable_ranking",
    "recipes_disagree",
)
"""Every kind, in the order in which a reader should hear of them."""

Row = dict[str, Any]
Rows = Sequence[Mapping[str, Any]]


def findings(
    warehouse: Warehouse, run_ids: Sequence[str] | None = None, *, threshold: Threshold | None = None
) -> pa.Table:
    """What to know before believing the scores of these runs; every run that is done by default.

    Args:
        warehouse: where the runs are.
        run_ids: ids of runs that are done; an unknown one has no findings.
        threshold: a scored threshold, for the kinds that depend on one; the published 1e-5 by default.

    Returns:
        A table of `SCHEMA`, warnings before notes, then in the order of `KINDS` and of the default site and recipe.
    """
    threshold = threshold or Threshold(value=PUBLISHED_THRESHOLD, kind="absolute")
    runs = [
        row
        for row in warehouse.runs().to_pylist(maps_as_pydicts="lossy")
        if row["status"] == "done" and (run_ids is None or row["run_id"] in run_ids)
    ]
    names = [run["run_id"] for run in runs]
    where = (pc.field("threshold") == threshold.value) & (pc.field("threshold_kind") == threshold.kind)
    scores: dict[str, list[Row]] = {name: [] for name in names}
    for row in warehouse.table("scores", run_ids=names, columns=SCORES, where=where).sort_by("layer").to_pylist():
        scores[row["run_id"]].append(row)
    found = [{"run_id": name, **finding} for name in names for finding in _of_scores(scores[name], threshold)]
    for name, table in warehouse.stats_by_run(tracked(names, f"Findings of {len(names):,} runs"), STATS):
        found += [{"run_id": name, **finding} for finding in _of_stats(_stats(table), threshold)]
    found += _first_tokens(runs, scores)
    order: dict[str | None, int] = {None: 0, **{name: i for names in (SITES, RECIPES) for i, name in enumerate(names)}}
    found.sort(
        key=lambda f: (
            f["severity"] == "note",
            order[f.get("site")] > 0 or order[f.get("recipe")] > 0,
            KINDS.index(f["kind"]),
            order[f.get("site")],
            order[f.get("recipe")],
        )
    )
    return pa.Table.from_pylist(found, SCHEMA)


SCORES = (
    "run_id",
    "layer",
    "site",
    "recipe",
    "threshold",
    "threshold_kind",
    "depth",
    "near_zero_count",
    "variance",
    "avss_smoothed",
    "rank",
    "avss_low",
    "avss_high",
    "lowest_set_probability",
)
STATS = (
    "run_id",
    "layer",
    "site",
    "count",
    "mean",
    "m2",
    "thresholds",
    "near_zero",
    "zero_count",
    "nonfinite_count",
    "max_abs",
    "unit_count",
    "unit_sum",
    "unit_sum_sq",
    "token_count",
    "relative_magnitude_sum",
)


def _stats(table: pa.Table) -> list[Row]:
    """Rows of ``layer_stats`` by layer, lists as arrays: there may be thousands of units."""
    table = table.sort_by("layer")
    lists = {f.name for f in table.schema if pa.types.is_list(f.type)}
    rows: list[Row] = table.drop_columns(list(lists)).to_pylist()
    for name in lists:
        for row, cell in zip(rows, table[name], strict=True):
            row[name] = cell.values.to_numpy() if cell.is_valid else np.empty(0)
    return rows


def _grouped(rows: Rows, *names: str) -> dict[tuple[Any, ...], list[Mapping[str, Any]]]:
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def _column(rows: Rows, name: str) -> Float64:
    return np.array([np.nan if row[name] is None else row[name] for row in rows], float)


def _finding(kind: str, severity: str, value: float, message: str, **place: Any) -> Row:
    return {"kind": kind, "severity": severity, "value": float(value), "message": message, **place}


def _of_scores(scores: Rows, threshold: Threshold) -> Iterator[Row]:
    """Findings of one run that its scores at one threshold tell."""
    at = {"threshold": threshold.value, "threshold_kind": threshold.kind}
    for (site, recipe), rows in _grouped(scores, "site", "recipe").items():
        place = {"site": site, "recipe": recipe, **at}
        for check in (_tracks_depth, _noisy_sparsity, _unstable_ranking):
            for kind, severity, value, message in check(rows, threshold):
                yield _finding(kind, severity, value, message, **place)
    for (site,), rows in _grouped(scores, "site").items():
        for kind, severity, value, message in _recipes_disagree(rows, threshold):
            yield _finding(kind, severity, value, message, site=site, **at)


Check = Iterator[tuple[str, str, float, str]]


def describe_depth(score: str, rho: float, layers: int) -> str | None:
    """What a correlation of a score with depth says, where it is so strong that a reader must know; else None."""
    if not abs(rho) > TRACKS_DEPTH:
        return None
    return (
        f"{score} {'rises' if rho > 0 else 'falls'} with depth (Spearman {rho:.3f} over {layers} layers): "
        "it says little that the layer's number does not."
    )


def _tracks_depth(rows: Rows, _: Threshold) -> Check:
    rho = spearman(_column(rows, "avss_smoothed"), _column(rows, "depth"))
    if message := describe_depth("AVSS", rho, len(rows)):
        yield "tracks_depth", "warning", rho, message


def _noisy_sparsity(rows: Rows, threshold: Threshold) -> Check:
    noisy = sum(row["near_zero_count"] < NOISY_BELOW for row in rows if row["near_zero_count"] is not None)
    if rows[0]["recipe"] == "unit" or not noisy:  # it counts units, of which there are few
        return
    fewest, most = min(_column(rows, "near_zero_count")), max(_column(rows, "near_zero_count"))
    yield (
        *("noisy_sparsity", "warning" if noisy > len(rows) / 2 else "note", noisy / len(rows)),
        f"{noisy} of {len(rows)} layers have fewer than {NOISY_BELOW} elements with |x| < {_describe(threshold)} "
        f"({fewest:,.0f} to {most:,.0f} in a layer): their sparsity is noise.",
    )


def _unstable_ranking(rows: Rows, _: Threshold) -> Check:
    ranked = sorted((row for row in rows if row["rank"] is not None), key=lambda row: row["rank"])
    size = count_lowest(len(rows))
    chosen, others = ranked[:size], ranked[size:]
    probability = _column(chosen, "lowest_set_probability")
    if not others or np.isnan(probability).any():
        return
    changed = float((1 - probability).mean())
    if changed <= CHANGING[0]:
        return
    unsure = [row["layer"] for row in rows if 0.05 < (row["lowest_set_probability"] or 0) < 0.95]
    last, first = chosen[-1], others[0]
    overlap = (last["avss_high"] or -np.inf) > (first["avss_low"] or np.inf)
    yield (
        *("unstable_ranking", "warning" if changed > CHANGING[1] else "note", changed),
        f"Resampling the shards changes {changed:.0%} of the {size} lowest layers on average; "
        f"{_layers(unsure)} may or may not be among them"
        + (f" (the intervals of layers {last['layer']} and {first['layer']} overlap)." if overlap else "."),
    )


def _recipes_disagree(rows: Rows, _: Threshold) -> Check:
    by_recipe = {recipe: _column(found, "avss_smoothed") for (recipe,), found in _grouped(rows, "recipe").items()}
    pairs = [(spearman(by_recipe[a], by_recipe[b]), a, b) for a in by_recipe for b in by_recipe if a < b]
    pairs = [pair for pair in pairs if pair[0] < DISAGREE]
    if pairs:
        rho, a, b = min(pairs)
        yield (
            *("recipes_disagree", "warning" if rho < 0 else "note", rho),
            f"The recipes '{a}' and '{b}' rank the layers differently (Spearman {rho:.2f}): "
            "which layers matter depends on how AVSS is read.",
        )


def _of_stats(stats: Rows, threshold: Threshold) -> Iterator[Row]:
    """Findings of one run that its statistics tell."""
    for (site,), rows in _grouped(stats, "site").items():
        for finding in (*_nonfinite(rows), *_exact_zeros(site, rows, threshold), *_dominant_units(rows)):
            yield {"site": site, **finding}
    yield from _identity_layers(stats)


def _nonfinite(rows: Rows) -> Iterator[Row]:
    """Layers with NaN or infinite elements, which every other statistic leaves out."""
    shares = {
        row["layer"]: row["nonfinite_count"] / (row["count"] + row["nonfinite_count"])
        for row in rows
        if row["nonfinite_count"]
    }
    if shares:
        largest = max(shares.values())
        have = "has" if len(shares) == 1 else "have"
        yield _finding(
            "nonfinite",
            "warning",
            largest,
            f"{_layers(list(shares)).capitalize()} {have} NaN or infinite activations (up to {largest:.2g} of the "
            "elements): AVSS ranks no such layer. Is the dtype wide enough?",
        )


def _exact_zeros(site: str, rows: Rows, threshold: Threshold) -> Iterator[Row]:
    if threshold.kind != "absolute":
        return
    near_zero = sum(int(row["near_zero"][row["thresholds"] == threshold.value].sum()) for row in rows)
    zeros = sum(row["zero_count"] or 0 for row in rows)
    if near_zero < NOISY_BELOW or zeros <= EXACT * near_zero:
        return
    share = zeros / near_zero
    message = f"{share:.0%} of the elements with |x| < {_describe(threshold)} are exactly zero: "
    if site == "neuron":
        severity, message = "note", message + "the activation function cuts them off, and the threshold hardly matters."
    else:
        severity, message = "warning", message + "the count tells of the dtype's rounding, not of the layer."
    at = {"threshold": threshold.value, "threshold_kind": threshold.kind}
    yield from (_finding("exact_zeros", severity, share, message, recipe=r, **at) for r in ("pooled", "element"))


def _dominant_units(rows: Rows) -> Iterator[Row]:
    """Sums over units of (x - mean)^2, and of (unit mean - mean)^2, that one unit carries more than half of."""
    rows = [row for row in rows if row["unit_sum"].size and row["unit_count"]]
    of_means, of_elements = _largest_shares(rows, _shares_of_means), _largest_shares(rows, _shares_of_elements)
    for recipe, largest in (("pooled", of_means), ("element", of_elements), ("unit", of_means)):
        over = [found for found in largest if found[0] > DOMINANT]
        if not over:
            continue
        share, unit, layer = max(over)
        units = sorted({u for _, u, _ in over})
        message = (
            f"One unit carries more than half of the variance in {len(over)} of {len(largest)} layers "
            f"(unit {unit} carries {share:.0%} in layer {layer}"
            + (
                f"; units {', '.join(map(str, units[:5]))}{', ...' if len(units) > 5 else ''})"
                if len(units) > 1
                else ")"
            )
            + ": the score is that unit's."
        )
        severity = "warning" if len(over) > len(largest) / 2 else "note"
        yield _finding("dominant_unit", severity, share, message, recipe=recipe)


def _largest_shares(rows: Rows, shares_of: Callable[[Mapping[str, Any]], Float64]) -> list[tuple[float, int, int]]:
    """Share, unit and layer, where shares are defined."""
    shares = [(shares_of(row), row["layer"]) for row in rows]
    return [(float(np.max(s)), int(np.argmax(s)), layer) for s, layer in shares if np.isfinite(s).all()]


def _shares_of_elements(row: Mapping[str, Any]) -> Float64:
    total, squares, n = row["unit_sum"], row["unit_sum_sq"], row["unit_count"]
    mean = total.sum() / (n * total.size)
    return _share(np.maximum(squares - 2 * mean * total + n * mean**2, 0))


def _shares_of_means(row: Mapping[str, Any]) -> Float64:
    means = row["unit_sum"] / row["unit_count"]
    return _share((means - means.mean()) ** 2)


def _share(values: Float64) -> Float64:
    total = values.sum()
    return values / total if total > 0 else np.full(values.shape, np.nan)


def _identity_layers(stats: Rows) -> Iterator[Row]:
    """Layers whose update is zero throughout, or (without that site) next to nothing beside their input."""
    still = {row["layer"] for row in stats if row["site"] == "update" and row["count"] and row["max_abs"] == 0}
    known = [row for row in stats if row["token_count"] and row["relative_magnitude_sum"] is not None]
    moved = {row["layer"]: row["relative_magnitude_sum"] / row["token_count"] for row in known}
    still |= {layer for layer, size in moved.items() if size < IDENTITY}
    if still:
        value = max((moved.get(layer, 0.0) for layer in still), default=0.0)
        are = "gives out what it takes" if len(still) == 1 else "give out what they take"
        yield _finding(
            *("identity_layer", "warning", value),
            f"{_layers(sorted(still)).capitalize()} {are} in (|out - in| / |in| is at most {value:.1g}): "
            "removing them would change nothing.",
        )


def _first_tokens(runs: Rows, scores: Mapping[str, Rows]) -> Iterator[Row]:
    """Runs that differ in ``--skip-first-tokens`` alone: how much of the variance the skipped tokens carried."""

    def skipped(run: Mapping[str, Any]) -> int:
        return int(settings_of(run).get("skip_first_tokens") or 0)

    same = ("model", "revision", "corpus_fingerprint", "dtype", "sequence_length", "num_sequences", "device")
    for alike in _grouped(runs, *same).values():
        whole = [run for run in alike if not skipped(run)]
        for run in whole:
            for cut in sorted((run for run in alike if skipped(run)), key=skipped):
                yield from _carried(run["run_id"], scores[run["run_id"]], scores[cut["run_id"]], skipped(cut))


def _carried(run_id: str, whole: Rows, cut: Rows, tokens: int) -> Iterator[Row]:
    without = {(row["site"], row["recipe"], row["layer"]): row["variance"] for row in cut}
    for (site, recipe), rows in _grouped(whole, "site", "recipe").items():
        pairs = [(row["variance"], without.get((site, recipe, row["layer"]))) for row in rows]
        shares = np.array([1 - b / a for a, b in pairs if a and b is not None])
        if not shares.size or (largest := shares.max()) <= DOMINANT:
            continue
        over, which = int((shares > DOMINANT).sum()), "the first token" if tokens == 1 else f"the first {tokens} tokens"
        yield {
            "run_id": run_id,
            **_finding(
                *("first_token", "warning" if over > len(shares) / 2 else "note", largest),
                f"Without {which} of each sequence, the variance falls by more than half in {over} of {len(shares)} "
                f"layers (by {largest:.1%} at most, median {np.median(shares):.0%}): it is the attention sink's.",
                site=site,
                recipe=recipe,
            ),
        }


def _describe(threshold: Threshold) -> str:
    return describe_threshold(threshold.value, threshold.kind)


def _layers(layers: Sequence[int]) -> str:
    """``layers 0-3, 7``."""
    return f"layer{'s' if len(layers) != 1 else ''} {describe_layers(layers)}"
