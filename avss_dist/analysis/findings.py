"""Findings: warnings and notes about the scores of runs, as data and in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from avss_dist.analysis.experts import expert_findings
from avss_dist.analysis.stats_findings import (
    DOMINANT,
    STATS,
    Row,
    Rows,
    describe,
    finding,
    grouped,
    layers_in_words,
    of_stats,
    read_stats,
)
from avss_dist.core.names import ROW_START
from avss_dist.core.registry import RECIPES
from avss_dist.core.settings import EVERY_SITE, PUBLISHED_THRESHOLD, SITES
from avss_dist.stats.intervals import why_no_interval
from avss_dist.stats.layer_stats import Float64
from avss_dist.stats.rankings import count_lowest, spearman
from avss_dist.stats.row_start import RowStarts
from avss_dist.stats.scores import MINIMUM_NEAR_ZERO, NOISY_BELOW, Threshold
from avss_dist.system.progress_bar import tracked
from avss_dist.warehouse.checks import settings_of
from avss_dist.warehouse.reader import Warehouse

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
    warehouse: Warehouse, run_ids: Sequence[str] | None = None, *, threshold: Threshold | None = None
) -> pa.Table:
    """Return the findings about the scores of runs.

    Args:
        warehouse: warehouse of the runs.
        run_ids: ids of finished runs, by default all of them. Unknown ids have no findings.
        threshold: a scored threshold, for the kinds that depend on one. By default, the published 1e-5.

    Returns:
        A table of `SCHEMA`: warnings before notes, the default site and recipe before others, then ordered by `KINDS`.
    """
    threshold = threshold or Threshold(value=PUBLISHED_THRESHOLD, kind="absolute")
    wanted_ids = None if run_ids is None else set(run_ids)
    runs = [
        row
        for row in warehouse.runs().to_pylist(maps_as_pydicts="lossy")
        if row["status"] == "done" and (wanted_ids is None or row["run_id"] in wanted_ids)
    ]
    names = [run["run_id"] for run in runs]
    where = (pc.field("threshold") == threshold.value) & (pc.field("threshold_kind") == threshold.kind)
    scores = _by_run(warehouse.table("scores", run_ids=names, columns=SCORES, where=where))
    rows = [{"run_id": name, **one} for name in names for one in _of_scores(scores(name), threshold)]
    for name, table in warehouse.stats_by_run(tracked(names, f"Findings of {len(names):,} runs"), STATS):
        rows += [{"run_id": name, **one} for one in of_stats(read_stats(table), threshold)]
    rows += [{"run_id": name, **one} for name, one in expert_findings(warehouse, names)]
    rows += [{"run_id": run["run_id"], **one} for run in runs for one in _no_interval(run)]
    rows += _first_tokens(runs, scores)
    rows += _row_starts(warehouse, runs)
    rows += _unreadable(warehouse.damaged, run_ids)
    rows.sort(key=_urgency)
    return pa.Table.from_pylist(rows, SCHEMA)


def of_rankings(table: pa.Table, score: str) -> pa.Table:
    """Return the findings that bear on a comparison of rankings by a score. See `OF_RANKINGS`."""
    kinds = [kind for kind, of_avss in OF_RANKINGS.items() if score == "avss" or not of_avss]
    return table.filter(pc.field("kind").isin(kinds))


def _no_interval(run: Row) -> Iterator[Row]:
    """Yield a finding if a run has too few shards for intervals."""
    shards = run["num_shards"]
    if shards and (message := why_no_interval(shards)):
        yield finding("no_interval", "note", shards, message)


def _unreadable(damaged: Mapping[str, str], run_ids: Sequence[str] | None) -> Iterator[Row]:
    for run_id, reason in damaged.items():
        if run_ids is None or run_id in run_ids:
            yield {"run_id": run_id, **finding("unreadable", "warning", np.nan, f"This run cannot be read: {reason}.")}


def _by_run(table: pa.Table) -> Callable[[str], list[Row]]:
    """Return a function that returns the rows of a run, ordered by layer.

    Only the rows of the requested run become Python objects, which bounds memory for thousands of runs.
    """
    table = table.sort_by([("run_id", "ascending"), ("layer", "ascending")])
    names, first, counts = np.unique(table["run_id"].to_numpy(), return_index=True, return_counts=True)
    place = dict(zip(names, zip(first.tolist(), counts.tolist(), strict=True), strict=True))
    return lambda name: table.slice(*place.get(name, (0, 0))).to_pylist()


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
    "variance",
    "avss_smoothed",
    "rank",
    "avss_low",
    "avss_high",
    "lowest_set_probability",
)


def _column(rows: Rows, name: str) -> Float64:
    return np.array([np.nan if row[name] is None else row[name] for row in rows], float)


def _of_scores(scores: Rows, threshold: Threshold) -> Iterator[Row]:
    """Yield the findings of one run that follow from its scores at one threshold."""
    at = {"threshold": threshold.value, "threshold_kind": threshold.kind}
    for (site, recipe), rows in grouped(scores, "site", "recipe").items():
        place = {"site": site, "recipe": recipe, **at}
        for check in (_tracks_depth, _noisy_sparsity, _unstable_ranking):
            for kind, severity, value, message in check(rows, threshold):
                yield finding(kind, severity, value, message, **place)
    for (site,), rows in grouped(scores, "site").items():
        for kind, severity, value, message in _recipes_disagree(rows, threshold):
            yield finding(kind, severity, value, message, site=site, **at)


Check = Iterator[tuple[str, str, float, str]]


def describe_depth(score: str, rho: float, layers: int) -> str | None:
    """Return a sentence on the correlation of a score with depth if it exceeds `TRACKS_DEPTH`, else None."""
    if not abs(rho) > TRACKS_DEPTH:
        return None
    return (
        f"{score} {'rises' if rho > 0 else 'falls'} with depth (Spearman {rho:z.3f} over {layers} layers): "
        "it says little beyond the layer's position."
    )


def _tracks_depth(rows: Rows, _: Threshold) -> Check:
    rho = spearman(_column(rows, "avss_smoothed"), _column(rows, "depth"))
    if message := describe_depth("AVSS", rho, len(rows)):
        yield "tracks_depth", "warning", rho, message


def _noisy_sparsity(rows: Rows, threshold: Threshold) -> Check:
    noisy = sum(row["near_zero_count"] < NOISY_BELOW for row in rows if row["near_zero_count"] is not None)
    if rows[0]["recipe"] == "unit" or not noisy:  # the recipe counts units, which are few
        return
    lowest, highest = min(_column(rows, "near_zero_count")), max(_column(rows, "near_zero_count"))
    no_interval = f" No interval below {MINIMUM_NEAR_ZERO}." if lowest < MINIMUM_NEAR_ZERO else ""
    yield (
        *("noisy_sparsity", "warning" if noisy > len(rows) / 2 else "note", noisy / len(rows)),
        f"{noisy} of {len(rows)} layers have fewer than {NOISY_BELOW} elements with |x| < {describe(threshold)} "
        f"({lowest:,.0f} to {highest:,.0f} in a layer): their sparsity is noise.{no_interval}",
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
        f"{layers_in_words(unsure)} may or may not be among them"
        + (f" (the intervals of layers {last['layer']} and {first['layer']} overlap)." if overlap else "."),
    )


def _recipes_disagree(rows: Rows, _: Threshold) -> Check:
    by_recipe = {recipe: _column(found, "avss_smoothed") for (recipe,), found in grouped(rows, "recipe").items()}
    pairs = [(spearman(by_recipe[a], by_recipe[b]), a, b) for a in by_recipe for b in by_recipe if a < b]
    pairs = [pair for pair in pairs if pair[0] < DISAGREE]
    if pairs:
        rho, a, b = min(pairs)
        yield (
            *("recipes_disagree", "warning" if rho < 0 else "note", rho),
            f"The recipes '{a}' and '{b}' rank the layers differently (Spearman {rho:z.2f}): "
            "which layers matter depends on how AVSS is read.",
        )


def _first_tokens(runs: Rows, scores: Callable[[str], Rows]) -> Iterator[Row]:
    """Yield findings on the variance in the first tokens, from runs that differ only in ``skip_first_tokens``."""

    def skipped(run: Mapping[str, Any]) -> int:
        return int(settings_of(run).get("skip_first_tokens") or 0)

    text = ("corpus_fingerprint", "shuffle_seed", "sequence_length", "num_sequences")
    same = ("model", "revision", *text, "dtype", "device")
    for alike in grouped(runs, *same).values():
        whole = [run for run in alike if not skipped(run)]
        for run in whole:
            for cut in sorted((run for run in alike if skipped(run)), key=skipped):
                yield from _first_token_findings(
                    run["run_id"], scores(run["run_id"]), scores(cut["run_id"]), skipped(cut)
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


def _first_token_findings(run_id: str, whole: Rows, cut: Rows, tokens: int) -> Iterator[Row]:
    without = {(row["site"], row["recipe"], row["layer"]): row["variance"] for row in cut}
    for (site, recipe), rows in grouped(whole, "site", "recipe").items():
        pairs = [(row["variance"], without.get((site, recipe, row["layer"]))) for row in rows]
        shares = np.array([1 - b / a for a, b in pairs if a and b is not None])
        if not shares.size or (largest := shares.max()) <= DOMINANT:
            continue
        over, which = int((shares > DOMINANT).sum()), "the first token" if tokens == 1 else f"the first {tokens} tokens"
        yield {
            "run_id": run_id,
            **finding(
                *("first_token", "warning" if over > len(shares) / 2 else "note", largest),
                f"Without {which} of each sequence, the variance falls by more than half in {over} of {len(shares)} "
                f"layers (by {largest:.1%} at most, median {np.median(shares):.0%}): it is the attention sink's.",
                site=site,
                recipe=recipe,
            ),
        }
