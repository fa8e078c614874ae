"""What a run on paired text says of hallucinated against truthful answers, with its controls, in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from avss_dist.errors import DamagedFile, QueryError, require_known
from avss_dist.settings import AFTER_ANOTHER, INCORRECT, PERPLEXITY, PUBLISHED_THRESHOLD, SITES, TRUTHFUL
from avss_dist.stats import contrast as of
from avss_dist.stats.layer_stats import Float64
from avss_dist.stats.rankings import bootstrap_interval, bootstrap_weights, depth_correlation
from avss_dist.tasks.base import combine
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.schema import DAMAGED

LEVEL = 0.05
MATCHED = 0.1  # lengths of the answers of a pair differ by a tenth at most
FOLLOWS_DEPTH = 0.9
FEWEST_PAIRS = 10  # that a matched subset is tested on
HALLUCINATED_NAMES = (INCORRECT, "hallucinated", "hallucination", "false", "wrong")
FEATURES = {"variance": "variance", "sparsity": "sparsity", "norm": "norm", "relative_magnitude": "update ratio"}
_ARRAYS = ("pooled_variance", "count", "mean", "m2", "norm", "relative_magnitude")


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """How layers differ between two labels of answers.

    Attributes:
        reading: site, recipe and threshold, and the two labels, by name.
        layers: one row for each layer, with every score, interval and control.
        predictions: one row for each layer and statistic, and one for each baseline: AUROC and interval.
        findings: in words, what is left once the controls have spoken.
    """

    reading: Mapping[str, Any]
    layers: pa.Table
    predictions: pa.Table
    findings: tuple[str, ...]


def contrast(
    warehouse: Warehouse,
    run: Mapping[str, Any],
    *,
    site: str = "block",
    recipe: str = "pooled",
    threshold: float = PUBLISHED_THRESHOLD,
    hallucinated: str | None = None,
    truthful: str | None = None,
) -> Contrast:
    """Contrast two labels of a run on paired text.

    Args:
        run: a row of ``runs``.
        recipe: ``pooled`` or ``element``; rows have no statistics by unit.
        threshold: absolute, one that the run counted.
        hallucinated, truthful: labels; without them, the two that there are, if their names tell which is which.

    Raises:
        QueryError: the run's text is not paired, or has not those labels, that site or threshold.
    """
    require_known("recipe", recipe, ("pooled", "element"), QueryError)
    require_known("site", site, run["sites"] or SITES, QueryError)
    rows = _rows(warehouse, run, site)
    counted = list(run["thresholds"])
    if threshold not in counted:
        known = ", ".join(f"{value:g}" for value in counted)
        raise QueryError(f"The run did not count elements below {threshold:g} row by row.", f"It counted {known}.")
    labels = _labels(rows, hallucinated, truthful)
    at = counted.index(threshold)
    own, other = (_answers(rows, labels, after, at) for after in ("", AFTER_ANOTHER))
    layers = _layer_table(own, other, recipe)
    predictions = _predictions(own, other, _likelihood(warehouse, run, rows, labels))
    reading = {"run_id": run["run_id"], "model": run["model"], "site": site, "recipe": recipe, "threshold": threshold}
    reading |= {"hallucinated": labels[0], "truthful": labels[1], "pairs": len(own.pairs)}
    return Contrast(
        reading=reading, layers=layers, predictions=predictions, findings=tuple(_findings(layers, predictions))
    )


def _rows(warehouse: Warehouse, run: Mapping[str, Any], site: str) -> pa.Table:
    """The row statistics of a site, by row and layer."""
    rows = warehouse.table("row_stats", run_ids=[run["run_id"]], where=pc.field("site") == site)
    if not rows:
        raise QueryError(
            f"The text of run '{run['run_id']}' is not paired.",
            "Score on prompts with labelled answers: avss score --corpus file.jsonl:prompt+answer --label-field LABEL.",
        )
    rows = rows.sort_by([("row", "ascending"), ("layer", "ascending")])
    if rows.num_rows != run["num_sequences"] * len(pc.unique(rows["layer"])):
        raise DamagedFile(f"Statistics of rows of run '{run['run_id']}' are missing.", DAMAGED)
    return rows


def _labels(rows: pa.Table, hallucinated: str | None, truthful: str | None) -> tuple[str, str]:
    known = sorted(s for s in pc.unique(rows["stratum"]).to_pylist() if not s.endswith(AFTER_ANOTHER))
    for label in filter(None, (hallucinated, truthful)):
        require_known("label", label, known, QueryError)
    hallucinated = hallucinated or _only([label for label in known if label.lower() in HALLUCINATED_NAMES])
    truthful = truthful or _truthful([label for label in known if label != hallucinated])
    if not hallucinated or not truthful or hallucinated == truthful:
        raise QueryError(
            f"Which answers are hallucinated, and which truthful? Labels: {', '.join(known)}.",
            "Name one label as `hallucinated` and another as `truthful`.",
        )
    return hallucinated, truthful


def _truthful(labels: list[str]) -> str | None:
    return TRUTHFUL if TRUTHFUL in labels else _only(labels)


def _only(labels: list[str]) -> str | None:
    return labels[0] if len(labels) == 1 else None


def _answers(rows: pa.Table, labels: tuple[str, str], after: str, threshold: int) -> of.Answers:
    """The answers of two labels, after their own prompt or another."""
    wanted = [label + after for label in labels]
    rows = rows.filter(pc.is_in(rows["stratum"], pa.array(wanted)))
    layers = len(pc.unique(rows["layer"]))

    def grid(name: str) -> Float64:
        return np.asarray(rows[name].to_numpy(), np.float64).reshape(-1, layers)

    near_zero = np.array(pc.list_element(rows["near_zero"], threshold), np.float64).reshape(-1, layers)
    stratum = np.array(rows["stratum"].to_pylist(), object).reshape(-1, layers)[:, 0]
    made = of.Answers(
        pair=grid("pair")[:, 0].astype(np.int64),
        hallucinated=stratum == wanted[0],
        tokens=grid("answer_tokens")[:, 0].astype(np.int64),
        near_zero=near_zero,
        **{name: grid(name) for name in _ARRAYS},
    )
    both = [p for p in made.pairs if 0 < made.hallucinated[made.pair == p].mean() < 1]
    return made.of_pairs(np.array(both, np.int64))


def _layer_table(own: of.Answers, other: of.Answers, recipe: str) -> pa.Table:
    columns: dict[str, Any] = {"layer": np.arange(own.count.shape[1])}
    columns |= of.contrast_columns(own, recipe)
    p = of.permutation_p(own, recipe)
    columns |= {"p": p, "p_holm": of.holm(p), "noise_floor": of.noise_floor(own, recipe)}
    for name, slack in (("length_matched", MATCHED), ("position_matched", 0.0)):
        some = of.length_matched(own, slack)
        enough = len(some.pairs) >= FEWEST_PAIRS
        nothing = np.full(len(p), np.nan)
        columns[name] = of.observed(some, recipe) if enough else nothing
        columns[f"{name}_p"] = of.holm(of.permutation_p(some, recipe)) if enough else nothing
        columns[f"{name}_pairs"] = np.full(len(p), len(some.pairs))
    columns["after_another"] = of.observed(other, recipe)
    change = of.resampled(own, recipe, own.pairs) - of.resampled(other, recipe, own.pairs)
    columns["own_minus_another"] = columns["deviation"] - columns["after_another"]
    columns["own_minus_another_low"], columns["own_minus_another_high"] = bootstrap_interval(change)
    columns["depth_correlation"] = np.full(len(p), depth_correlation(columns["eavss_contrast"].tolist()))
    columns["stands"] = _stands(columns)
    return pa.table({name: pa.array(values, from_pandas=True) for name, values in columns.items()})


def _stands(columns: Mapping[str, Any]) -> np.ndarray:
    """Which layers differ whatever control is asked: labels, lengths, noise, and the prompt."""
    found, matched = columns["deviation"], columns["length_matched"]
    with np.errstate(invalid="ignore"):
        by_label = (columns["p_holm"] < LEVEL) & (np.abs(found) > columns["noise_floor"])
        by_length = (columns["length_matched_p"] < LEVEL) & (np.sign(found) == np.sign(matched))
        low, high = columns["own_minus_another_low"], columns["own_minus_another_high"]
        by_prompt = np.where(found > 0, low > 0, high < 0)
    return np.asarray(by_label & by_length & by_prompt)


def _likelihood(
    warehouse: Warehouse, run: Mapping[str, Any], rows: pa.Table, labels: tuple[str, str]
) -> Float64 | None:
    """The mean log-likelihood of each answer, where the loss on the same rows was evaluated; else None."""
    where = (pc.field("task") == f"{PERPLEXITY}{run['corpus']}") & (pc.field("revision") == run["revision"])
    cells = [c for c in warehouse.table("cells", where=where).to_pylist() if not c["drop"] and c["patch"] is None]
    layer = rows.filter(pc.equal(rows["layer"], rows["layer"][0]))
    tokens, strata = (layer[name].to_pylist() for name in ("answer_tokens", "stratum"))
    for run_id in dict.fromkeys(cell["run_id"] for cell in cells):
        mine = [cell for cell in cells if cell["run_id"] == run_id]
        for result in combine(mine, len({cell["part"] for cell in mine})):
            if result.metric == "loss" and result.weights.tolist() == tokens:
                return np.array(
                    [-s / w for s, w, of_ in zip(result.samples, result.weights, strata, strict=True) if of_ in labels]
                )
    return None


def _predictions(a: of.Answers, other: of.Answers, likelihood: Float64 | None) -> pa.Table:
    """AUROC of one-dimensional classifiers on layers and on what needs no layer, by folds of pairs."""
    features, elsewhere = _features(a), _features(other)
    weights = bootstrap_weights(len(a.pairs))[:, np.searchsorted(a.pairs, a.pair)]
    baselines = {"length": a.tokens.astype(np.float64), "log_likelihood": likelihood}
    made: list[tuple[int | None, str, float, Float64]] = []
    for name, values in baselines.items():
        if values is not None and len(values) == len(a.pair):
            made.append((None, name, *_auroc(a, values, weights)))
    for name, grid in features.items():
        if np.isfinite(grid).all():
            made += [(layer, name, *_auroc(a, column, weights)) for layer, column in enumerate(grid.T)]
    number = sum(layer is not None for layer, *_ in made)
    best = max((one for one in made if one[0] is None), key=lambda one: one[2])
    rows = []
    for layer, name, value, resamples in made:
        low, high = bootstrap_interval(resamples)
        gain = value - best[2]
        beats = layer is not None and of.corrected_lower(gain, resamples - best[3], number) > 0
        row = {"layer": layer, "statistic": name, "auroc": value, "auroc_low": low, "auroc_high": high}
        row["after_another"] = None if layer is None else _auroc_of(other, elsewhere[name][:, layer])
        rows.append(row | {"gain": gain if layer is not None else None, "beats_baselines": beats})
    return pa.Table.from_pylist(rows)


def _features(a: of.Answers) -> dict[str, Float64]:
    """What an answer's own statistics tell of it, float64[rows, layers]."""
    with np.errstate(invalid="ignore", divide="ignore"):
        variance, sparsity = a.m2 / a.count, a.near_zero / a.count
    return {"variance": variance, "sparsity": sparsity, "norm": a.norm, "relative_magnitude": a.relative_magnitude}


def _auroc(a: of.Answers, values: Float64, weights: Float64) -> tuple[float, Float64]:
    scores = of.out_of_fold(a, values)
    return of.auroc(scores, a.hallucinated, np.ones((1, len(scores)))).item(), of.auroc(scores, a.hallucinated, weights)


def _auroc_of(a: of.Answers, values: Float64) -> float:
    return of.auroc(of.out_of_fold(a, values), a.hallucinated, np.ones((1, len(values)))).item()


def _findings(layers: pa.Table, predictions: pa.Table) -> list[str]:
    rows, said = layers.to_pylist(), predictions.to_pylist()
    return [*_about_layers(rows), *_about_prediction(said)]


def _about_layers(rows: list[dict[str, Any]]) -> list[str]:
    differ = [row for row in rows if row["p_holm"] is not None and row["p_holm"] < LEVEL]
    none = "No layer differs between hallucinated and truthful answers more than with labels exchanged inside pairs."
    words = _about_differences(differ) if differ else [none]
    words.append(f"Left after every control: {_listed([row['layer'] for row in rows if row['stands']])}.")
    rho = rows[0]["depth_correlation"]
    if rho is not None and abs(rho) > FOLLOWS_DEPTH:
        words.append(f"The contrast follows depth (Spearman {rho:.2f}), and says little more than a layer's number.")
    return words


def _about_differences(rows: list[dict[str, Any]]) -> list[str]:
    """Of layers that differ by label, which do by length and by prompt too."""
    number = rows[0]["length_matched_pairs"]
    matched = _listed([row["layer"] for row in rows if (row["length_matched_p"] or 1) < LEVEL])
    prompt = _listed([row["layer"] for row in rows if _excludes_zero(row)])
    differ = _listed([row["layer"] for row in rows])
    return [
        f"Layers that differ more than with labels exchanged inside pairs (Holm, {LEVEL:.0%}): {differ}.",
        f"With lengths matched ({number} pairs): {'too few pairs to tell' if number < FEWEST_PAIRS else matched}.",
        f"Otherwise than for the same answers after another prompt: {prompt}.",
    ]


def _about_prediction(rows: list[dict[str, Any]]) -> list[str]:
    best = max((row for row in rows if row["layer"] is None), key=lambda row: row["auroc"])
    top = max((row for row in rows if row["layer"] is not None), key=lambda row: row["auroc"])
    beating = sorted({row["layer"] for row in rows if row["beats_baselines"]})
    statistic, baseline = FEATURES[top["statistic"]], best["statistic"].replace("_", "-")
    words = [
        f"Prediction: the best of all layers ({top['layer']}, {statistic}) has AUROC {top['auroc']:.2f}, and "
        f"{top['after_another']:.2f} after another prompt; the best baseline ({baseline}) has {best['auroc']:.2f}.",
        f"Layers that beat the baselines: {_listed(beating)}.",
    ]
    if all(row["statistic"] != "log_likelihood" for row in rows):
        words.append("A baseline is missing, the answers' log-likelihood: evaluate perplexity on the same corpus.")
    return words


def _excludes_zero(row: Mapping[str, Any]) -> bool:
    low, high = row["own_minus_another_low"], row["own_minus_another_high"]
    return low is not None and (low > 0 if row["deviation"] > 0 else high < 0)


def _listed(layers: list[int]) -> str:
    return ", ".join(map(str, layers)) or "none"
