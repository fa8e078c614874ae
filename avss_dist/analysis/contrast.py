"""Contrast of hallucinated and truthful answers in a run on paired text, with controls and findings in words.

Single answers are contrasted where the run kept their statistics. For any other recipe or threshold, `Strata` contrasts
blocks of shards.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import itemgetter
from typing import Any

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
    ReportTable,
    Row,
    Section,
    column_of,
    interval,
    known_interval,
    p_value,
    page_number,
    yes,
)
from avss_dist.core.errors import DamagedFile, QueryError, require_known
from avss_dist.core.registry import AFTER_ANOTHER, ENTROPY, INCORRECT, LOSS, PERPLEXITY, RECIPES, TRUTHFUL
from avss_dist.core.results import TabularResult
from avss_dist.core.settings import PUBLISHED_THRESHOLD, SITES
from avss_dist.core.text import describe_threshold
from avss_dist.stats import contrast as contrast_stats
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
from avss_dist.stats.rankings import depth_correlation
from avss_dist.stats.scores import Parts, SiteTable, Threshold
from avss_dist.warehouse.reader import Warehouse, grouped
from avss_dist.warehouse.schema import TABLES

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
_MATCHED = tuple(f"{kind}_matched{what}" for kind in ("length", "position") for what in ("", "_p", "_pairs"))


@dataclass(frozen=True, kw_only=True, repr=False)
class Contrast(TabularResult):
    """Differences of layers between two labels of answers. Its table has the layers.

    Attributes:
        reading: run, site, recipe, threshold and the two labels, by name.
        layers: one row for each layer, with every score, interval and control.
        predictions: AUROC and interval of each layer and statistic, and of each baseline: one row each.
        findings: sentences about the differences that remain under the controls.
    """

    reading: Mapping[str, Any]
    layers: pa.Table
    predictions: pa.Table
    findings: tuple[str, ...]

    def table(self) -> pa.Table:
        """Return the layers."""
        return self.layers


def contrast(
    warehouse: Warehouse,
    run: Mapping[str, Any],
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
        labels, pairs = strata.labels, None
        layers = stratum_table(strata, recipe, Threshold(value=threshold, kind=threshold_kind))
        predictions = pa.table({"layer": pa.nulls(0, pa.int64()), "statistic": pa.nulls(0, pa.string())})
    else:
        rows, counted = answer_rows(warehouse, run, site), list(run["thresholds"])
        if threshold not in counted:
            raise QueryError(
                f"The run did not count elements below {threshold:g} row by row.",
                f"It counted {', '.join(f'{value:g}' for value in counted)}.",
            )
        labels = which_labels(pc.unique(rows["stratum"]).to_pylist(), hallucinated, truthful)
        own_prompt, other_prompt = (
            read_answers(rows, labels, after, counted.index(threshold)) for after in ("", AFTER_ANOTHER)
        )
        layers, pairs = layer_table(own_prompt, other_prompt, recipe), len(own_prompt.pairs)
        predictions = _predictions(own_prompt, other_prompt, _evaluated(warehouse, run, rows, labels))
    reading = {
        "run_id": run["run_id"],
        "model": run["model"],
        "site": site,
        "recipe": recipe,
        "threshold": describe_threshold(threshold, threshold_kind),
        "hallucinated": labels[0],
        "truthful": labels[1],
        "pairs": pairs,
    }
    return Contrast(
        reading=reading,
        layers=layers,
        predictions=predictions,
        findings=(*_about_layers(layers.to_pylist()), *_about_prediction(predictions.to_pylist())),
    )


def paired_run(warehouse: Warehouse, name: str | None) -> ChosenRun:
    """Return the newest run on paired text.

    Args:
        name: name of the run, as for `newest_run`.
    """

    def require(run: Mapping[str, Any]) -> None:
        run_id = run["run_id"]
        for name in ("row_stats", "stratum_stats"):
            if warehouse.table(name, run_ids=[run_id], columns=["run_id"]).num_rows:
                return
        raise not_paired(run_id)

    return newest_run(warehouse, name, require)


def answer_rows(warehouse: Warehouse, run: Mapping[str, Any], site: str) -> pa.Table:
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
    if not rows or rows.num_rows != run["num_sequences"] * len(pc.unique(rows["layer"])):
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
    answer = rows.filter(pc.equal(rows["layer"], rows["layer"][0]))
    grids = {name: rows[name] for name in ("pooled_variance", "count", "mean", "m2", "norm", "relative_magnitude")}
    grids["near_zero"] = pc.list_element(rows["near_zero"], threshold)
    answers = contrast_stats.Answers(
        pair=answer["pair"].to_numpy(),
        hallucinated=pc.equal(answer["stratum"], strata[0]).to_numpy(),
        tokens=answer["answer_tokens"].to_numpy(),
        stats={name: np.array(grid, np.float64).reshape(len(answer), -1) for name, grid in grids.items()},
    )
    both = [p for p in answers.pairs if 0 < answers.hallucinated[answers.pair == p].mean() < 1]
    return answers.of_pairs(np.array(both, np.int64))


def layer_table(own_prompt: contrast_stats.Answers, other_prompt: contrast_stats.Answers, recipe: str) -> pa.Table:
    """Return `Contrast.layers` from the answers after their own prompts and after another.

    Pairs of answers are resampled and left out, and their labels are exchanged inside them.
    """

    def sides(answers: contrast_stats.Answers, weights: Float64 | None = None) -> tuple[Parts, Parts]:
        place = np.searchsorted(own_prompt.pairs, answers.pair)
        by_answer = np.ones(len(place)) if weights is None else weights[:, place]
        return contrast_stats.both_sides(answers, by_answer, answers.hallucinated.astype(np.float64), recipe)

    layers, matched = np.arange(own_prompt.stats["count"].shape[1]), dict[str, Float64]()
    nothing = np.full(len(layers), np.nan)
    for name, slack in (("length_matched", MATCHED), ("position_matched", 0.0)):
        answers = contrast_stats.length_matched(own_prompt, slack)
        tested = len(answers.pairs) >= MIN_PAIRS
        matched |= {
            name: contrast_stats.observed(answers, recipe) if tested else nothing,
            f"{name}_p": contrast_stats.holm(contrast_stats.permutation_p(answers, recipe)) if tested else nothing,
            f"{name}_pairs": np.full(len(layers), len(answers.pairs)),
        }
    return _table(
        layers,
        partial(sides, own_prompt),
        partial(sides, other_prompt),
        len(own_prompt.pairs),
        contrast_stats.permutation_p(own_prompt, recipe),
        contrast_stats.noise_floor(own_prompt, recipe),
        matched,
    )


def _table(
    layers: Sequence[int] | Int64,
    own_prompt: Callable[..., tuple[Parts, Parts]],
    other_prompt: Callable[..., tuple[Parts, Parts]],
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
    observed = _flat(hallucinated), _flat(truthful)
    without = own_prompt(left_out)
    columns = contrast_stats.contrast_columns(observed, own_prompt(bootstrap_weights(units)), without)
    deviation, after_another = columns["deviation"], contrast_stats.deviation(*other_prompt()).ravel()
    change = deviation - after_another
    low, high = jackknife_interval(
        change, contrast_stats.deviation(*without) - contrast_stats.deviation(*other_prompt(left_out))
    )
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
    with np.errstate(invalid="ignore"):
        by_label = (columns["p_holm"] < LEVEL) & (np.abs(deviation) > noise_floor)
        by_length = (matched["length_matched_p"] < LEVEL) & (np.sign(deviation) == np.sign(matched["length_matched"]))
        by_prompt = np.where(deviation > 0, low > 0, high < 0)
    arrays = {name: pa.array(values, from_pandas=True) for name, values in ({"layer": layers} | columns).items()}
    arrays["stands"] = pa.array(by_label & by_length & by_prompt, mask=np.isnan(matched["length_matched_pairs"]))
    arrays["depth_correlation"] = pa.array(
        np.full(len(layers), depth_correlation(columns["eavss_contrast"].tolist())), from_pandas=True
    )
    return pa.table(arrays)


def _evaluated(
    warehouse: Warehouse, run: Mapping[str, Any], rows: pa.Table, labels: tuple[str, str]
) -> dict[str, Float64]:
    """Return the whole model's mean per token for each answer, by baseline.

    Only evaluations on the same rows count.
    """
    from avss_dist.tasks.task import combine  # torch with it, which pages of other runs need not wait for

    where = (pc.field("task") == f"{PERPLEXITY}{run['corpus']}") & (pc.field("revision") == run["revision"])
    cells = [c for c in warehouse.table("cells", where=where).to_pylist() if not c["drop"] and c["patch"] is None]
    layer = rows.filter(pc.equal(rows["layer"], rows["layer"][0]))
    tokens, strata = (layer[name].to_pylist() for name in ("answer_tokens", "stratum"))
    counts = np.isin(strata, labels)
    return {
        PREDICTED_BASELINES[result.metric]: (result.samples / result.weights)[counts]
        for of_run in grouped(cells, itemgetter("run_id")).values()
        for result in combine(of_run, len({cell["part"] for cell in of_run}))
        if result.metric in PREDICTED_BASELINES and result.weights.tolist() == tokens
    }


def _predictions(
    a: contrast_stats.Answers, other: contrast_stats.Answers, evaluated: Mapping[str, Float64]
) -> pa.Table:
    """Return the out-of-fold AUROC of one-dimensional classifiers on layers and on baselines. Folds are of pairs."""
    features, elsewhere = map(_features, (a, other))
    weights = left_out_weights(len(a.pairs))[:, np.searchsorted(a.pairs, a.pair)]
    baselines = {"length": a.tokens.astype(np.float64), **evaluated}
    classifiers: list[tuple[int | None, str, float, Float64]] = [
        (None, name, *_auroc(a, values, weights)) for name, values in baselines.items() if len(values) == len(a.pair)
    ]
    for name, grid in features.items():
        if np.isfinite(grid).all():
            classifiers += [(layer, name, *_auroc(a, column, weights)) for layer, column in enumerate(grid.T)]
    number = sum(layer is not None for layer, *_ in classifiers)
    best = max(
        (classifier for classifier in classifiers if classifier[0] is None), key=lambda classifier: classifier[2]
    )
    corrected = 1 - (1 - INTERVAL) / max(number, 1)  # Bonferroni, over layers and statistics
    rows = []
    for layer, name, value, left_out in classifiers:
        low, high = jackknife_interval(np.array(value), left_out, scale="logit")
        row = {"layer": layer, "statistic": name, "auroc": value, "auroc_low": low, "auroc_high": high}
        row |= {"after_another": None, "gain": None, "beats_baselines": False}
        if layer is not None:
            gain, once = value - best[2], np.ones((1, len(other.pair)))
            least_gain, _ = jackknife_interval(np.array(gain), left_out - best[3], confidence=corrected)
            after_another, _ = _auroc(other, elsewhere[name][:, layer], once)
            row |= {"after_another": after_another, "gain": gain, "beats_baselines": bool(least_gain > 0)}
        rows.append(row)
    return pa.Table.from_pylist(rows)


def _features(a: contrast_stats.Answers) -> dict[str, Float64]:
    """Return the statistics of answers that classifiers are trained on, float64[rows, layers], by name."""
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = {"variance": a.stats["m2"] / a.stats["count"], "sparsity": a.stats["near_zero"] / a.stats["count"]}
    return shares | {name: a.stats[name] for name in ("norm", "relative_magnitude")}


def _auroc(a: contrast_stats.Answers, values: Float64, weights: Float64) -> tuple[float, Float64]:
    """Return the out-of-fold AUROC of a classifier of one value, and that under each of several weights."""
    scores = contrast_stats.out_of_fold(a, values)
    whole, resampled = (contrast_stats.auroc(scores, a.hallucinated, w) for w in (np.ones((1, len(scores))), weights))
    return whole.item(), resampled


def _about_layers(rows: list[dict[str, Any]]) -> list[str]:
    """Return sentences on the layers that differ by label, and on those that also do by length and by prompt."""
    differ = [row for row in rows if row["p_holm"] is not None and row["p_holm"] < LEVEL]
    number, rho = rows[0]["length_matched_pairs"], rows[0]["depth_correlation"] or 0.0
    where = "inside pairs" if number is not None else "of whole shards"
    matched = _listed([row["layer"] for row in differ if (row["length_matched_p"] or 1) < LEVEL])
    sentences = (
        (
            not differ,
            f"No layer differs between hallucinated and truthful answers more than with labels exchanged {where}.",
        ),
        (
            differ,
            f"Layers that differ more than with labels exchanged {where} (Holm, {LEVEL:.0%}): "
            f"{_listed([row['layer'] for row in differ])}.",
        ),
        (
            differ and number is not None,
            f"With lengths matched ({number} pairs): "
            f"{matched if (number or 0) >= MIN_PAIRS else 'too few pairs to tell'}.",
        ),
        (
            differ,
            "Otherwise than for the same answers after another prompt: "
            f"{_listed([row['layer'] for row in differ if _excludes_zero(row)])}.",
        ),
        (
            number is None,
            "Lengths are not controlled: that takes pooled or element, and a threshold that the run counted.",
        ),
        (
            number is not None,
            f"Stand after every control: {_listed([row['layer'] for row in rows if row['stands']])}.",
        ),
        (
            abs(rho) > FOLLOWS_DEPTH,
            f"The contrast follows depth (Spearman {rho:z.2f}), and says little more than a layer's number.",
        ),
    )
    return [sentence for holds, sentence in sentences if holds]


def _about_prediction(rows: list[dict[str, Any]]) -> list[str]:
    """Return sentences on how well layers and baselines predict labels, none if there are no predictions."""
    if not rows:
        return []
    best = max((row for row in rows if row["layer"] is None), key=lambda row: row["auroc"])
    top = max((row for row in rows if row["layer"] is not None), key=lambda row: row["auroc"])
    beating = sorted({row["layer"] for row in rows if row["beats_baselines"]})
    statistic, baseline = FEATURES[top["statistic"]], best["statistic"].replace("_", "-")
    words = [
        f"Prediction: the best of all layers ({top['layer']}, {statistic}) has AUROC {top['auroc']:.2f}, and "
        f"{top['after_another']:.2f} after another prompt; the best baseline ({baseline}) has {best['auroc']:.2f}.",
        f"Layers that beat the baselines: {_listed(beating)}.",
    ]
    measured = {row["statistic"] for row in rows}
    if missing := [name.replace("_", "-") for name in PREDICTED_BASELINES.values() if name not in measured]:
        words.append(f"Baselines are missing ({', '.join(missing)}): evaluate perplexity on the same corpus.")
    return words


def _excludes_zero(row: Mapping[str, Any]) -> bool:
    low, high = row["own_minus_another_low"], row["own_minus_another_high"]
    return low is not None and (low > 0 if row["deviation"] > 0 else high < 0)


def _listed(layers: list[int]) -> str:
    return ", ".join(map(str, layers)) or "none"


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

    @staticmethod
    def of_run(
        warehouse: Warehouse,
        run: Mapping[str, Any],
        site: str,
        hallucinated: str | None = None,
        truthful: str | None = None,
    ) -> Strata:
        """Read the strata of a row of ``runs``.

        Raises:
            QueryError: if its text is not paired, or it lacks a label or the site.
        """
        require_known("site", site, run["sites"], QueryError)
        merged = {key: stats for key, stats in warehouse.read_stratum_stats(run["run_id"]).items() if key[1] == site}
        if not merged:
            raise not_paired(run["run_id"])
        labels = which_labels({stratum for _, _, stratum in merged}, hallucinated, truthful)
        layers = tuple(sorted({layer for layer, _, _ in merged}))
        zero = LayerStats.zero(next(iter(merged.values())).thresholds)
        strata = [label + after for label in labels for after in ("", AFTER_ANOTHER)]
        partials = [shard.strata for shard in warehouse.read_partials(run)]
        parts = split_into_blocks(len(partials), BOOTSTRAP_BLOCKS)
        blocks = [merge_stats([partials[i] for i in part]) for part in parts] or [merged]
        by_layer = {
            key: [[block.get((layer, site, key), zero) for layer in layers] for block in blocks] for key in strata
        }
        return Strata(labels, layers, by_layer)

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
        swapped = np.zeros((1, len(self.blocks[self.labels[0]]))) if exchanged is None else exchanged
        own, exchanged_weights = ((1 if weights is None else weights) * part for part in (1 - swapped, swapped))
        first, second = (self.blocks[label + after] for label in self.labels)
        return _both(
            [*first, *second],
            recipe,
            threshold,
            np.hstack([own, exchanged_weights]),
            np.hstack([exchanged_weights, own]),
        )


def _both(
    blocks: Sequence[Sequence[LayerStats]], recipe: str, threshold: Threshold, first: Float64, second: Float64
) -> tuple[Parts, Parts]:
    """Return the parts of AVSS of blocks under each of two weights, float64[n, blocks].

    Raises:
        QueryError: if the site has no statistics for the recipe.
    """
    merged = [reduce(LayerStats.merge, of_layer) for of_layer in zip(*blocks, strict=True)]
    table = SiteTable(merged, blocks, [threshold], np.vstack([first, second]))
    if recipe not in table.recipes():
        raise QueryError(f"The site has no statistics for the recipe '{recipe}'.", "Use block or update.")
    _, parts = table.parts(recipe, threshold)
    rows = len(first)
    return Parts(*(part[:rows] for part in parts)), Parts(*(part[rows:] for part in parts))


def _flat(parts: Parts) -> Parts:
    return Parts(*(part.ravel() for part in parts))


def stratum_table(strata: Strata, recipe: str, threshold: Threshold) -> pa.Table:
    """Return `Contrast.layers` with the controls that need no single answers.

    Instead of pairs, blocks of shards are resampled, left out, and exchange their labels.

    Raises:
        QueryError: if there are fewer than two blocks, or the site has no statistics for the recipe.
    """
    n, layers = len(strata.blocks[strata.labels[0]]), len(strata.layers)
    if n < 2:
        raise QueryError(
            "The run has one shard, and shards exchange their labels.", "Make `sequences_per_shard` smaller."
        )
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    own_prompt = partial(strata.both_sides, recipe, threshold)
    exchanged = rng.integers(0, 2, (contrast_stats.num_permutations(layers), n)).astype(np.float64)
    halves = rng.permuted(np.tile(np.arange(n) < n // 2, (contrast_stats.PERMUTATIONS, 1)), axis=1).astype(np.float64)
    noise = contrast_stats.deviation(*_both(strata.blocks[strata.labels[1]], recipe, threshold, halves, 1 - halves))
    return _table(
        strata.layers,
        own_prompt,
        partial(own_prompt, after=AFTER_ANOTHER),
        n,
        contrast_stats.p_values(
            contrast_stats.deviation(*own_prompt()).ravel(), contrast_stats.deviation(*own_prompt(exchanged=exchanged))
        ),
        contrast_stats.floor_of(noise),
        dict.fromkeys(_MATCHED, np.full(layers, np.nan)),
    )


def which_labels(strata: Collection[str], hallucinated: str | None, truthful: str | None) -> tuple[str, str]:
    """Return the labels of hallucinated and of truthful answers. Labels that were not given are recognized by name.

    Raises:
        QueryError: if a given label is unknown, or a missing one is not recognized unambiguously.
    """
    labels = sorted(stratum for stratum in strata if not stratum.endswith(AFTER_ANOTHER))
    for label in filter(None, (hallucinated, truthful)):
        require_known("label", label, labels, QueryError)
    hallucinated = hallucinated or _only([label for label in labels if label.lower() in HALLUCINATED_NAMES])
    remaining = [label for label in labels if label != hallucinated]
    truthful = truthful or (TRUTHFUL if TRUTHFUL in remaining else _only(remaining))
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
    return labels[0] if len(labels) == 1 else None


def contrast_section(label: str, result: Contrast) -> Section:
    """Return the contrast of one run."""
    name, reading, rows = f"contrast-{page_number(label)}", result.reading, result.layers.to_pylist()
    pairs = f", {reading['pairs']} pairs" if reading["pairs"] else ""
    drawn = [
        {"layer": row["layer"], "answers": title, "deviation": row[source], "noise": row["noise_floor"]}
        for row in rows
        for source, title in SERIES.items()
        if row[source] is not None
    ]
    predictions = [_predictions_table(name, result.predictions.to_pylist())] if len(result.predictions) else []
    return Section(
        label=label,
        about=f"{reading['hallucinated']} against {reading['truthful']} answers{pairs}; {reading['site']}, "
        f"{reading['recipe']}, below {reading['threshold']}.",
        sentences=result.findings,
        charts=[
            Chart(
                name=name,
                title="Deviation from the median layer",
                meaning="How far each layer's contrast is from that of the median layer, beside the controls.",
                rows=drawn,
                draw=_drawing,
            )
        ],
        tables=[_layers_table(name, rows, reading), *predictions],
    )


def _layers_table(name: str, rows: Sequence[Row], reading: Mapping[str, Any]) -> ReportTable:
    column, number = partial(column_of, rows), "{:z.3f}".format
    intervals = [known_interval(row["eavss_contrast_low"], row["eavss_contrast_high"]) for row in rows]
    sizes = [abs(row["deviation"] or 0.0) for row in rows]
    beyond_noise = [
        (row["p_holm"] or 1) < LEVEL and size > (row["noise_floor"] or 0.0)
        for row, size in zip(rows, sizes, strict=True)
    ]
    units, truthful = "pairs" if reading["pairs"] else "shards", reading["truthful"]
    matched = f", the {rows[0]['length_matched_pairs']} pairs of about equal length" if reading["pairs"] else ""
    caption = (
        f"Contrast: log(AVSS on {reading['hallucinated']} / on {truthful} answers). The tests are of its deviation "
        f"from the median layer: p by exchange of labels inside {units} (Holm), noise "
        f"between random halves of {truthful} answers{matched}, and the same answers after another prompt."
    )
    if rows[0]["eavss_contrast_low"] is None:
        caption += f" No interval: fewer than {MINIMUM_UNITS} {units}, or a contrast that is not defined."
    return ReportTable(
        name=name,
        title="Each layer",
        columns=[
            column("layer", "layer", str),
            column("contrast", "eavss_contrast", number),
            ReportColumn("95%", intervals, interval(number), priority=2),
            column("rank", "rank", "{:z.0f}".format, 3),
            column("in top 25%", "prone_probability", "{:z.0%}".format, 4),
            column("deviation", "deviation", number),
            BarColumn(values=sizes, marked=beyond_noise),
            column("p", "p_holm", p_value),
            column("noise", "noise_floor", number, 1),
            column("length-matched", "length_matched", number, 1),
            column("its p", "length_matched_p", p_value, 1),
            column("other prompt", "after_another", number, 1),
            ReportColumn("stands", [bool(row["stands"]) for row in rows], yes, meaning="passes every control"),
        ],
        caption=caption,
    )


def _predictions_table(name: str, rows: Sequence[Row]) -> ReportTable:
    """Return the baselines, and the best layer of each statistic."""
    best = {str(row["statistic"]).replace("_", "-"): row for row in rows if row["layer"] is None}
    for statistic, title in FEATURES.items():
        of_layers = [row for row in rows if row["statistic"] == statistic and row["layer"] is not None]
        if row := max(of_layers, key=lambda row: row["auroc"], default=None):
            best[f"{title}, layer {row['layer']}"] = row
    intervals = [known_interval(row["auroc_low"], row["auroc_high"]) for row in best.values()]
    return ReportTable(
        name=f"{name}-predictions",
        title="Does it predict",
        columns=[
            ReportColumn("predicts by", list(best), number=False),
            ReportColumn("AUROC", [row["auroc"] for row in best.values()], "{:z.3f}".format),
            ReportColumn("95%", intervals, interval("{:z.3f}".format)),
            ReportColumn("other prompt", [row["after_another"] for row in best.values()], "{:z.3f}".format, priority=1),
            ReportColumn("beats", [bool(row["beats_baselines"]) for row in best.values()], yes),
        ],
        caption="Folds over prompts; of each statistic, its best layer.",
    )


def _drawing() -> Any:
    """Return the chart of deviations: a dot for each layer and kind of answers, and a band of noise."""
    import altair as alt

    titles = list(SERIES.values())
    legend = alt.Legend(title=None, orient="top", columns=1, labelLimit=alt.ExprRef("limit"), symbolOpacity=1)
    title = "deviation from the median layer"
    base = alt.Chart().encode(alt.X("layer:Q", title="layer (from 0)").axis(format="d", tickMinStep=1, grid=False))
    band = (
        base.transform_calculate(low="-datum.noise", high="datum.noise")
        .mark_area(color=GRAY, opacity=0.25, interpolate="step")
        .encode(alt.Y("low:Q", title=title), alt.Y2("high:Q"))
        .transform_filter(f"datum.answers == '{titles[0]}'")
    )
    dots = base.mark_point(filled=True, size=40, opacity=1).encode(
        alt.Y("deviation:Q", title=title, axis=alt.Axis(grid=False)),
        alt.Color("answers:N", scale=alt.Scale(domain=titles, range=[BLUE, AMBER, GRAY]), legend=legend),
        alt.Shape("answers:N", scale=alt.Scale(domain=titles), legend=legend),
        tooltip=["layer:Q", "answers:N", alt.Tooltip("deviation:Q", format=".3f")],
    )
    return alt.layer(band, dots).properties(height=220)
