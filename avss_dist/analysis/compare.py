"""How far rankings of layers agree: between runs, families, corpora, dtypes, recipes, thresholds, sites and scores."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from avss_dist.analysis.thresholds import scores_at
from avss_dist.errors import QueryError, require_known
from avss_dist.settings import LOWEST_SHARE, RIVALS, SCORES
from avss_dist.stats.layer_stats import Float64
from avss_dist.stats.rankings import FEWEST, align, count_lowest, rank_biased_overlap, spearman
from avss_dist.stats.scores import Threshold, score_column
from avss_dist.system.progress_bar import tracked
from avss_dist.text import describe_threshold
from avss_dist.warehouse.checks import settings_of
from avss_dist.warehouse.reader import Warehouse

CONDITIONS = ("corpus", "dtype", "sequence_length", "layout", "skip_first_tokens", "schema_version")
"""What two runs must share, the models apart, for their scores to be comparable."""
BETWEEN = ("run", "family", "revision", "corpus", "dtype")
WITHIN = ("recipe", "threshold", "site", "score")
BY = (*BETWEEN, *WITHIN)

SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("by", "a", "b", "a_run_id", "b_run_id")),
        ("layers", pa.int64()),
        ("interpolated", pa.bool_()),
        *((name, pa.float64()) for name in ("spearman", "kendall", "rbo")),
        *((name, pa.int64()) for name in ("k", "shared")),
        *((name, pa.float64()) for name in ("jaccard", "jaccard_by_chance", "p_by_chance")),
    ]
)
"""A pair: ``layers`` compared, three correlations, and the lowest ``k`` of each, of which ``shared`` are the same.

``interpolated`` where the models differ in depth; ``p_by_chance`` is how often two random sets share as many or more.
"""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One score of one run over its layers, at one site, recipe and threshold.

    Attributes:
        run: the row of ``runs``; ``layout`` and ``skip_first_tokens`` with it.
        depth, values: float64[layers], ascending in depth.
    """

    run: Mapping[str, Any]
    site: str
    recipe: str
    threshold: Threshold
    score: str
    depth: Float64
    values: Float64

    def label(self, by: str) -> str:
        """What this profile is called where pairs differ in ``by``."""
        if by == "threshold":
            return describe_threshold(self.threshold.value, self.threshold.kind)
        if by in WITHIN:
            return str(getattr(self, by))
        return str(self.run["run_id" if by == "run" else by])


def compare(
    warehouse: Warehouse,
    run_ids: Sequence[str],
    *,
    by: str = "run",
    site: str = "block",
    recipe: str = "pooled",
    threshold: Threshold,
    score: str = "avss",
    k: int | None = None,
    share: float = LOWEST_SHARE,
    allow_mismatch: bool = False,
) -> pa.Table:
    """Correlations of every two profiles that differ in ``by`` and, but for the models, in nothing else.

    Args:
        warehouse: where the runs are.
        run_ids: ids of runs that are done.
        by: what a pair differs in. ``run``, ``family`` and ``revision`` are pairs of runs under the same conditions;
            ``corpus`` and ``dtype`` pairs of runs of the same model; ``recipe``, ``threshold`` and ``site`` pairs
            within a run, and ``score`` AVSS with each of its rivals.
        site, recipe, threshold, score: which profile, unless ``by`` says that it varies.
        k: how many of the lowest layers to compare; ``share`` of the layers by default.
        allow_mismatch: compare runs under different conditions too.

    Returns:
        A table of `SCHEMA`, most alike first.

    Raises:
        QueryError: the runs are not comparable (the columns in which they differ are named), or nothing is to compare.
    """
    require_known("`by`", by, BY, QueryError)
    require_known("score", score, SCORES, QueryError)
    runs = _runs(warehouse, run_ids)
    fixed: dict[str, Any] = {"site": site, "recipe": recipe, "threshold": threshold, "score": score}
    found = profiles(warehouse, runs, **{name: None if name == by else value for name, value in fixed.items()})
    pairs = [(a, b) for a, b in combinations(found, 2) if _is_pair(a, b, by, allow_mismatch)]
    if by in ("run", "family", "revision") and not allow_mismatch:
        _require_comparable([profile.run for profile in found])
    if not pairs:
        raise QueryError(f"No two profiles differ in {by} alone.", _what_there_is(found, by))
    rows = [{"by": by, **_compared(a, b, by, k, share)} for a, b in tracked(pairs, f"Comparing {len(pairs):,} pairs")]
    rows.sort(key=lambda row: -math.inf if math.isnan(row["spearman"]) else row["spearman"], reverse=True)
    return pa.Table.from_pylist(rows, SCHEMA)


def profiles(
    warehouse: Warehouse,
    runs: Sequence[Mapping[str, Any]],
    *,
    site: str | None,
    recipe: str | None,
    threshold: Threshold | None,
    score: str | None = "avss",
) -> list[Profile]:
    """Profiles of runs, in their order; None takes every site, recipe, threshold or score that there is.

    Layers without a score are left out. A threshold that was not scored is computed, see `thresholds.scores_at`.

    Args:
        runs: rows of ``runs``.
    """
    rows: dict[str, dict[Hashable, list[Mapping[str, Any]]]] = {run["run_id"]: {} for run in runs}
    for row in _score_table(warehouse, runs, site, recipe, threshold).to_pylist():
        key = (row["site"], row["recipe"], Threshold(value=row["threshold"], kind=row["threshold_kind"]))
        rows[row["run_id"]].setdefault(key, []).append(row)
    return [
        profile
        for run in runs
        for key, found in rows[run["run_id"]].items()
        for name in (SCORES if score is None else (score,))
        if (profile := _profile(run, key, name, found)).values.size
    ]


def _score_table(
    warehouse: Warehouse,
    runs: Sequence[Mapping[str, Any]],
    site: str | None,
    recipe: str | None,
    threshold: Threshold | None,
) -> pa.Table:
    """The scores of runs, computed where a threshold was not scored; None is any."""
    names = [run["run_id"] for run in runs]
    place = ["run_id", "site", "recipe", "threshold", "threshold_kind", "depth"]
    columns = [*place, "avss_smoothed", *RIVALS]
    where = at = pc.scalar(True)
    if threshold is not None:
        at = (pc.field("threshold") == threshold.value) & (pc.field("threshold_kind") == threshold.kind)
    for name, value in (("site", site), ("recipe", recipe)):
        where = where if value is None else where & (pc.field(name) == value)
    table = warehouse.table("scores", run_ids=names, columns=columns, where=where & at)
    scored = table.num_rows or warehouse.table("scores", run_ids=names, columns=["layer"], where=at).num_rows
    if threshold is not None and not scored:
        table = scores_at(warehouse, runs, threshold, sites=site and [site]).select(columns).filter(where)
    return table


def _profile(run: Mapping[str, Any], key: Any, score: str, rows: Sequence[Mapping[str, Any]]) -> Profile:
    column = score_column(score)
    scored = sorted((row["depth"], row[column]) for row in rows if row[column] is not None)
    depth, values = np.array(scored, float).reshape(-1, 2).T
    return Profile(run=run, site=key[0], recipe=key[1], threshold=key[2], score=score, depth=depth, values=values)


def correlate(
    a: tuple[Float64, Float64], b: tuple[Float64, Float64], *, k: int | None = None, share: float = LOWEST_SHARE
) -> dict[str, Any]:
    """Agreement of two profiles, each (depth, values): the columns of `SCHEMA` from ``layers`` on.

    Where the depths differ, the profile with more layers is interpolated, linear in depth, at those of the other.

    Spearman's rho with average ranks, Kendall's tau-b by scipy, and rank-biased overlap from the lowest layer up
    (`rank_biased_overlap`). NaN for fewer than three layers, or where a profile is constant.
    """
    from scipy import stats  # a second to import

    x, y, interpolated = align(a, b)
    n = len(x)
    size = min(k or count_lowest(n, share), n)
    defined = n >= FEWEST and np.ptp(x) > 0 and np.ptp(y) > 0
    order_x, order_y = np.argsort(x, kind="stable"), np.argsort(y, kind="stable")
    shared = len(set(order_x[:size]) & set(order_y[:size]))
    jaccard_by_chance, at_least = _by_chance(n, size)
    return {
        "layers": n,
        "interpolated": interpolated,
        "k": size,
        "shared": shared,
        "spearman": spearman(x, y),
        "kendall": float(stats.kendalltau(x, y).statistic) if defined else np.nan,
        "rbo": rank_biased_overlap(order_x, order_y) if defined else np.nan,
        "jaccard": shared / (2 * size - shared),
        "jaccard_by_chance": jaccard_by_chance,
        "p_by_chance": float(at_least[shared]),
    }


@cache
def _by_chance(layers: int, size: int) -> tuple[float, Float64]:
    """Of two random sets of ``size`` layers: the expected Jaccard index, and how often 0, 1, ... or more are shared."""
    from scipy.stats import hypergeom

    overlaps, chance = np.arange(size + 1), hypergeom(layers, size, size)
    return float((chance.pmf(overlaps) * overlaps / (2 * size - overlaps)).sum()), chance.sf(overlaps - 1)


def _compared(a: Profile, b: Profile, by: str, k: int | None, share: float) -> dict[str, Any]:
    return {
        "a": a.label(by),
        "b": b.label(by),
        "a_run_id": a.run["run_id"],
        "b_run_id": b.run["run_id"],
        **correlate((a.depth, a.values), (b.depth, b.values), k=k, share=share),
    }


def _runs(warehouse: Warehouse, run_ids: Sequence[str]) -> list[dict[str, Any]]:
    rows = {row["run_id"]: row for row in warehouse.runs().to_pylist(maps_as_pydicts="lossy")}
    for row in rows.values():
        settings = settings_of(row)
        row |= {"skip_first_tokens": settings.get("skip_first_tokens", 0), "layout": settings.get("layout", "packed")}
    return [rows[require_known("run", run_id, sorted(rows), QueryError)] for run_id in run_ids]


def _condition(run: Mapping[str, Any], name: str) -> Any:
    """Texts are the same by content, not by name."""
    return (run["corpus_fingerprint"] or run["corpus"]) if name == "corpus" else run[name]


def _is_pair(a: Profile, b: Profile, by: str, allow_mismatch: bool) -> bool:
    one, other = a.run, b.run
    if by in WITHIN:
        rivals = by != "score" or SCORES[0] in (a.score, b.score)
        return bool(one["run_id"] == other["run_id"] and rivals and a.label(by) != b.label(by))
    if one["run_id"] == other["run_id"]:
        return False
    if by in ("corpus", "dtype"):
        same = allow_mismatch or all(_condition(one, c) == _condition(other, c) for c in CONDITIONS if c != by)
        alike = (one["model"], one["revision"]) == (other["model"], other["revision"])
        return bool(same and alike and _condition(one, by) != _condition(other, by))
    if by == "revision":
        return bool(one["model"] == other["model"] and one["revision"] != other["revision"])
    return bool(by == "run" or one[by] != other[by])


def _require_comparable(runs: Sequence[Mapping[str, Any]]) -> None:
    differ = list(_differences(runs, CONDITIONS))
    if differ:
        raise QueryError(
            f"These runs are not comparable: they differ in {'; '.join(differ)}.",
            "Choose alike ones, name what they differ in (`by` corpus, `by` dtype), or pass `allow_mismatch`.",
        )


def _differences(runs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Iterator[str]:
    """``dtype (bfloat16, float32)``, for each column that is not the same in all."""
    for name in names:
        values = {_condition(run, name): str(run[name]) for run in runs}
        if len(values) > 1:
            yield f"{name} ({', '.join(sorted(values.values()))})"


def _what_there_is(found: Sequence[Profile], by: str) -> str:
    if not found:
        return "There are no scores of that site, recipe and threshold: avss query WAREHOUSE 'SUMMARIZE scores'."
    labels = sorted({profile.label(by) for profile in found})
    return f"There is: {', '.join(labels[:10])}{', ...' if len(labels) > 10 else ''}."
