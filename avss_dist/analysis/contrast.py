"""Contrast of hallucinated and truthful answers in a run on paired text, with controls and findings in words.

Single answers are contrasted where the run kept their statistics. For any other recipe or threshold, `Strata` contrasts
blocks of shards.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from avss_dist.analysis.chosen import ChosenRun, newest_run
from avss_dist.analysis.section import (
    AMBER,
    BLUE,
    GRAY,
    BarColumn,
    Chart,
    ReportColumn,
    ReportRow,
    ReportTable,
    Section,
    interval,
    known_interval,
    p_value,
    page_number,
    yes,
)
from avss_dist.core.errors import DamagedFile, QueryError, require_known
from avss_dist.core.intervention import stored_removals
from avss_dist.core.results import TabularResult
from avss_dist.core.sites import SITES
from avss_dist.core.thresholds import PUBLISHED_THRESHOLD, describe_threshold
from avss_dist.core.values import NewRow, TableRow
from avss_dist.corpus.labels import AFTER_ANOTHER, INCORRECT, TRUTHFUL
from avss_dist.stats import contrast as contrast_stats
from avss_dist.stats.catalog import RECIPES
from avss_dist.stats.intervals import (
    BOOTSTRAP_BLOCKS,
    BOOTSTRAP_SEED,
    INTERVAL,
    MINIMUM_UNITS,
    bootstrap_weights,
    jackknife_interval,
    left_out_weights,
)
from avss_dist.stats.layer_stats import Float64, Int64, LayerStats, merge_stats, split_into_blocks
from avss_dist.stats.metrics import ENTROPY, LOSS
from avss_dist.stats.rankings import depth_correlation
from avss_dist.stats.scores import Parts, SiteTable, Threshold
from avss_dist.tasks.results import combine
from avss_dist.warehouse.names import PERPLEXITY
from avss_dist.warehouse.reader import Warehouse, grouped
from avss_dist.warehouse.schema import TABLES

if TYPE_CHECKING:
    from altair.typing import ChartType

LEVEL = 0.05
MATCHED = 0.1  # lengths of the answers of a pair differ by a tenth at most
FOLLOWS_DEPTH = 0.9
MIN_PAIRS = 10  # that a matched subset is tested on
FEATURES = {"variance": "variance", "sparsity": "sparsity", "norm": "norm", "relative_magnitude": "update ratio"}
"""Statistics of answers that classifiers are trained on, with their names in reports."""
PREDICTED_BASELINES = {LOSS: "log_likelihood", ENTROPY: "token_entropy"}
"""Name of each baseline that is a prediction of the whole model, by metric."""
HALLUCINATED_NAMES = (INCORRECT, "hallucinated", "hallucination", "false", "wrong")
"""Lower-case labels that are recognized as those of hallucinated answers."""
SERIES = {
    "deviation": "after their own prompts",
    "length_matched": "pairs of about equal length",
    "after_another": "after another prompt",
}
"""Columns that the chart draws, each with a description of its answers."""
_MATCHED = (
    "length_matched",
    "length_matched_p",
    "length_matched_pairs",
    "position_matched",
    "position_matched_p",
    "position_matched_pairs",
)

_Sides = Callable[..., tuple[Parts, Parts]]
"""Function that returns the parts of AVSS of hallucinated and of truthful answers, under weights of the units."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Contrast(TabularResult):
    """Differences of layers between two labels of answers. Its table has the layers.

    Attributes:
        reading: run, site, recipe, threshold and the two labels, by name.
        layers: one row for each layer, with every score, interval and control.
        predictions: AUROC and interval of each layer and statistic, and of each baseline: one row each.
        findings: sentences about the differences that remain under the controls.
    """

    reading: TableRow
    layers: pa.Table
    predictions: pa.Table
    findings: tuple[str, ...]

    def table(self) -> pa.Table:
        """Return the layers."""
        return self.layers


@dataclass(frozen=True, kw_only=True, eq=False)
class _Measured:
    """Tables of a contrast, before they are described.

    Attributes:
        labels: labels of the hallucinated and of the truthful answers.
        layers: table of the layers, as in `Contrast`.
        predictions: table of the predictions, as in `Contrast`.
        pairs: number of pairs of answers, or None if blocks of shards were contrasted.
    """

    labels: tuple[str, str]
    layers: pa.Table
    predictions: pa.Table
    pairs: int | None


def contrast(
    warehouse: Warehouse,
    run: TableRow,
    *,
    site: str = "block",
    recipe: str = "pooled",
    threshold: float = PUBLISHED_THRESHOLD,
    threshold_kind: str = "absolute",
    hallucinated: str | None = None,
    truthful: str | None = None,
) -> Contrast:
    """Contrast two labels of a run on paired text.

    Args:
        run: a row of ``runs``.
        recipe: with ``unit``, or with a relative threshold, blocks of shards replace single answers: they are resampled
            and exchange their labels. Lengths are then not controlled, and ``predictions`` is empty.
        threshold: an absolute threshold that the run counted. With the kind ``rms``, a multiple of the RMS.
        hallucinated, truthful: labels. By default, the labels of the run whose names tell which is which.

    Raises:
        QueryError: if the run's text is not paired, or the run lacks a label, the site or the threshold.
        DamagedFile: if statistics of answers are missing.
    """
    require_known("recipe", recipe, RECIPES, QueryError)
    require_known("site", site, run["sites"] or SITES, QueryError)
    if recipe == "unit" or threshold_kind == "rms":
        strata = Strata.of_run(warehouse, run, site, hallucinated, truthful)
        measured = _contrast_blocks(strata, recipe, Threshold(value=threshold, kind=threshold_kind))
    else:
        rows = answer_rows(warehouse, run, site)
        threshold_index = _counted_index(run, threshold)
        labels = which_labels(pc.unique(rows["stratum"]).to_pylist(), hallucinated, truthful)
        evaluated = _evaluated(warehouse, run, rows, labels)
        measured = _contrast_answers(rows, labels, threshold_index, recipe, evaluated)
    reading = {
        "run_id": run["run_id"],
        "model": run["model"],
        "site": site,
        "recipe": recipe,
        "threshold": describe_threshold(threshold, threshold_kind),
        "hallucinated": measured.labels[0],
        "truthful": measured.labels[1],
        "pairs": measured.pairs,
    }
    about_layers = _about_layers(measured.layers.to_pylist())
    about_prediction = _about_prediction(measured.predictions.to_pylist())
    return Contrast(
        reading=reading,
        layers=measured.layers,
        predictions=measured.predictions,
        findings=(*about_layers, *about_prediction),
    )


def _counted_index(run: TableRow, threshold: float) -> int:
    """Return the index of a threshold in those that a run counted.

    Raises:
        QueryError: if the run did not count it.
    """
    counted = list(run["thresholds"])
    if threshold not in counted:
        listed = ", ".join(f"{value:g}" for value in counted)
        raise QueryError(f"The run did not count elements below {threshold:g} row by row.", f"It counted {listed}.")
    return counted.index(threshold)


def _contrast_blocks(strata: Strata, recipe: str, threshold: Threshold) -> _Measured:
    """Contrast blocks of shards. Single answers are not told apart, so nothing is predicted of them."""
    no_predictions = pa.table({"layer": pa.nulls(0, pa.int64()), "statistic": pa.nulls(0, pa.string())})
    return _Measured(
        labels=strata.labels,
        layers=stratum_table(strata, recipe, threshold),
        predictions=no_predictions,
        pairs=None,
    )


def _contrast_answers(
    rows: pa.Table, labels: tuple[str, str], threshold: int, recipe: str, evaluated: Mapping[str, Float64]
) -> _Measured:
    """Contrast single answers.

    Args:
        rows: as returned by `answer_rows`.
        threshold: index of the threshold in the run's thresholds.
        evaluated: as returned by `_evaluated`.
    """
    own_prompt = read_answers(rows, labels, "", threshold)
    other_prompt = read_answers(rows, labels, AFTER_ANOTHER, threshold)
    return _Measured(
        labels=labels,
        layers=layer_table(own_prompt, other_prompt, recipe),
        predictions=_predictions(own_prompt, other_prompt, evaluated),
        pairs=len(own_prompt.pairs),
    )


def paired_run(warehouse: Warehouse, name: str | None) -> ChosenRun:
    """Return the newest run on paired text.

    Args:
        name: name of the run, as for `newest_run`.
    """

    def require(run: TableRow) -> None:
        run_id = run["run_id"]
        for table in ("row_stats", "stratum_stats"):
            if warehouse.table(table, run_ids=[run_id], columns=["run_id"]).num_rows:
                return
        raise not_paired(run_id)

    return newest_run(warehouse, name, require)


def answer_rows(warehouse: Warehouse, run: TableRow, site: str) -> pa.Table:
    """Return the row statistics of a site, ordered by row and layer.

    Raises:
        QueryError: if the run's text is not paired.
        DamagedFile: if rows are missing.
    """
    chosen: dict[str, Any] = {"run_ids": [run["run_id"]], "where": pc.field("site") == site}
    rows = warehouse.table("row_stats", **chosen)
    if not rows and not warehouse.table("stratum_stats", columns=["site"], **chosen):
        raise not_paired(run["run_id"])
    rows = rows.sort_by([("row", "ascending"), ("layer", "ascending")])
    expected = run["num_sequences"] * len(pc.unique(rows["layer"]))
    if not rows or rows.num_rows != expected:
        raise DamagedFile(f"Statistics of rows of run '{run['run_id']}' are missing.", TABLES["row_stats"].replaced_by)
    return rows


def read_answers(rows: pa.Table, labels: tuple[str, str], after: str, threshold: int) -> contrast_stats.Answers:
    """Return the answers of two labels whose pairs have both.

    Args:
        rows: as returned by `answer_rows`.
        after: `AFTER_ANOTHER` for answers after another prompt, or empty for answers after their own.
        threshold: index of the threshold in the run's thresholds.
    """
    strata = [label + after for label in labels]
    rows = rows.filter(pc.is_in(rows["stratum"], pa.array(strata)))
    of_first_layer = rows.filter(pc.equal(rows["layer"], rows["layer"][0]))
    columns = {name: rows[name] for name in ("pooled_variance", "count", "mean", "m2", "norm", "relative_magnitude")}
    columns["near_zero"] = pc.list_element(rows["near_zero"], threshold)
    stats = {}
    for name, values in columns.items():
        # The rows are ordered by answer, then by layer.
        stats[name] = np.array(values, np.float64).reshape(len(of_first_layer), -1)
    answers = contrast_stats.Answers(
        pair=of_first_layer["pair"].to_numpy(),
        hallucinated=pc.equal(of_first_layer["stratum"], strata[0]).to_numpy(),
        tokens=of_first_layer["answer_tokens"].to_numpy(),
        stats=stats,
    )
    pairs_with_both = []
    for pair in answers.pairs:
        hallucinated_share = answers.hallucinated[answers.pair == pair].mean()
        if 0 < hallucinated_share < 1:
            pairs_with_both.append(pair)
    return answers.of_pairs(np.array(pairs_with_both, np.int64))


def layer_table(own_prompt: contrast_stats.Answers, other_prompt: contrast_stats.Answers, recipe: str) -> pa.Table:
    """Return `Contrast.layers` from the answers after their own prompts and after another.

    Pairs of answers are resampled and left out, and their labels are exchanged inside them.
    """
    pairs = own_prompt.pairs

    def own_sides(weights: Float64 | None = None) -> tuple[Parts, Parts]:
        return _answer_sides(own_prompt, pairs, weights, recipe)

    def other_sides(weights: Float64 | None = None) -> tuple[Parts, Parts]:
        return _answer_sides(other_prompt, pairs, weights, recipe)

    length_matched = _matched_columns("length_matched", own_prompt, MATCHED, recipe)
    position_matched = _matched_columns("position_matched", own_prompt, 0.0, recipe)
    return _table(
        np.arange(own_prompt.stats["count"].shape[1]),
        own_sides,
        other_sides,
        len(pairs),
        contrast_stats.permutation_p(own_prompt, recipe),
        contrast_stats.noise_floor(own_prompt, recipe),
        length_matched | position_matched,
    )


def _answer_sides(
    answers: contrast_stats.Answers, pairs: Int64, weights: Float64 | None, recipe: str
) -> tuple[Parts, Parts]:
    """Return the parts of AVSS of hallucinated and of truthful answers.

    Args:
        pairs: distinct pairs, ascending.
        weights: float64[n, pairs], the weight of each pair, 1 by default.
    """
    if weights is None:
        answer_weights = np.ones(len(answers.pair))
    else:
        answer_weights = weights[:, np.searchsorted(pairs, answers.pair)]
    return contrast_stats.both_sides(answers, answer_weights, answers.hallucinated.astype(np.float64), recipe)


def _matched_columns(name: str, answers: contrast_stats.Answers, slack: float, recipe: str) -> dict[str, Float64]:
    """Return the deviation, p-value and number of pairs whose answers have about the same length, float64[layers] each.

    Args:
        slack: as for `stats.contrast.length_matched`.
    """
    layers = answers.stats["count"].shape[1]
    matched = contrast_stats.length_matched(answers, slack)
    pairs = len(matched.pairs)
    if pairs >= MIN_PAIRS:
        deviation = contrast_stats.observed(matched, recipe)
        p = contrast_stats.holm(contrast_stats.permutation_p(matched, recipe))
    else:
        deviation = np.full(layers, np.nan)
        p = np.full(layers, np.nan)
    return {name: deviation, f"{name}_p": p, f"{name}_pairs": np.full(layers, pairs)}


def _table(
    layers: Sequence[int] | Int64,
    own_prompt: _Sides,
    other_prompt: _Sides,
    units: int,
    p: Float64,
    noise_floor: Float64,
    matched: Mapping[str, Float64],
) -> pa.Table:
    """Return `Contrast.layers`: scores with their intervals, and controls.

    Args:
        layers: indices of the layers.
        own_prompt, other_prompt: functions that return the parts of AVSS of hallucinated and of truthful answers under
            weights of the units, float64[n, units], by default 1: after the own and after another prompt.
        units: number of pairs, or of blocks of shards.
        p: p-values under exchanged labels, float64[layers].
        noise_floor: quantile of the deviations between halves of the truthful answers, float64[layers].
        matched: the columns `_MATCHED`, float64[layers] each.
    """
    left_out = left_out_weights(units)
    hallucinated, truthful = own_prompt()
    own_left_out = own_prompt(left_out)
    columns = contrast_stats.contrast_columns(
        (_flat(hallucinated), _flat(truthful)), own_prompt(bootstrap_weights(units)), own_left_out
    )

    deviation = columns["deviation"]
    after_another = contrast_stats.deviation(*other_prompt()).ravel()
    change = deviation - after_another
    own_deviation_left_out = contrast_stats.deviation(*own_left_out)
    change_left_out = own_deviation_left_out - contrast_stats.deviation(*other_prompt(left_out))
    low, high = jackknife_interval(change, change_left_out)
    columns |= {
        "p": p,
        "p_holm": contrast_stats.holm(p),
        "noise_floor": noise_floor,
        **matched,
        "after_another": after_another,
        "own_minus_another": change,
        "own_minus_another_low": low,
        "own_minus_another_high": high,
    }

    # Comparisons with NaN are false: a layer without a control does not stand.
    with np.errstate(invalid="ignore"):
        exceeds_noise = np.abs(deviation) > noise_floor
        by_label = (columns["p_holm"] < LEVEL) & exceeds_noise
        same_sign = np.sign(deviation) == np.sign(matched["length_matched"])
        by_length = (matched["length_matched_p"] < LEVEL) & same_sign
        by_prompt = np.where(deviation > 0, low > 0, high < 0)
    rho = depth_correlation(columns["eavss_contrast"].tolist())

    arrays = {"layer": pa.array(layers, from_pandas=True)}
    for name, values in columns.items():
        arrays[name] = pa.array(values, from_pandas=True)
    arrays["stands"] = pa.array(by_label & by_length & by_prompt, mask=np.isnan(matched["length_matched_pairs"]))
    arrays["depth_correlation"] = pa.array(np.full(len(layers), rho), from_pandas=True)
    return pa.table(arrays)


def _evaluated(warehouse: Warehouse, run: TableRow, rows: pa.Table, labels: tuple[str, str]) -> dict[str, Float64]:
    """Return the whole model's mean per token for each answer, by baseline.

    Only evaluations on the same rows count.
    """
    where = (pc.field("task") == f"{PERPLEXITY}{run['corpus']}") & (pc.field("revision") == run["revision"])
    cells = warehouse.table("cells", where=where).to_pylist()
    of_whole_model = [cell for cell in cells if not stored_removals(cell) and cell["patch"] is None]
    of_first_layer = rows.filter(pc.equal(rows["layer"], rows["layer"][0]))
    tokens = of_first_layer["answer_tokens"].to_pylist()
    is_labelled = np.isin(of_first_layer["stratum"].to_pylist(), labels)
    evaluated: dict[str, Float64] = {}
    for of_run in grouped(of_whole_model, itemgetter("run_id")).values():
        num_parts = len({cell["part"] for cell in of_run})
        for result in combine(of_run, num_parts):
            if result.metric in PREDICTED_BASELINES and result.weights.tolist() == tokens:
                per_token = result.samples / result.weights
                evaluated[PREDICTED_BASELINES[result.metric]] = per_token[is_labelled]
    return evaluated


@dataclass(frozen=True, kw_only=True, eq=False)
class _Classifier:
    """A classifier of answers by one value.

    Attributes:
        layer: layer that the value is a statistic of, or None for a baseline.
        statistic: name of the statistic or the baseline.
        auroc: out-of-fold AUROC.
        left_out: float64[pairs], the AUROC without each pair.
    """

    layer: int | None
    statistic: str
    auroc: float
    left_out: Float64


def _predictions(
    own_prompt: contrast_stats.Answers, other_prompt: contrast_stats.Answers, evaluated: Mapping[str, Float64]
) -> pa.Table:
    """Return the out-of-fold AUROC of one-dimensional classifiers on layers and on baselines. Folds are of pairs."""
    baselines = _baseline_classifiers(own_prompt, evaluated)
    of_layers = _layer_classifiers(own_prompt)
    best_baseline = max(baselines, key=lambda baseline: baseline.auroc)
    other_features = _features(other_prompt)
    other_weights = np.ones((1, len(other_prompt.pair)))
    corrected = 1 - (1 - INTERVAL) / max(len(of_layers), 1)  # Bonferroni, over layers and statistics
    rows = []
    for baseline in baselines:
        row = _prediction_row(baseline)
        row |= {"after_another": None, "gain": None, "beats_baselines": False}
        rows.append(row)
    for classifier in of_layers:
        gain = classifier.auroc - best_baseline.auroc
        gain_left_out = classifier.left_out - best_baseline.left_out
        least_gain, _ = jackknife_interval(np.array(gain), gain_left_out, confidence=corrected)
        other_values = other_features[classifier.statistic][:, classifier.layer]
        after_another, _ = _auroc(other_prompt, other_values, other_weights)
        row = _prediction_row(classifier)
        row |= {"after_another": after_another, "gain": gain, "beats_baselines": bool(least_gain > 0)}
        rows.append(row)
    return pa.Table.from_pylist(rows)


def _baseline_classifiers(answers: contrast_stats.Answers, evaluated: Mapping[str, Float64]) -> list[_Classifier]:
    """Return the classifiers by the length of an answer, and by each evaluation of the same answers."""
    weights = _left_out_answers(answers)
    classifiers = []
    for name, values in {"length": answers.tokens.astype(np.float64), **evaluated}.items():
        if len(values) == len(answers.pair):
            auroc, left_out = _auroc(answers, values, weights)
            classifiers.append(_Classifier(layer=None, statistic=name, auroc=auroc, left_out=left_out))
    return classifiers


def _layer_classifiers(answers: contrast_stats.Answers) -> list[_Classifier]:
    """Return the classifiers by each statistic that is known of every answer and layer, and by each layer."""
    weights = _left_out_answers(answers)
    classifiers = []
    for name, grid in _features(answers).items():
        if not np.isfinite(grid).all():
            continue
        for layer, values in enumerate(grid.T):
            auroc, left_out = _auroc(answers, values, weights)
            classifiers.append(_Classifier(layer=layer, statistic=name, auroc=auroc, left_out=left_out))
    return classifiers


def _left_out_answers(answers: contrast_stats.Answers) -> Float64:
    """Return weights that leave out the answers of each pair, float64[pairs, answers]."""
    by_pair = left_out_weights(len(answers.pairs))
    return by_pair[:, np.searchsorted(answers.pairs, answers.pair)]


def _prediction_row(classifier: _Classifier) -> NewRow:
    """Return the AUROC of a classifier with its interval, as a row of `Contrast.predictions`."""
    low, high = jackknife_interval(np.array(classifier.auroc), classifier.left_out, scale="logit")
    return {
        "layer": classifier.layer,
        "statistic": classifier.statistic,
        "auroc": classifier.auroc,
        "auroc_low": low,
        "auroc_high": high,
    }


def _features(answers: contrast_stats.Answers) -> dict[str, Float64]:
    """Return the statistics of answers that classifiers are trained on, float64[rows, layers], by name."""
    stats = answers.stats
    with np.errstate(invalid="ignore", divide="ignore"):
        variance = stats["m2"] / stats["count"]
        sparsity = stats["near_zero"] / stats["count"]
    return {
        "variance": variance,
        "sparsity": sparsity,
        "norm": stats["norm"],
        "relative_magnitude": stats["relative_magnitude"],
    }


def _auroc(answers: contrast_stats.Answers, values: Float64, weights: Float64) -> tuple[float, Float64]:
    """Return the out-of-fold AUROC of a classifier of one value, and that under each of several weights."""
    scores = contrast_stats.out_of_fold(answers, values)
    unweighted = contrast_stats.auroc(scores, answers.hallucinated, np.ones((1, len(scores))))
    weighted = contrast_stats.auroc(scores, answers.hallucinated, weights)
    return unweighted.item(), weighted


def _about_layers(rows: list[NewRow]) -> list[str]:
    """Return sentences on the layers that differ by label, and on those that also do by length and by prompt."""
    pairs = rows[0]["length_matched_pairs"]
    where = "of whole shards" if pairs is None else "inside pairs"
    differ = [row for row in rows if _is_significant(row["p_holm"])]
    sentences = []
    if not differ:
        sentences.append(
            f"No layer differs between hallucinated and truthful answers more than with labels exchanged {where}."
        )
    else:
        sentences.append(
            f"Layers that differ more than with labels exchanged {where} (Holm, {LEVEL:.0%}): {_listed(differ)}."
        )
        if pairs is not None:
            matched = "too few pairs to tell"
            if pairs >= MIN_PAIRS:
                matched = _listed([row for row in differ if _is_significant(row["length_matched_p"])])
            sentences.append(f"With lengths matched ({pairs} pairs): {matched}.")
        by_prompt = _listed([row for row in differ if _excludes_zero(row)])
        sentences.append(f"Otherwise than for the same answers after another prompt: {by_prompt}.")
    if pairs is None:
        sentences.append(
            "Lengths are not controlled: that takes pooled or element, and a threshold that the run counted."
        )
    else:
        stand = _listed([row for row in rows if row["stands"]])
        sentences.append(f"Stand after every control: {stand}.")
    rho = rows[0]["depth_correlation"]
    if rho is not None and abs(rho) > FOLLOWS_DEPTH:
        sentences.append(
            f"The contrast follows depth (Spearman {rho:z.2f}), and says little more than a layer's number."
        )
    return sentences


def _about_prediction(rows: list[NewRow]) -> list[str]:
    """Return sentences on how well layers and baselines predict labels, none if there are no predictions."""
    if not rows:
        return []
    baselines = [row for row in rows if row["layer"] is None]
    of_layers = [row for row in rows if row["layer"] is not None]
    best_baseline = max(baselines, key=itemgetter("auroc"))
    best_layer = max(of_layers, key=itemgetter("auroc"))
    statistic = FEATURES[best_layer["statistic"]]
    baseline = best_baseline["statistic"].replace("_", "-")
    beating = sorted({row["layer"] for row in rows if row["beats_baselines"]})
    beating_in_words = ", ".join(str(layer) for layer in beating) or "none"
    sentences = [
        f"Prediction: the best of all layers ({best_layer['layer']}, {statistic}) has AUROC "
        f"{best_layer['auroc']:.2f}, and {best_layer['after_another']:.2f} after another prompt; the best baseline "
        f"({baseline}) has {best_baseline['auroc']:.2f}.",
        f"Layers that beat the baselines: {beating_in_words}.",
    ]
    measured = {row["statistic"] for row in rows}
    missing = []
    for name in PREDICTED_BASELINES.values():
        if name not in measured:
            missing.append(name.replace("_", "-"))
    if missing:
        sentences.append(f"Baselines are missing ({', '.join(missing)}): evaluate perplexity on the same corpus.")
    return sentences


def _is_significant(p: float | None) -> bool:
    """Whether a p-value is known and below the level of the tests."""
    return p is not None and p < LEVEL


def _excludes_zero(row: TableRow) -> bool:
    """Whether the interval of the difference from another prompt is on the side of zero that the deviation is on."""
    low = row["own_minus_another_low"]
    high = row["own_minus_another_high"]
    if low is None:
        return False
    if row["deviation"] > 0:
        return bool(low > 0)
    return bool(high < 0)


def _listed(rows: Sequence[TableRow]) -> str:
    """Return the layers of rows in words."""
    return ", ".join(str(row["layer"]) for row in rows) or "none"


@dataclass(frozen=True)
class Strata:
    """Statistics of one site of a run, by stratum.

    Attributes:
        labels: labels of the hallucinated and of the truthful answers.
        layers: indices of the layers that have the site.
        blocks: LayerStats by stratum, block of consecutive shards, and layer. A block holds whole pairs and is the unit
            of resampling.
    """

    labels: tuple[str, str]
    layers: tuple[int, ...]
    blocks: Mapping[str, list[list[LayerStats]]]

    @property
    def num_blocks(self) -> int:
        """Number of blocks of shards."""
        return len(self.blocks[self.labels[0]])

    @staticmethod
    def of_run(
        warehouse: Warehouse,
        run: TableRow,
        site: str,
        hallucinated: str | None = None,
        truthful: str | None = None,
    ) -> Strata:
        """Read the strata of a row of ``runs``.

        Raises:
            QueryError: if its text is not paired, or it lacks a label or the site.
        """
        require_known("site", site, run["sites"], QueryError)
        stratum_stats = warehouse.read_stratum_stats(run["run_id"])
        merged = {key: stats for key, stats in stratum_stats.items() if key[1] == site}
        if not merged:
            raise not_paired(run["run_id"])
        labels = which_labels({stratum for _, _, stratum in merged}, hallucinated, truthful)
        layers = tuple(sorted({layer for layer, _, _ in merged}))
        zero = LayerStats.zero(next(iter(merged.values())).thresholds)
        partials = [shard.strata for shard in warehouse.read_partials(run)]
        merged_blocks = []
        for shards in split_into_blocks(len(partials), BOOTSTRAP_BLOCKS):
            merged_blocks.append(merge_stats([partials[shard] for shard in shards]))
        if not merged_blocks:
            # Without the shards' statistics, the whole run is one block.
            merged_blocks = [merged]
        by_stratum: dict[str, list[list[LayerStats]]] = {}
        for label in labels:
            for stratum in (label, label + AFTER_ANOTHER):
                by_stratum[stratum] = []
                for block in merged_blocks:
                    of_layers = [block.get((layer, site, stratum), zero) for layer in layers]
                    by_stratum[stratum].append(of_layers)
        return Strata(labels, layers, by_stratum)

    def both_sides(
        self,
        recipe: str,
        threshold: Threshold,
        weights: Float64 | None = None,
        exchanged: Float64 | None = None,
        after: str = "",
    ) -> tuple[Parts, Parts]:
        """Return the parts of AVSS of hallucinated and of truthful answers, float64[n, layers] each.

        Args:
            threshold: near-zero threshold. A relative one is a multiple of the RMS of both strata together.
            weights: float64[n, blocks], the weight of each block, 1 by default.
            exchanged: float64[n, blocks], 1 if the labels of a block are exchanged, 0 by default.
            after: `AFTER_ANOTHER` for answers after another prompt, or empty for answers after their own.
        """
        if weights is None:
            weights = np.ones((1, self.num_blocks))
        if exchanged is None:
            exchanged = np.zeros((1, self.num_blocks))
        own_label = weights * (1 - exchanged)
        other_label = weights * exchanged
        hallucinated, truthful = self.labels
        return _both(
            [*self.blocks[hallucinated + after], *self.blocks[truthful + after]],
            recipe,
            threshold,
            np.hstack([own_label, other_label]),
            np.hstack([other_label, own_label]),
        )


def _both(
    blocks: Sequence[Sequence[LayerStats]], recipe: str, threshold: Threshold, first: Float64, second: Float64
) -> tuple[Parts, Parts]:
    """Return the parts of AVSS of blocks under each of two weights, float64[n, blocks].

    Raises:
        QueryError: if the site has no statistics for the recipe.
    """
    blocks_of_layers = zip(*blocks, strict=True)
    merged = [reduce(LayerStats.merge, blocks_of_layer) for blocks_of_layer in blocks_of_layers]
    table = SiteTable(merged, blocks, [threshold], np.vstack([first, second]))
    if recipe not in table.recipes():
        raise QueryError(f"The site has no statistics for the recipe '{recipe}'.", "Use block or update.")
    weighted = table.parts(recipe, threshold).weighted
    of_first = Parts(*(part[: len(first)] for part in weighted))
    of_second = Parts(*(part[len(first) :] for part in weighted))
    return of_first, of_second


def _flat(parts: Parts) -> Parts:
    return Parts(*(part.ravel() for part in parts))


def stratum_table(strata: Strata, recipe: str, threshold: Threshold) -> pa.Table:
    """Return `Contrast.layers` with the controls that need no single answers.

    Instead of pairs, blocks of shards are resampled, left out, and exchange their labels.

    Raises:
        QueryError: if there are fewer than two blocks, or the site has no statistics for the recipe.
    """
    num_blocks = strata.num_blocks
    num_layers = len(strata.layers)
    if num_blocks < 2:
        raise QueryError(
            "The run has one shard, and shards exchange their labels.", "Make `sequences_per_shard` smaller."
        )

    def own_sides(weights: Float64 | None = None) -> tuple[Parts, Parts]:
        return strata.both_sides(recipe, threshold, weights)

    def other_sides(weights: Float64 | None = None) -> tuple[Parts, Parts]:
        return strata.both_sides(recipe, threshold, weights, after=AFTER_ANOTHER)

    random = np.random.default_rng(BOOTSTRAP_SEED)
    permutations = contrast_stats.num_permutations(num_layers)
    exchanged = random.integers(0, 2, (permutations, num_blocks)).astype(np.float64)
    observed = contrast_stats.deviation(*own_sides()).ravel()
    permuted = contrast_stats.deviation(*strata.both_sides(recipe, threshold, exchanged=exchanged))

    is_in_first_half = np.arange(num_blocks) < num_blocks // 2
    splits = np.tile(is_in_first_half, (contrast_stats.PERMUTATIONS, 1))
    halves = random.permuted(splits, axis=1).astype(np.float64)
    truthful_blocks = strata.blocks[strata.labels[1]]
    first_half, second_half = _both(truthful_blocks, recipe, threshold, halves, 1 - halves)
    between_halves = contrast_stats.deviation(first_half, second_half)
    return _table(
        strata.layers,
        own_sides,
        other_sides,
        num_blocks,
        contrast_stats.p_values(observed, permuted),
        contrast_stats.floor_of(between_halves),
        dict.fromkeys(_MATCHED, np.full(num_layers, np.nan)),
    )


def which_labels(strata: Collection[str], hallucinated: str | None, truthful: str | None) -> tuple[str, str]:
    """Return the labels of hallucinated and of truthful answers. Labels that were not given are recognized by name.

    Raises:
        QueryError: if a given label is unknown, or a missing one is not recognized unambiguously.
    """
    labels = sorted(stratum for stratum in strata if not stratum.endswith(AFTER_ANOTHER))
    for label in (hallucinated, truthful):
        if label:
            require_known("label", label, labels, QueryError)
    if not hallucinated:
        hallucinated = _only([label for label in labels if label.lower() in HALLUCINATED_NAMES])
    if not truthful:
        remaining = [label for label in labels if label != hallucinated]
        if TRUTHFUL in remaining:
            truthful = TRUTHFUL
        else:
            truthful = _only(remaining)
    if not hallucinated or not truthful or hallucinated == truthful:
        raise QueryError(
            f"Which answers are hallucinated, and which truthful? Labels: {', '.join(labels)}.",
            "Name one label as `hallucinated` and another as `truthful`.",
        )
    return hallucinated, truthful


def not_paired(run_id: str) -> QueryError:
    """Return the error for a run whose text has no labelled answers."""
    return QueryError(
        f"The text of run '{run_id}' is not paired.",
        "Score on prompts with labelled answers: avss score --corpus file.jsonl:prompt+answer:LABEL.",
    )


def _only(labels: list[str]) -> str | None:
    if len(labels) == 1:
        return labels[0]
    return None


def contrast_section(label: str, result: Contrast) -> Section:
    """Return the contrast of one run."""
    name = f"contrast-{page_number(label)}"
    reading = result.reading
    rows = result.layers.to_pylist()
    pairs = ""
    if reading["pairs"]:
        pairs = f", {reading['pairs']} pairs"
    chart = Chart(
        name=name,
        title="Deviation from the median layer",
        meaning="How far each layer's contrast is from that of the median layer, beside the controls.",
        rows=_chart_rows(rows),
        draw=_drawing,
    )
    tables = [_layers_table(name, rows, reading)]
    if len(result.predictions):
        tables.append(_predictions_table(name, result.predictions.to_pylist()))
    return Section(
        label=label,
        about=f"{reading['hallucinated']} against {reading['truthful']} answers{pairs}; {reading['site']}, "
        f"{reading['recipe']}, below {reading['threshold']}.",
        sentences=result.findings,
        charts=[chart],
        tables=tables,
    )


def _chart_rows(rows: Sequence[TableRow]) -> list[NewRow]:
    """Return a row for each layer and kind of answers that has a deviation, for `_drawing`."""
    drawn = []
    for row in rows:
        for source, title in SERIES.items():
            deviation = row[source]
            if deviation is not None:
                noise = row["noise_floor"]
                drawn.append({"layer": row["layer"], "answers": title, "deviation": deviation, "noise": noise})
    return drawn


_NUMBER = "{:z.3f}".format
_LAYER_COLUMNS = (
    ReportColumn("layer", "layer"),
    ReportColumn("contrast", "eavss_contrast", _NUMBER),
    ReportColumn("95%", "interval", interval(_NUMBER), priority=2),
    ReportColumn("rank", "rank", "{:z.0f}".format, priority=3),
    ReportColumn("in top 25%", "prone_probability", "{:z.0%}".format, priority=4),
    ReportColumn("deviation", "deviation", _NUMBER),
    BarColumn(key="size"),
    ReportColumn("p", "p_holm", p_value),
    ReportColumn("noise", "noise_floor", _NUMBER, priority=1),
    ReportColumn("length-matched", "length_matched", _NUMBER, priority=1),
    ReportColumn("its p", "length_matched_p", p_value, priority=1),
    ReportColumn("other prompt", "after_another", _NUMBER, priority=1),
    ReportColumn("stands", "stands", yes, meaning="passes every control"),
)
_PREDICTION_COLUMNS = (
    ReportColumn("predicts by", "name", number=False),
    ReportColumn("AUROC", "auroc", _NUMBER),
    ReportColumn("95%", "interval", interval(_NUMBER)),
    ReportColumn("other prompt", "after_another", _NUMBER, priority=1),
    ReportColumn("beats", "beats_baselines", yes),
)


def _layers_table(name: str, rows: Sequence[TableRow], reading: TableRow) -> ReportTable:
    """Return the table of the layers: the contrast, and the tests of its deviation from the median layer."""
    return ReportTable(
        name=name,
        title="Each layer",
        columns=_LAYER_COLUMNS,
        rows=[_layer_row(row) for row in rows],
        caption=_layers_caption(rows[0], reading),
    )


def _layer_row(row: TableRow) -> ReportRow:
    """Return the row of a layer, whose bar is red if its deviation is beyond the noise."""
    values = {
        **row,
        "interval": known_interval(row["eavss_contrast_low"], row["eavss_contrast_high"]),
        "size": abs(row["deviation"] or 0.0),
        "stands": bool(row["stands"]),
    }
    return ReportRow(values, is_marked=_is_beyond_noise(row))


def _is_beyond_noise(row: TableRow) -> bool:
    """Whether a layer's deviation is significant, and larger than that between halves of the truthful answers."""
    if not _is_significant(row["p_holm"]):
        return False
    return abs(row["deviation"] or 0.0) > (row["noise_floor"] or 0.0)


def _layers_caption(first_row: TableRow, reading: TableRow) -> str:
    """Return the explanation of the table of the layers, given its first row."""
    truthful = reading["truthful"]
    units = "shards"
    matched = ""
    if reading["pairs"]:
        units = "pairs"
        matched = f", the {first_row['length_matched_pairs']} pairs of about equal length"
    caption = (
        f"Contrast: log(AVSS on {reading['hallucinated']} / on {truthful} answers). The tests are of its deviation "
        f"from the median layer: p by exchange of labels inside {units} (Holm), noise "
        f"between random halves of {truthful} answers{matched}, and the same answers after another prompt."
    )
    if first_row["eavss_contrast_low"] is None:
        caption += f" No interval: fewer than {MINIMUM_UNITS} {units}, or a contrast that is not defined."
    return caption


def _predictions_table(name: str, rows: Sequence[TableRow]) -> ReportTable:
    """Return the baselines, and the best layer of each statistic."""
    best: dict[str, TableRow] = {}
    for row in rows:
        if row["layer"] is None:
            best[str(row["statistic"]).replace("_", "-")] = row
    for statistic, title in FEATURES.items():
        of_layers = [row for row in rows if row["statistic"] == statistic and row["layer"] is not None]
        if of_layers:
            best_layer = max(of_layers, key=itemgetter("auroc"))
            best[f"{title}, layer {best_layer['layer']}"] = best_layer
    return ReportTable(
        name=f"{name}-predictions",
        title="Does it predict",
        columns=_PREDICTION_COLUMNS,
        rows=[_predictor_row(title, row) for title, row in best.items()],
        caption="Folds over prompts; of each statistic, its best layer.",
    )


def _predictor_row(name: str, row: TableRow) -> ReportRow:
    """Return the row of a baseline, or of a statistic of one layer."""
    values = {
        **row,
        "name": name,
        "interval": known_interval(row["auroc_low"], row["auroc_high"]),
        "beats_baselines": bool(row["beats_baselines"]),
    }
    return ReportRow(values)


def _drawing() -> ChartType:
    """Return the chart of deviations: a dot for each layer and kind of answers, and a band of noise."""
    import altair as alt

    titles = list(SERIES.values())
    title = "deviation from the median layer"
    base = alt.Chart().encode(alt.X("layer:Q", title="layer (from 0)").axis(format="d", tickMinStep=1, grid=False))
    # Each kind of answers has the same noise, so that the rows of the first one draw it.
    band = base.transform_calculate(low="-datum.noise", high="datum.noise")
    band = band.mark_area(color=GRAY, opacity=0.25, interpolate="step")
    band = band.encode(alt.Y("low:Q", title=title), alt.Y2("high:Q"))
    band = band.transform_filter(f"datum.answers == '{titles[0]}'")
    legend = alt.Legend(title=None, orient="top", columns=1, labelLimit=alt.ExprRef("limit"), symbolOpacity=1)
    colors = alt.Scale(domain=titles, range=[BLUE, AMBER, GRAY])
    dots = base.mark_point(filled=True, size=40, opacity=1).encode(
        alt.Y("deviation:Q", title=title, axis=alt.Axis(grid=False)),
        alt.Color("answers:N", scale=colors, legend=legend),
        alt.Shape("answers:N", scale=alt.Scale(domain=titles), legend=legend),
        tooltip=["layer:Q", "answers:N", alt.Tooltip("deviation:Q", format=".3f")],
    )
    return alt.layer(band, dots).properties(height=220)
