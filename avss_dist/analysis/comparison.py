"""Comparison of layer rankings between runs, families, corpora, dtypes, recipes, thresholds, sites and scores."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from itertools import combinations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from avss_dist.analysis.agreement import (
    GROUPS,
    CorrelationSummary,
    Indices,
    PairSurvey,
    RankMatrix,
    ScoreProperties,
    Scores,
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
from avss_dist.core.results import TabularResult
from avss_dist.core.text import basename, count_of
from avss_dist.core.thresholds import describe_threshold
from avss_dist.core.values import NewRow, TableRow
from avss_dist.read_requests import BETWEEN_RUNS, COMPARED, WITHIN_A_RUN
from avss_dist.stats.catalog import BASELINES, FROM_ACTIVATIONS, LOWEST_SHARE, READING, SCORES, is_own
from avss_dist.stats.layer_stats import Float64
from avss_dist.stats.scores import Threshold
from avss_dist.warehouse.checks import settings_of
from avss_dist.warehouse.reader import Warehouse, grouped, slices_by

CONDITIONS = ("corpus", "dtype", "sequence_length", "layout", "row_start", "skip_first_tokens", "numbers_version")
"""Properties besides the model that two runs must share for their scores to be comparable."""
UNDER_SAME_CONDITIONS = ("run", "family", "size", "revision", "seed")
"""Properties by which runs are compared that share `CONDITIONS`; by ``revision``, also the model.

By ``seed``, they also share `SAME_BUT_SEED`.
"""
SAME_BUT_SEED = ("seed_group", "training_step", "training_tokens")
"""Columns of ``runs`` in which checkpoints are equal that differ in the seed of their training alone."""
UNKNOWN_SEED = "its seed is not known: a job file tells it by `seeds` or `names`"
MIN_OF_GROUP = 3  # runs of which one can be the odd one
MAX_LABELS = 10  # that a message names
MAX_PAIRS = 1_000_000  # that are listed: those of 1,400 runs
EXTREMES = 500  # pairs most alike, and as many least alike, that are listed of more
SIZES = (0.5e9, 1.5e9, 4e9, 10e9, 40e9, 150e9)
"""Numbers of parameters between the groups of a comparison by size."""

SCHEMA = pa.schema(
    [
        ("by", pa.string()),
        ("a", pa.string()),
        ("b", pa.string()),
        ("a_run_id", pa.string()),
        ("b_run_id", pa.string()),
        ("layers", pa.int64()),
        ("interpolated", pa.bool_()),
        ("spearman", pa.float64()),
        ("given_depth", pa.float64()),
        ("k", pa.int64()),
        ("shared", pa.int64()),
        ("jaccard", pa.float64()),
        ("jaccard_by_chance", pa.float64()),
        ("p_by_chance", pa.float64()),
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

    run: TableRow
    reading: TableRow
    depth: Float64
    values: Float64

    @property
    def score(self) -> Scores:
        """Depth and values of the layers."""
        return self.depth, self.values

    def label(self, by: str) -> str:
        """Return the label of this profile in a comparison by ``by``."""
        if by == "size":
            return size_label(self.run["num_parameters"])
        if by in WITHIN_A_RUN:
            return str(self.reading[by])
        if by == "run":
            return str(self.run["run_id"])
        return str(self.run[by])


def size_label(parameters: int | None) -> str:
    """Return the group of a model by its number of parameters, such as ``0.5B to 1.5B``."""
    if parameters is None:
        return "unknown"
    place = bisect_right(SIZES, parameters)
    if place == 0:
        return f"under {_billions(SIZES[0])}"
    if place == len(SIZES):
        return f"{_billions(SIZES[-1])} and more"
    return f"{_billions(SIZES[place - 1])} to {_billions(SIZES[place])}"


def _billions(parameters: float) -> str:
    return f"{parameters / 1e9:g}B"


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
        by: the property in which a pair differs. ``run``, ``family``, ``size``, ``revision`` and ``seed`` compare runs
            under the same conditions. ``revision``, ``corpus`` and ``dtype`` compare runs of the same model, and
            ``seed`` those of trainings that differ in the seed alone, at the same step. ``recipe``,
            ``threshold`` and ``site`` compare readings of one run, and ``score`` compares AVSS with each baseline
            score.
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
    require_known("`by`", by, COMPARED, QueryError)
    if not is_own(score):
        require_known("score", score, FROM_ACTIVATIONS, QueryError)
    if mapped and by not in BETWEEN_RUNS:
        raise QueryError(f"A map shows runs, and `by` {by} compares readings of one run.", "Compare by run or family.")
    runs = runs_with_conditions(warehouse, run_ids)
    selected: list[Profile] = []
    if not is_own(score) or by == "score":
        # What is compared is not fixed.
        selected += profiles(
            warehouse,
            runs,
            site=None if by == "site" else site,
            recipe=None if by == "recipe" else recipe,
            threshold=None if by == "threshold" else threshold,
            score=None if by == "score" else score,
        )
    if is_own(score):
        selected += own_profiles(warehouse, runs, score)
    survey = None
    if by in BETWEEN_RUNS:
        survey = _survey(selected, by, allow_mismatch)
    if survey and survey.number > max_listed:
        first, second = survey.extremes
    else:
        first, second = _indices_of_pairs(selected, by, allow_mismatch)
    if not first.size:
        raise _no_pair(selected, by, allow_mismatch)
    pairs = _pairs_table(selected, first, second, by, share)
    scored = list({profile.run["run_id"]: profile.run for profile in selected}.values())
    compared = _run_ids_in_pairs(selected, by, allow_mismatch)
    conditions: Sequence[str] = ()
    if by in UNDER_SAME_CONDITIONS and not allow_mismatch:
        conditions = differing(scored)
    similarity = None
    if mapped:
        in_pairs = [profile for profile in selected if profile.run["run_id"] in compared]
        similarity = _map(in_pairs, by, allow_mismatch)
    with_scores = {run["run_id"] for run in scored}
    comparison = RankingComparison(
        number=len(pairs),
        spearman=summarize(pairs["spearman"].to_numpy()),
        given_depth=summarize(pairs["given_depth"].to_numpy()),
        pairs=pairs,
        conditions=tuple(conditions),
        left_out=_left_out(runs, with_scores, compared, by, score),
        similarity=similarity,
    )
    if survey is None:
        return comparison
    if survey.number <= len(pairs):
        return replace(comparison, groups=survey.groups, odd=find_odd(pairs, scored))
    # The listed pairs are the extremes. The survey has seen all.
    return replace(
        comparison,
        number=survey.number,
        spearman=survey.spearman,
        given_depth=survey.given_depth,
        groups=survey.groups,
    )


def _survey(selected: Sequence[Profile], by: str, allow_mismatch: bool) -> PairSurvey:
    """Return the summary of all pairs of profiles of different runs."""
    members = []
    for profile in selected:
        properties = ScoreProperties(
            stratum=_shared(profile, by, allow_mismatch),
            value=_value(profile, by),
            model=str(profile.run["model"]),
            group="all runs" if by == "run" else profile.label(by),
        )
        members.append(properties)
    matrix = RankMatrix([profile.score for profile in selected])
    return survey_pairs(matrix, members, by=by, across_models=by in ("run", "family", "size", "seed"), most=EXTREMES)


def _indices_of_pairs(selected: Sequence[Profile], by: str, allow_mismatch: bool) -> Indices:
    """Return the indices of both profiles of every pair, int64[2, pairs], in ascending order."""
    pairs = sorted(_pairs(selected, by, allow_mismatch))
    return np.array(pairs, np.int64).reshape(-1, 2).T


def _pairs_table(selected: Sequence[Profile], first: Indices, second: Indices, by: str, share: float) -> pa.Table:
    """Return a table of `SCHEMA` of pairs of profiles, the most alike first.

    Args:
        first, second: int64[pairs], indices of the two profiles of each pair.
        share: number of lowest layers to compare, as a share of the layers.
    """
    labels = pa.array([profile.label(by) for profile in selected], pa.string())
    run_ids = pa.array([profile.run["run_id"] for profile in selected], pa.string())
    agreement = correlate_pairs([profile.score for profile in selected], first, second, share=share)
    places_of_first = pa.array(first)
    places_of_second = pa.array(second)
    columns = {
        "by": pa.repeat(by, len(first)),
        "a": labels.take(places_of_first),
        "b": labels.take(places_of_second),
        "a_run_id": run_ids.take(places_of_first),
        "b_run_id": run_ids.take(places_of_second),
        **agreement,
    }
    table = pa.table({name: columns[name] for name in SCHEMA.names}, SCHEMA)
    # Pairs without a correlation come last.
    correlations = np.nan_to_num(agreement["spearman"], nan=-2.0)
    order = np.argsort(-correlations, kind="stable")
    return table.take(pa.array(order))


def _run_ids_in_pairs(selected: Sequence[Profile], by: str, allow_mismatch: bool) -> set[str]:
    """Return the ids of the runs that are in a pair."""
    run_ids = set()
    for members in _strata(selected, by, allow_mismatch):
        for index in members:
            run_ids.add(selected[index].run["run_id"])
    return run_ids


def find_odd(pairs: pa.Table, runs: Sequence[TableRow]) -> str:
    """Return a sentence on the run whose mean correlation with the others of its model, or else family, is lowest.

    Args:
        pairs: a table of `SCHEMA`, of pairs of runs.
        runs: rows of ``runs``, extended by `with_conditions`.

    Returns:
        The sentence. Empty if no model and no family has three runs that do not all agree alike.
    """
    rows = pairs.filter(pairs["spearman"].is_valid()).select(["a_run_id", "b_run_id", "spearman"]).to_pylist()
    by_id = {run["run_id"]: run for run in runs}
    for group in ("model", "family"):
        group_of_run = {run_id: run[group] for run_id, run in by_id.items()}
        mean = _mean_correlations(rows, group_of_run)
        groups = []
        for run_ids in grouped(mean, group_of_run.__getitem__).values():
            differ = len({f"{mean[run_id]:z.3f}" for run_id in run_ids}) > 1
            if len(run_ids) >= MIN_OF_GROUP and differ:
                groups.append(run_ids)
        if groups:
            members = min(groups, key=lambda run_ids: min(mean[run_id] for run_id in run_ids))
            return _describe_odd([by_id[run_id] for run_id in members], mean, group)
    return ""


def _mean_correlations(rows: Sequence[TableRow], group_of_run: Mapping[str, str]) -> dict[str, float]:
    """Return the mean correlation of each run with the others of its group, by run id.

    Args:
        rows: rows of a table of `SCHEMA`, with a correlation.
    """
    correlations: dict[str, list[float]] = {}
    for row in rows:
        if group_of_run[row["a_run_id"]] == group_of_run[row["b_run_id"]]:
            correlations.setdefault(row["a_run_id"], []).append(row["spearman"])
            correlations.setdefault(row["b_run_id"], []).append(row["spearman"])
    return {run_id: float(np.mean(values)) for run_id, values in correlations.items()}


def _describe_odd(members: Sequence[TableRow], mean: Mapping[str, float], group: str) -> str:
    """Return a sentence on the run of a group whose mean correlation is lowest, and in what it differs.

    Args:
        members: runs of the group, extended by `with_conditions`.
        mean: mean correlation of each run, by run id.
        group: ``model`` or ``family``.
    """
    odd = min(members, key=lambda run: (mean[run["run_id"]], run["run_id"]))
    others = [run for run in members if run["run_id"] != odd["run_id"]]
    label = run_labels(members)[members.index(odd)]
    differences = []
    for name in ("model", "revision", *CONDITIONS):
        ((usual, number),) = Counter(str(run[name]) for run in others).most_common(1)
        if number > len(others) / 2 and str(odd[name]) != usual:
            differences.append(f"{name} ({basename(odd[name])}, not {basename(usual)})")
    reason = "Its settings are those of the others."
    if differences:
        reason = f"It differs in {', '.join(differences)}."
    run_id = odd["run_id"]
    mean_of_others = np.mean([mean[run["run_id"]] for run in others])
    return (
        f"{label} ({run_id}) agrees least with the other runs of its {group}: Spearman "
        f"{mean[run_id]:z.3f} on average, that of the others {mean_of_others:z.3f}. {reason}"
    )


def _no_pair(selected: Sequence[Profile], by: str, allow_mismatch: bool) -> QueryError:
    """Return the error for profiles of which no two are comparable."""
    runs = [profile.run for profile in selected]
    conditions_matter = by in UNDER_SAME_CONDITIONS and not allow_mismatch
    if conditions_matter and any(_pairs(selected, by, True)):
        texts = []
        for name in differing(runs):
            # Corpora of the same content may have several names.
            values = {condition(run, name): str(run[name]) for run in runs}
            texts.append(f"{name} ({', '.join(sorted(values.values()))})")
        return QueryError(
            f"These runs are not comparable: they differ in {'; '.join(texts)}.",
            "Choose alike ones, name what they differ in (`by` corpus, `by` dtype), or pass `allow_mismatch`.",
        )
    if by == "seed" and runs and all(run["seed"] is None for run in runs):
        return QueryError(
            "The seed of no run is known.",
            "Names like run-seed3 tell it, and `seeds` and `names` of a job file. Runs that were stored before need "
            "`fresh`.",
        )
    labels = sorted({profile.label(by) for profile in selected})
    if not labels:
        hint = "There are no scores of that site, recipe and threshold: avss query 'SUMMARIZE scores' lists them."
    elif len(labels) > MAX_LABELS:
        hint = f"There is: {', '.join(labels[:MAX_LABELS])}, ...."
    else:
        hint = f"There is: {', '.join(labels)}."
    return QueryError(f"No two profiles differ in {by} alone.", hint)


def _map(selected: Sequence[Profile], by: str, allow_mismatch: bool) -> SimilarityMap:
    """Return the similarity map of the profiles under the most frequent conditions, which do not include ``by``."""
    names = [] if allow_mismatch else _other_conditions(by)
    groups = grouped(selected, lambda profile: tuple(condition(profile.run, name) for name in names))
    most_frequent = max(groups.values(), key=len)
    shown = sorted(most_frequent, key=lambda profile: str(profile.run["created_at"]))
    group_by = "family" if by == "run" else by
    matrix = RankMatrix([profile.score for profile in shown])
    labels = run_labels([profile.run for profile in shown])
    similarity = similarity_map(matrix, labels, [profile.label(group_by) for profile in shown])
    return replace(similarity, mismatched=len(selected) - len(shown))


def _other_conditions(by: str) -> list[str]:
    """Return the conditions that are equal in both runs of a pair: those besides the one that is compared."""
    return [name for name in CONDITIONS if name != by]


def profiles(
    warehouse: Warehouse,
    runs: Sequence[TableRow],
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
    table = _score_rows(warehouse, runs, site, recipe, threshold)
    names = FROM_ACTIVATIONS if score is None else (score,)
    slices = grouped(slices_by(table, ["run_id", *READING]), lambda entry: entry[0]["run_id"])
    depth = table["depth"].to_numpy()
    values = {}
    has_value = {}
    for name in names:
        column = table[SCORES[name].column]
        values[name] = column.to_numpy()
        has_value[name] = column.is_valid().to_numpy()
    selected = []
    for run in runs:
        for key, start, stop in slices.get(run["run_id"], ()):
            threshold_in_words = describe_threshold(key["threshold"], key["threshold_kind"])
            rows = slice(start, stop)
            for name in names:
                valid = has_value[name][rows]
                if not valid.any():
                    continue
                profile = Profile(
                    run=run,
                    reading={**key, "threshold": threshold_in_words, "score": name},
                    depth=depth[rows][valid],
                    values=values[name][rows][valid],
                )
                selected.append(profile)
    return selected


def _score_rows(
    warehouse: Warehouse,
    runs: Sequence[TableRow],
    site: str | None,
    recipe: str | None,
    threshold: Threshold | None,
) -> pa.Table:
    """Return the rows of ``scores`` of runs, ordered by run, reading and depth. None selects every value."""
    columns = ["run_id", *READING, "depth", "avss_smoothed", *BASELINES]
    run_ids = [run["run_id"] for run in runs]
    at_threshold = at_reading()
    if threshold is not None:
        at_threshold = at_reading(threshold=threshold.value, kind=threshold.kind)
    table = warehouse.table("scores", run_ids=run_ids, columns=columns, where=at_reading(site, recipe) & at_threshold)
    if threshold is not None and not table:
        at_any_site = warehouse.table("scores", run_ids=run_ids, columns=["layer"], where=at_threshold)
        if not at_any_site:
            table = scores_at(warehouse, runs, threshold, sites=site and [site]).select(columns)
            if recipe is not None:
                table = table.filter(pc.equal(table["recipe"], recipe))
    return table.sort_by([(name, "ascending") for name in ("run_id", *READING, "depth")])


def own_profiles(warehouse: Warehouse, runs: Sequence[TableRow], score: str) -> list[Profile]:
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
        layers = sorted(layer for layer, value in values.items() if np.isfinite(value))
        if not layers:
            continue
        number = run["num_layers"] or layers[-1] + 1
        profile = Profile(
            run=run,
            reading={"score": label},
            depth=(np.array(layers, np.int64) + 0.5) / number,
            values=np.array([values[layer] for layer in layers], np.float64),
        )
        own.append(profile)
    if not own:
        raise QueryError(f"{label} has values of none of these runs.", "avss ls lists the runs and their models.")
    return own


def runs_with_conditions(warehouse: Warehouse, run_ids: Sequence[str]) -> list[NewRow]:
    """Return rows of ``runs``, extended by `with_conditions`.

    Raises:
        QueryError: there is no such run.
    """
    rows = {row["run_id"]: row for row in warehouse.runs().to_pylist(maps_as_pydicts="lossy")}
    for run_id in run_ids:
        if run_id not in rows:
            require_known("run", run_id, sorted(rows), QueryError)
    return [with_conditions(rows[run_id]) for run_id in run_ids]


def with_conditions(run: TableRow) -> NewRow:
    """Return a row of ``runs`` with a column for each of `CONDITIONS`, some of which are read from its settings."""
    settings = settings_of(run)
    return {
        **run,
        "skip_first_tokens": settings.get("skip_first_tokens", 0),
        "layout": settings.get("layout", "packed"),
        "row_start": settings.get("row_start", "auto"),
        "numbers_version": run["numbers_version"] or run["schema_version"],
    }


def condition(run: TableRow, name: str) -> Hashable:
    """Return the value of a run's condition. A corpus is identified by its content fingerprint, if it has one."""
    if name == "corpus":
        return run["corpus_fingerprint"] or run["corpus"]
    return run[name]


def _strata(selected: Sequence[Profile], by: str, allow_mismatch: bool) -> list[list[int]]:
    """Return the indices of the profiles of each stratum in which ``by`` has several values."""
    strata = grouped(range(len(selected)), lambda index: _shared(selected[index], by, allow_mismatch))
    with_several = []
    for members in strata.values():
        values = {_value(selected[index], by) for index in members}
        if len(values) > 1:
            with_several.append(members)
    return with_several


def _pairs(selected: Sequence[Profile], by: str, allow_mismatch: bool) -> Iterator[tuple[int, int]]:
    """Yield the indices of every two profiles that differ in ``by`` and otherwise at most in the model."""
    for members in _strata(selected, by, allow_mismatch):
        values = [_value(selected[index], by) for index in members]
        for (a, first), (b, second) in combinations(zip(members, values, strict=True), 2):
            if first == second:
                continue
            # Of several scores, AVSS is compared with each of the others.
            if by != "score" or FROM_ACTIVATIONS[0] in (first, second):
                yield a, b


def _shared(profile: Profile, by: str, allow_mismatch: bool) -> Hashable:
    """Return the key that is equal for both profiles of a pair."""
    run = profile.run
    if by in WITHIN_A_RUN:
        return run["run_id"]
    conditions: list[Hashable] = []
    if not allow_mismatch:
        conditions = [condition(run, name) for name in _other_conditions(by)]
    if by in ("corpus", "dtype"):
        return (run["model"], run["revision"], *conditions)
    if by == "revision":
        return (run["model"], *conditions)
    if by == "seed":
        return (*(run[name] for name in SAME_BUT_SEED), *conditions)
    return tuple(conditions)


def _value(profile: Profile, by: str) -> Hashable:
    """Return the value in which the profiles of a pair differ."""
    if by == "size" or by in WITHIN_A_RUN:
        return profile.label(by)
    if by == "run":
        return profile.run["run_id"]
    return condition(profile.run, by)


def differing(runs: Sequence[TableRow], names: Sequence[str] = CONDITIONS) -> list[str]:
    """Return the names of the conditions that differ among runs.

    Args:
        runs: rows of ``runs``, extended by `with_conditions`.
    """
    differ = []
    for name in names:
        values = {repr(condition(run, name)) for run in runs}
        if len(values) > 1:
            differ.append(name)
    return differ


def _left_out(runs: Sequence[TableRow], scored: Set[str], compared: Set[str], by: str, score: str) -> dict[str, str]:
    """Return the reason why a run is in no pair, by run id: its differences from the most similar run that is in one.

    Args:
        scored, compared: ids of the runs that have scores, and that are in a pair.
        score: the score that is compared.
    """
    partners = [run for run in runs if run["run_id"] in compared]
    reasons = {}
    for run in runs:
        if run["run_id"] in compared:
            continue
        if by == "seed" and run["seed"] is None:
            reasons[run["run_id"]] = UNKNOWN_SEED
        elif run["run_id"] in scored:
            reasons[run["run_id"]] = _difference_from(partners, run, by)
        elif is_own(score):
            reasons[run["run_id"]] = "no such scores"
        else:
            reasons[run["run_id"]] = "no scores at this site, recipe and threshold"
    return reasons


def _difference_from(partners: Sequence[TableRow], run: TableRow, by: str) -> str:
    """Return the conditions in which a run differs from the most similar of others, in words."""
    conditions = [] if by in WITHIN_A_RUN else _other_conditions(by)
    nearest = run
    fewest: list[str] | None = None
    for other in partners:
        if by in ("revision", "corpus", "dtype") and other["model"] != run["model"]:
            continue
        if by == "seed" and other["seed_group"] != run["seed_group"]:
            continue
        names = differing([run, other], conditions)
        if fewest is None or len(names) < len(fewest):
            nearest = other
            fewest = names
    texts = []
    for name in fewest or []:
        if str(run[name]) == str(nearest[name]):
            texts.append(f"{name} {run[name]} of other content")
        else:
            texts.append(f"{name} {run[name]} instead of {nearest[name]}")
    return "; ".join(texts) or f"nothing comparable that differs in {by} alone"
