"""Comparison of layer rankings between runs, families, corpora, dtypes, recipes, thresholds, sites and scores."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from itertools import combinations
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from avss_dist.analysis.agreement import (
    GROUPS,
    CorrelationSummary,
    RankMatrix,
    SimilarityMap,
    correlate_pairs,
    similarity_map,
    summarize,
    survey_pairs,
)
from avss_dist.analysis.chosen import run_labels
from avss_dist.analysis.own_scores import own_labels, own_score
from avss_dist.analysis.thresholds import at_reading, scores_at
from avss_dist.core.errors import QueryError, require_known
from avss_dist.core.registry import BASELINES, FROM_ACTIVATIONS, LOWEST_SHARE, READING, SCORES, is_own
from avss_dist.core.results import TabularResult
from avss_dist.core.text import basename, count_of, describe_threshold
from avss_dist.stats.layer_stats import Float64
from avss_dist.stats.scores import Threshold
from avss_dist.warehouse.checks import settings_of
from avss_dist.warehouse.reader import Warehouse, grouped, slices_by

CONDITIONS = ("corpus", "dtype", "sequence_length", "layout", "row_start", "skip_first_tokens", "numbers_version")
"""Properties besides the model that two runs must share for their scores to be comparable."""
BETWEEN = ("run", "family", "size", "revision", "corpus", "dtype")
ACROSS_MODELS = ("run", "family", "size", "revision")
WITHIN = ("recipe", "threshold", "site", "score")
BY = (*BETWEEN, *WITHIN)
MAX_PAIRS = 1_000_000  # that are listed: those of 1,400 runs
EXTREMES = 500  # pairs most alike, and as many least alike, that are listed of more
SIZES = (0.5e9, 1.5e9, 4e9, 10e9, 40e9, 150e9)
"""Numbers of parameters between the groups of a comparison by size."""

SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("by", "a", "b", "a_run_id", "b_run_id")),
        ("layers", pa.int64()),
        ("interpolated", pa.bool_()),
        *((name, pa.float64()) for name in ("spearman", "given_depth")),
        *((name, pa.int64()) for name in ("k", "shared")),
        *((name, pa.float64()) for name in ("jaccard", "jaccard_by_chance", "p_by_chance")),
    ]
)
"""Columns of a compared pair: its correlations and the overlap of the lowest ``k`` layers.

``layers`` is the number of layers compared. ``interpolated`` is true if the models differ in depth. ``shared`` layers
are among the lowest ``k`` of both. ``p_by_chance`` is the probability that two random sets share at least as many.
"""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Values of one score over the layers of one run, at one site, recipe and threshold.

    Attributes:
        run: the row of ``runs``, extended by `with_conditions`.
        reading: site, recipe, threshold and score, by name.
        depth, values: float64[layers], ascending in depth.
    """

    run: Mapping[str, Any]
    reading: Mapping[str, Any]
    depth: Float64
    values: Float64

    def label(self, by: str) -> str:
        """Return the label of this profile in a comparison by ``by``."""
        if by == "size":
            return size_label(self.run["num_parameters"])
        return str(self.reading[by] if by in WITHIN else self.run["run_id" if by == "run" else by])


def size_label(parameters: int | None) -> str:
    """Return the group of a model by its number of parameters, such as ``0.5B to 1.5B``."""
    if parameters is None:
        return "unknown"
    place = bisect_right(SIZES, parameters)
    low, high = (f"{SIZES[index] / 1e9:g}B" if 0 <= index < len(SIZES) else "" for index in (place - 1, place))
    return f"{low} to {high}" if low and high else f"under {high}" if high else f"{low} and more"


@dataclass(frozen=True, kw_only=True, repr=False)
class RankingComparison(TabularResult):
    """Agreement of pairs of profiles, of the groups that they belong to, and the runs that are in no pair.

    Attributes:
        number: number of pairs.
        spearman, given_depth: summaries of the correlations of all pairs.
        groups: a table of `GROUPS`: mean correlations within and between groups, over all pairs. Empty without groups.
        pairs: a table of `SCHEMA`, most alike first. Of more pairs than are listed, the most and the least alike.
        conditions: the `CONDITIONS` in which the given runs differ. Empty unless they restrict the pairs.
        left_out: the reason why a run is in no pair, by run id.
        similarity: map of the correlations of all runs under the most frequent conditions; None unless asked for.
        odd: the run that agrees least with the others of its model or family, and in what it differs, as a sentence;
            empty with fewer than three such runs, or if not all pairs are listed.
    """

    number: int
    spearman: CorrelationSummary
    given_depth: CorrelationSummary
    groups: pa.Table = field(default_factory=GROUPS.empty_table)
    pairs: pa.Table
    conditions: tuple[str, ...] = ()
    left_out: Mapping[str, str]
    similarity: SimilarityMap | None = None
    odd: str = ""

    def table(self) -> pa.Table:
        """Return the pairs as a table of `SCHEMA`."""
        return self.pairs

    def summary(self) -> str:
        """Return the number of pairs and the number of runs that are in no pair, in words."""
        return f"{count_of(self.number, 'pair')}, {count_of(len(self.left_out), 'run')} left out"


def compare(
    warehouse: Warehouse,
    run_ids: Sequence[str],
    *,
    by: str = "run",
    site: str = "block",
    recipe: str = "pooled",
    threshold: Threshold,
    score: str = "avss",
    share: float = LOWEST_SHARE,
    allow_mismatch: bool = False,
    max_listed: int = MAX_PAIRS,
    mapped: bool = False,
) -> RankingComparison:
    """Correlate every two profiles that differ in ``by`` and otherwise at most in the model.

    All pairs are summarized, and so is the agreement within and between the groups that ``by`` makes. Runs that have no
    counterpart under the same `CONDITIONS` are left out. The result names them with the reason.

    Args:
        warehouse: warehouse of the runs.
        run_ids: ids of finished runs.
        by: the property in which a pair differs. ``run``, ``family``, ``size`` and ``revision`` compare runs under the
            same conditions. ``corpus`` and ``dtype`` compare runs of the same model. ``recipe``, ``threshold`` and
            ``site`` compare readings of one run, and ``score`` compares AVSS with each baseline score.
        site, recipe, threshold, score: selection of profiles. The one that ``by`` names is ignored, but for a score of
            people's own: `own_scores.own_score`. Its profiles have no site, recipe and threshold.
        share: number of lowest layers to compare, as a share of the layers.
        allow_mismatch: also compare runs under different conditions.
        max_listed: number of pairs up to which all are listed. Of more, the `EXTREMES` are.
        mapped: also make a similarity map. It shows runs, so ``by`` is a property of runs.

    Raises:
        QueryError: if no two runs are comparable (the message names the conditions in which they differ), or no two
            profiles differ in ``by``.
    """
    require_known("`by`", by, BY, QueryError)
    if not is_own(score):
        require_known("score", score, FROM_ACTIVATIONS, QueryError)
    if mapped and by not in BETWEEN:
        raise QueryError(f"A map shows runs, and `by` {by} compares readings of one run.", "Compare by run or family.")
    runs = runs_with_conditions(warehouse, run_ids)
    fixed: dict[str, Any] = {"site": site, "recipe": recipe, "threshold": threshold, "score": score}
    if not is_own(score) or by == "score":
        selected = profiles(warehouse, runs, **{name: None if name == by else value for name, value in fixed.items()})
    else:
        selected = []
    unscored = "no scores at this site, recipe and threshold"
    if is_own(score):
        selected += own_profiles(warehouse, runs, score)
        unscored = "no such scores"
    scores = [(profile.depth, profile.values) for profile in selected]
    survey: dict[str, Any] = {}
    if by in BETWEEN:
        members = {
            "stratum": [_shared(profile, by, allow_mismatch) for profile in selected],
            "value": [_value(profile, by) for profile in selected],
            "model": [str(profile.run["model"]) for profile in selected],
            "group": ["all runs" if by == "run" else profile.label(by) for profile in selected],
        }
        survey, indices = survey_pairs(
            RankMatrix(scores), members, by=by, across_models=by in ("run", "family", "size"), most=EXTREMES
        )
    if by in WITHIN or survey["number"] <= max_listed:
        indices = np.array(sorted(_pairs(selected, by, allow_mismatch)), np.int64).reshape(-1, 2).T
    if not indices.size:
        raise _no_pair(selected, by, allow_mismatch)
    agreement = correlate_pairs(scores, *indices, share=share)
    names = {"": [profile.label(by) for profile in selected], "_run_id": [p.run["run_id"] for p in selected]}
    columns = {
        "by": pa.repeat(by, indices.shape[1]),
        **{
            f"{side}{kind}": pa.array(texts, pa.string()).take(pa.array(index))
            for kind, texts in names.items()
            for side, index in zip("ab", indices, strict=True)
        },
        **agreement,
    }
    order = np.argsort(-np.nan_to_num(agreement["spearman"], nan=-2.0), kind="stable")
    pairs = pa.table({name: columns[name] for name in SCHEMA.names}, SCHEMA).take(pa.array(order))
    scored = list({profile.run["run_id"]: profile.run for profile in selected}.values())
    if all_listed := survey.get("number", len(pairs)) == len(pairs):
        survey |= {name: summarize(pairs[name].to_numpy()) for name in ("spearman", "given_depth")}
    compared = {selected[index].run["run_id"] for members in _strata(selected, by, allow_mismatch) for index in members}
    mapped_profiles = [profile for profile in selected if profile.run["run_id"] in compared]
    return RankingComparison(
        pairs=pairs,
        **{"number": len(pairs), **survey},
        conditions=() if allow_mismatch or by not in ACROSS_MODELS else tuple(differing(scored)),
        left_out=_left_out(runs, {run["run_id"] for run in scored}, compared, by, unscored),
        similarity=_map(mapped_profiles, by, allow_mismatch) if mapped else None,
        odd=find_odd(pairs, scored) if by in BETWEEN and all_listed else "",
    )


def find_odd(pairs: pa.Table, runs: Sequence[Mapping[str, Any]]) -> str:
    """Return a sentence on the run whose mean correlation with the others of its model, or else family, is lowest.

    Args:
        pairs: a table of `SCHEMA`, of pairs of runs.
        runs: rows of ``runs``, extended by `with_conditions`.

    Returns:
        The sentence. Empty if no model and no family has three runs that do not all agree alike.
    """
    by_id, ends = {run["run_id"]: run for run in runs}, ("a_run_id", "b_run_id")
    rows = pairs.filter(pairs["spearman"].is_valid()).select([*ends, "spearman"]).to_pylist()
    for group in ("model", "family"):
        group_of = {run["run_id"]: run[group] for run in runs}
        within = [row for row in rows if group_of[row[ends[0]]] == group_of[row[ends[1]]]]
        by_run = grouped(((row[end], row["spearman"]) for row in within for end in ends), itemgetter(0))
        mean = {run_id: float(np.mean([rho for _, rho in members])) for run_id, members in by_run.items()}
        groups = [ids for ids in grouped(mean, group_of.get).values() if len(ids) > 2]
        if groups := [ids for ids in groups if len({f"{mean[run_id]:z.3f}" for run_id in ids}) > 1]:
            break
    else:
        return ""
    members = min(groups, key=lambda ids: min(mean[run_id] for run_id in ids))
    odd = min(members, key=lambda run_id: (mean[run_id], run_id))
    remaining = [run_id for run_id in members if run_id != odd]
    label = run_labels([by_id[run_id] for run_id in members])[members.index(odd)]
    differences = []
    for name in ("model", "revision", *CONDITIONS):
        (usual, number), *_ = Counter(str(by_id[run_id][name]) for run_id in remaining).most_common(1)
        if number > len(remaining) / 2 and str(by_id[odd][name]) != usual:
            differences.append(f"{name} ({basename(by_id[odd][name])}, not {basename(usual)})")
    reason = f"It differs in {', '.join(differences)}." if differences else "Its settings are those of the others."
    return (
        f"{label} ({odd}) agrees least with the other runs of its {group}: Spearman {mean[odd]:z.3f} on average, "
        f"that of the others {np.mean([mean[run_id] for run_id in remaining]):z.3f}. {reason}"
    )


def _no_pair(selected: Sequence[Profile], by: str, allow_mismatch: bool) -> QueryError:
    """Return the error for profiles of which no two are comparable."""
    if by in ACROSS_MODELS and not allow_mismatch and next(_pairs(selected, by, True), None):
        runs = [profile.run for profile in selected]
        values = {name: {condition(run, name): str(run[name]) for run in runs} for name in differing(runs)}
        texts = (f"{name} ({', '.join(sorted(by_condition.values()))})" for name, by_condition in values.items())
        return QueryError(
            f"These runs are not comparable: they differ in {'; '.join(texts)}.",
            "Choose alike ones, name what they differ in (`by` corpus, `by` dtype), or pass `allow_mismatch`.",
        )
    hint = "There are no scores of that site, recipe and threshold: avss query 'SUMMARIZE scores' lists them."
    if labels := sorted({profile.label(by) for profile in selected}):
        hint = f"There is: {', '.join(labels[:10])}{', ...' if len(labels) > 10 else ''}."
    return QueryError(f"No two profiles differ in {by} alone.", hint)


def _map(selected: Sequence[Profile], by: str, allow_mismatch: bool) -> SimilarityMap:
    """Return the similarity map of the profiles under the most frequent conditions, which do not include ``by``."""
    names = () if allow_mismatch else [name for name in CONDITIONS if name != by]
    groups = grouped(selected, lambda profile: tuple(condition(profile.run, name) for name in names))
    most_frequent = max(groups.values(), key=len)
    shown = sorted(most_frequent, key=lambda profile: str(profile.run["created_at"]))
    similarity = similarity_map(
        RankMatrix([(profile.depth, profile.values) for profile in shown]),
        run_labels([profile.run for profile in shown]),
        [profile.label(by if by != "run" else "family") for profile in shown],
    )
    return replace(similarity, mismatched=len(selected) - len(shown))


def profiles(
    warehouse: Warehouse,
    runs: Sequence[Mapping[str, Any]],
    *,
    site: str | None,
    recipe: str | None,
    threshold: Threshold | None,
    score: str | None = "avss",
) -> list[Profile]:
    """Return the profiles of runs, in the order of the runs.

    Layers without a score are left out. A threshold that was not scored is computed by `thresholds.scores_at`.

    Args:
        runs: rows of ``runs``.
        site, recipe, threshold, score: selection of profiles. None selects every value.
    """
    columns = ["run_id", *READING, "depth", "avss_smoothed", *BASELINES]
    at = at_reading() if threshold is None else at_reading(threshold=threshold.value, kind=threshold.kind)
    of_runs = {"run_ids": [run["run_id"] for run in runs]}
    table = warehouse.table("scores", **of_runs, columns=columns, where=at_reading(site, recipe) & at)
    if threshold is not None and not (table or warehouse.table("scores", **of_runs, columns=["layer"], where=at)):
        table = scores_at(warehouse, runs, threshold, sites=site and [site]).select(columns)
        if recipe is not None:
            table = table.filter(pc.equal(table["recipe"], recipe))
    table = table.sort_by([(name, "ascending") for name in ("run_id", *READING, "depth")])
    slices = grouped(slices_by(table, ["run_id", *READING]), lambda entry: entry[0]["run_id"])
    names = FROM_ACTIVATIONS if score is None else (score,)
    depth = table["depth"].to_numpy()
    cells = {name: table[SCORES[name].column] for name in names}
    scored = {name: (column.is_valid().to_numpy(), column.to_numpy()) for name, column in cells.items()}
    return [
        Profile(
            run=run,
            reading={**key, "threshold": describe_threshold(key["threshold"], key["threshold_kind"]), "score": name},
            depth=depth[start:stop][valid[start:stop]],
            values=values[start:stop][valid[start:stop]],
        )
        for run in runs
        for key, start, stop in slices.get(run["run_id"], ())
        for name, (valid, values) in scored.items()
        if valid[start:stop].any()
    ]


def own_profiles(warehouse: Warehouse, runs: Sequence[Mapping[str, Any]], score: str) -> list[Profile]:
    """Return the profiles of a score of people's own, in the order of the runs. Runs without values are left out.

    Args:
        score: see `own_scores.own_score`.

    Raises:
        QueryError: no run has values, or values cannot be read.
    """
    (label,) = own_labels([score]).values()
    own = []
    for run in runs:
        values = own_score(score, warehouse, run).values
        layers = np.array(sorted(layer for layer, value in values.items() if np.isfinite(value)), np.int64)
        if not layers.size:
            continue
        number = run["num_layers"] or int(layers[-1]) + 1
        own.append(
            Profile(
                run=run,
                reading={"score": label},
                depth=(layers + 0.5) / number,
                values=np.array([values[layer] for layer in layers.tolist()], np.float64),
            )
        )
    if not own:
        raise QueryError(f"{label} has values of none of these runs.", "avss ls lists the runs and their models.")
    return own


def runs_with_conditions(warehouse: Warehouse, run_ids: Sequence[str]) -> list[dict[str, Any]]:
    """Return rows of ``runs``, extended by `with_conditions`.

    Raises:
        QueryError: there is no such run.
    """
    rows = {row["run_id"]: row for row in warehouse.runs().to_pylist(maps_as_pydicts="lossy")}
    if (unknown := next((run_id for run_id in run_ids if run_id not in rows), None)) is not None:
        require_known("run", unknown, sorted(rows), QueryError)
    return [with_conditions(rows[run_id]) for run_id in run_ids]


def with_conditions(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of ``runs`` with a column for each of `CONDITIONS`, some of which are read from its settings."""
    settings = settings_of(run)
    usual = {"skip_first_tokens": 0, "layout": "packed", "row_start": "auto"}
    version = run["numbers_version"] or run["schema_version"]
    return {**run, **{name: settings.get(name, value) for name, value in usual.items()}, "numbers_version": version}


def condition(run: Mapping[str, Any], name: str) -> Any:
    """Return the value of a run's condition. A corpus is identified by its content fingerprint, if it has one."""
    return (run["corpus_fingerprint"] or run["corpus"]) if name == "corpus" else run[name]


def _strata(selected: Sequence[Profile], by: str, allow_mismatch: bool) -> list[list[int]]:
    """Return the indices of the profiles of each stratum in which ``by`` has several values."""
    strata = grouped(range(len(selected)), lambda index: _shared(selected[index], by, allow_mismatch))
    return [members for members in strata.values() if len({_value(selected[index], by) for index in members}) > 1]


def _pairs(selected: Sequence[Profile], by: str, allow_mismatch: bool) -> Iterator[tuple[int, int]]:
    """Yield the indices of every two profiles that differ in ``by`` and otherwise at most in the model."""
    for members in _strata(selected, by, allow_mismatch):
        values = [_value(selected[index], by) for index in members]
        for (a, first), (b, second) in combinations(zip(members, values, strict=True), 2):
            if first != second and (by != "score" or FROM_ACTIVATIONS[0] in (first, second)):
                yield a, b


def _shared(profile: Profile, by: str, allow_mismatch: bool) -> Hashable:
    """Return the key that is equal for both profiles of a pair."""
    run = profile.run
    if by in WITHIN:
        return run["run_id"]
    conditions = () if allow_mismatch else tuple(condition(run, name) for name in CONDITIONS if name != by)
    if by in ("corpus", "dtype"):
        return (run["model"], run["revision"], *conditions)
    return (run["model"] if by == "revision" else None, *conditions)


def _value(profile: Profile, by: str) -> Any:
    """Return the value in which the profiles of a pair differ."""
    if by in (*WITHIN, "size"):
        return profile.label(by)
    return profile.run["run_id"] if by == "run" else condition(profile.run, by)


def differing(runs: Sequence[Mapping[str, Any]], names: Sequence[str] = CONDITIONS) -> list[str]:
    """Return the names of the conditions that differ among runs.

    Args:
        runs: rows of ``runs``, extended by `with_conditions`.
    """
    return [name for name in names if len({repr(condition(run, name)) for run in runs}) > 1]


def _left_out(
    runs: Sequence[Mapping[str, Any]], scored: Set[str], compared: Set[str], by: str, unscored: str
) -> dict[str, str]:
    """Return the reason why a run is in no pair, by run id: its differences from the most similar run that is in one.

    Args:
        scored, compared: ids of the runs that have scores, and that are in a pair.
        unscored: the reason of a run without scores.
    """
    conditions = () if by in WITHIN else [name for name in CONDITIONS if name != by]
    partners = [run for run in runs if run["run_id"] in compared]
    reasons = {}
    for run in (run for run in runs if run["run_id"] not in compared):
        differences = (
            (differing([run, other], conditions), other)
            for other in partners
            if by not in ("revision", "corpus", "dtype") or other["model"] == run["model"]
        )
        names, nearest = min(differences, key=lambda difference: len(difference[0]), default=([], run))
        texts = [
            f"{name} {run[name]} instead of {nearest[name]}"
            if str(run[name]) != str(nearest[name])
            else f"{name} {run[name]} of other content"
            for name in names
        ]
        reason = "; ".join(texts) or f"nothing comparable that differs in {by} alone"
        reasons[run["run_id"]] = reason if run["run_id"] in scored else unscored
    return reasons
