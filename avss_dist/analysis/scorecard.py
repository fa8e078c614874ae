"""Score card of a model: agreement of each score with the ground truth.

For every score, recipe, site and threshold in the warehouse: Spearman's correlation with the loss without each layer,
with the Shapley value and with the first-order estimate, as `avss ablate` measured them. The correlation with the loss
comes with its ceiling (the correlation that the same measurement on other text would reach), and the share of pairs of
layers in the wrong order. One control is included: the position of a layer, counted from the end.

For every number format whose effect is measured, the same scores, the measured effects of other formats, and the
estimates of `tasks.rounding.RoundingDamage` are correlated with the loss with the weights of each layer rounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from avss_dist.analysis.own_scores import own_scores
from avss_dist.analysis.reliability import increases, misranked, reliability
from avss_dist.core.errors import QueryError
from avss_dist.core.names import LOSS
from avss_dist.core.registry import BASELINES, DAMAGE_TASK, GROUND_TRUTH, MEASURED, ROUNDING_ESTIMATES, SCORES
from avss_dist.core.text import describe_threshold
from avss_dist.pruning.ground_truth import (
    LayerTruth,
    find_layer_truth,
    nothing_measured,
    rounded_truths,
    rounding_estimates,
)
from avss_dist.pruning.selection import LAST, PUBLISHED, Choice, Reading, reading_of
from avss_dist.stats.layer_stats import Float64
from avss_dist.stats.rankings import spearman
from avss_dist.warehouse.reader import Warehouse

_PLACE = ("site", "recipe", "threshold", "threshold_kind")
SPEARMAN = {name: f"spearman_{name}" for name in GROUND_TRUTH}
_TEXTS = ("run_id", "model", "score", "site", "recipe", "threshold_kind", "format")
_OF_LOSS = ("ceiling", "share_of_ceiling", "misranked")
MEASURED_ROUNDED = "rounded:"  # before a number format: the score that is the measured effect of another format
LEFT_OUT = "left_out:"  # before a measurement or estimate of layers that are left out, among those of rounded weights
SCHEMA = pa.schema(
    [
        *(
            (name, pa.string() if name in _TEXTS else pa.float64())
            for name in ("run_id", "model", "score", *_PLACE, *SPEARMAN.values(), *_OF_LOSS, "format")
        ),
        ("same_text", pa.bool_()),
    ]
)


def score_cards(store: Warehouse, runs: Sequence[Mapping[str, Any]], own: Sequence[str] = ()) -> pa.Table:
    """Return one row for each score and reading, of the runs whose ground truth is measured.

    Rows with a ``format`` compare with the loss with rounded weights, in the column of the loss; others with the loss
    without layers.

    Args:
        runs: rows of ``runs``.
        own: names of scores that people bring, see `own_scores`.

    Raises:
        QueryError: if no run has a measured ground truth. The message has the command that measures it.
    """
    rows: list[dict[str, Any]] = []
    missing: QueryError | None = None
    for run in runs:
        truths = {name: truth for name in MEASURED if (truth := find_layer_truth(store, run, name))}
        rounded = rounded_truths(store, run)
        if truths.keys() & GROUND_TRUTH:
            rows += _cards(store, run, truths, own)
        rows += _rounding_cards(store, run, truths, rounded)
        if not truths.keys() & GROUND_TRUTH and not rounded:
            missing = missing or nothing_measured(store, run, LOSS)
    if not rows and missing:
        raise missing
    return pa.Table.from_pylist(rows, SCHEMA)


def _cards(
    store: Warehouse, run: Mapping[str, Any], truths: Mapping[str, LayerTruth], own: Sequence[str]
) -> Iterator[dict[str, Any]]:
    scored = store.table("scores", run_ids=[run["run_id"]]).to_pylist()
    number = run["num_layers"]
    truth = {name: one.by_layer(number) for name, one in truths.items()}
    for name in own:
        truth[name] = LayerTruth(values=own_scores(name, store, run), run_id="", task="").by_layer(number)
    ceiling = reliability(increases(store, truths[LOSS])) if LOSS in truths else np.nan
    for choice, values in _scores(scored, truth):
        card = _identity(run, choice)
        card |= {SPEARMAN[name]: _finite(spearman(values, truth[name])) for name in SPEARMAN.keys() & truth.keys()}
        yield card | (_agreement(values, truth[LOSS], ceiling) if LOSS in truth and choice.by != LOSS else {})


def _agreement(values: Float64, measured: Float64, ceiling: float) -> dict[str, Any]:
    """Return the columns of a score, float64[layers], that is compared with a measured loss."""
    reached = spearman(values, measured) / ceiling
    return {
        "ceiling": _finite(ceiling),
        "share_of_ceiling": _finite(reached),
        "misranked": misranked(values, measured),
    }


def _scores(scored: Sequence[Mapping[str, Any]], truth: Mapping[str, Float64]) -> Iterator[tuple[Choice, Float64]]:
    """Yield every reading of AVSS, other scores, measurements and a control, each with float64[layers].

    Args:
        scored: rows of ``scores`` of a run.
        truth: measurements of its layers, by name.
    """
    by_reading: dict[Reading, list[Mapping[str, Any]]] = {}
    for row in scored:
        by_reading.setdefault(reading_of(row), []).append(row)
    of_avss = [(Choice(by="avss", reading=reading), rows) for reading, rows in by_reading.items()]
    others = [(Choice(by=name), scored) for name in (*BASELINES, *truth, LAST)]
    for choice, rows in (*of_avss, *others):
        yield choice, choice.scores(rows, truth)


def _identity(run: Mapping[str, Any], choice: Choice) -> dict[str, Any]:
    place = dict(zip(_PLACE, choice.reading, strict=True)) if choice.reading else {}
    return {"run_id": run["run_id"], "model": run["model"], "score": choice.by, **place}


def _rounding_cards(
    store: Warehouse,
    run: Mapping[str, Any],
    truths: Mapping[str, LayerTruth],
    rounded: Mapping[str, LayerTruth],
) -> Iterator[dict[str, Any]]:
    """Yield the score cards of a run for the loss with rounded weights, format by format.

    Args:
        truths: measurements of layers that are left out, by name.
        rounded: measurements of layers that are rounded, by number format.
    """
    if not rounded:
        return
    number = run["num_layers"]
    scored = store.table("scores", run_ids=[run["run_id"]]).to_pylist()
    scores = [*_scores(scored, {name: one.by_layer(number) for name, one in truths.items()})]
    for name, truth in sorted(rounded.items()):
        measured, ceiling = truth.by_layer(number), reliability(increases(store, truth))
        estimates = rounding_estimates(store, run, truth)
        others = {f"{MEASURED_ROUNDED}{other}": known for other, known in rounded.items() if other != name}
        named = {score: known.by_layer(number) for score, known in (estimates | others).items()}
        same = {score: known.text == truth.text for score, known in (estimates | others).items()}
        cards = [(_identity(run, choice) | {"score": _rounding_name(choice.by)}, values) for choice, values in scores]
        cards += [({"run_id": run["run_id"], "model": run["model"], "score": n}, values) for n, values in named.items()]
        for identity, values in cards:
            card: dict[str, Any] = {"format": name, "same_text": same.get(identity["score"])}
            card[SPEARMAN[LOSS]] = _finite(spearman(values, measured))
            yield identity | card | _agreement(values, measured, ceiling)


def _rounding_name(score: str) -> str:
    """Return the name of a score among estimates for rounded weights, of which some have the same name."""
    return f"{LEFT_OUT}{score}" if SCORES[score].task in (SCORES[LOSS].task, DAMAGE_TASK) else score


def _finite(rho: float) -> float | None:
    return None if np.isnan(rho) else rho


def describe_score(card: Mapping[str, Any]) -> str:
    """Return the title of a row's score. For AVSS, it contains the reading."""
    name: str = card["score"]
    if name.startswith(MEASURED_ROUNDED):
        return f"loss, rounded to {name.removeprefix(MEASURED_ROUNDED)}"
    if name.startswith(LEFT_OUT):
        return f"{SCORES[name.removeprefix(LEFT_OUT)].title}, without the layer"
    if card["format"] and name in ROUNDING_ESTIMATES:
        return ROUNDING_ESTIMATES[name].title
    if name != "avss":
        return SCORES[name].title if name in SCORES else name
    threshold = describe_threshold(card["threshold"], card["threshold_kind"])
    return f"avss  {card['site']} / {card['recipe']} / {threshold}"


def is_published(card: Mapping[str, Any]) -> bool:
    """Whether a row has the published reading of AVSS."""
    return tuple(card[name] for name in _PLACE) == PUBLISHED


def best_readings(cards: pa.Table) -> pa.Table:
    """Return score cards without the readings of AVSS that are neither the published one nor the best of their site."""
    rows = cards.to_pylist()
    order = SPEARMAN["loss"] if any(row[SPEARMAN["loss"]] is not None for row in rows) else SPEARMAN["shapley"]
    best: dict[tuple[str, ...], tuple[float, int]] = {}
    for i, row in enumerate(rows):
        if row["score"] == "avss" and row[order] is not None:
            key = row["run_id"], row["site"], row["format"]
            best[key] = max(best.get(key, (-2.0, -1)), (row[order], -i))
    chosen = {-i for _, i in best.values()}
    keep = [i for i, row in enumerate(rows) if row["score"] != "avss" or i in chosen or is_published(row)]
    return cards.take(pa.array(keep, pa.int64()))
