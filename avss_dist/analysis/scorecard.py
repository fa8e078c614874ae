"""Score card of a model: agreement of each score with the ground truth, and retention without the layers it selects.

For every score, recipe, site and threshold in the warehouse: Spearman's correlation with the loss without each layer,
with the Shapley value and with the first-order estimate, as `avss ablate` measured them; and the retention without the
lowest 10%, 25% and 33% of layers, if that set of layers was evaluated. The correlation with the loss comes with its
ceiling (the correlation that the same measurement on other text would reach), the share of pairs of layers in the wrong
order, and the correlation of the summed score of a set with the loss without the set. One control is included: the
position of a layer, counted from the end.

For every number format whose effect is measured, the same scores, the measured effects of other formats, and the
estimates of `tasks.rounding.RoundingDamage` are correlated with the loss with the weights of each layer rounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from avss_dist.analysis.reliability import increases, misranked, reliability, sets_correlation
from avss_dist.core.errors import QueryError
from avss_dist.core.intervention import Removals, decode_removals, whole_layers
from avss_dist.core.names import LOSS, PERPLEXITY
from avss_dist.core.registry import BASELINES, DAMAGE_TASK, GROUND_TRUTH, MEASURED, ROUNDING_ESTIMATES, SCORES
from avss_dist.core.text import describe_threshold
from avss_dist.pruning.ground_truth import (
    LayerTruth,
    find_layer_truth,
    nothing_measured,
    rounded_truths,
    rounding_estimates,
)
from avss_dist.pruning.selection import LAST, PUBLISHED, Choice, PlanError, Reading, reading_of
from avss_dist.stats.layer_stats import Float64
from avss_dist.stats.rankings import spearman
from avss_dist.warehouse.reader import Warehouse

SHARES = (0.1, 0.25, 0.33)
_PLACE = ("site", "recipe", "threshold", "threshold_kind")
SPEARMAN = {name: f"spearman_{name}" for name in GROUND_TRUTH}
RETENTION = {share: f"retention_{share * 100:.0f}" for share in SHARES}
_TEXTS = ("run_id", "model", "score", "site", "recipe", "threshold_kind", "task", "format")
_OF_LOSS = ("ceiling", "share_of_ceiling", "misranked", "spearman_sets", "sets")
_OTHER_TYPES = {"sets": pa.int64(), "same_text": pa.bool_()}
MEASURED_ROUNDED = "rounded:"  # before a number format: the score that is the measured effect of another format
LEFT_OUT = "left_out:"  # before a measurement or estimate of layers that are left out, among those of rounded weights
SCHEMA = pa.schema(
    [
        (name, pa.string() if name in _TEXTS else _OTHER_TYPES.get(name, pa.float64()))
        for name in (
            *("run_id", "model", "score", *_PLACE, *SPEARMAN.values(), *_OF_LOSS, *RETENTION.values(), "task"),
            *("format", "same_text"),
        )
    ]
)


def score_cards(store: Warehouse, runs: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Return one row for each score and reading, of the runs whose ground truth is measured.

    Rows with a ``format`` compare with the loss with rounded weights, in the column of the loss; others with the loss
    without layers.

    Args:
        runs: rows of ``runs``.

    Raises:
        QueryError: if no run has a measured ground truth. The message has the command that measures it.
    """
    rows: list[dict[str, Any]] = []
    missing: QueryError | None = None
    for run in runs:
        truths = {name: truth for name in MEASURED if (truth := find_layer_truth(store, run, name))}
        rounded = rounded_truths(store, run)
        if truths.keys() & GROUND_TRUTH:
            rows += _cards(store, run, truths)
        rows += _rounding_cards(store, run, truths, rounded)
        if not truths.keys() & GROUND_TRUTH and not rounded:
            missing = missing or nothing_measured(store, run, LOSS)
    if not rows and missing:
        raise missing
    return pa.Table.from_pylist(rows, SCHEMA)


@dataclass(frozen=True)
class _GroundTruth:
    """Ground truth of a run's model.

    Attributes:
        truth: float64[layers] by one of ``registry.MEASURED``.
        ceiling: `reliability` of the loss without each layer.
        rises: rise of the loss in nats per token without a set of layers, on the text of ``task``.
        task: task of ``rises``, or None if no set of layers was evaluated.
    """

    truth: Mapping[str, Float64]
    ceiling: float
    rises: Mapping[tuple[int, ...], float]
    task: str | None

    def compare(self, choice: Choice, values: Float64) -> dict[str, Any]:
        """Return the columns of a score card for a score, float64[layers]."""
        sets = {drop: rise for drop, rise in self.rises.items() if len(drop) > 1}
        card: dict[str, Any] = {"sets": len(sets), "spearman_sets": _finite(sets_correlation(values, sets))}
        for name, column in SPEARMAN.items():
            card[column] = _finite(spearman(values, self.truth[name])) if name in self.truth else None
        if LOSS in self.truth and choice.by != LOSS:
            reached = spearman(values, self.truth[LOSS]) / self.ceiling
            card |= {"ceiling": _finite(self.ceiling), "share_of_ceiling": _finite(reached)}
            card["misranked"] = misranked(values, self.truth[LOSS])
        for share, column in RETENTION.items():
            with suppress(PlanError):  # a layer without a score
                rise = self.rises.get(replace(choice, share=share).drop(values))
                card[column] = None if rise is None else float(np.exp(-rise))
        return card


def _cards(store: Warehouse, run: Mapping[str, Any], truths: Mapping[str, LayerTruth]) -> Iterator[dict[str, Any]]:
    scored = store.table("scores", run_ids=[run["run_id"]]).to_pylist()
    truth = {name: one.by_layer(run["num_layers"]) for name, one in truths.items()}
    ceiling = reliability(increases(store, truths[LOSS])) if LOSS in truths else np.nan
    known = _GroundTruth(truth, ceiling, *_rises(store, run))
    for choice, values in _scores(scored, truth):
        yield _identity(run, choice) | {"task": known.task} | known.compare(choice, values)


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
            reached = spearman(values, measured)
            yield identity | {
                "format": name,
                "same_text": same.get(identity["score"]),
                SPEARMAN[LOSS]: _finite(reached),
                "ceiling": _finite(ceiling),
                "share_of_ceiling": _finite(reached / ceiling),
                "misranked": misranked(values, measured),
                "sets": 0,
            }


def _rounding_name(score: str) -> str:
    """Return the name of a score among estimates for rounded weights, of which some have the same name."""
    return f"{LEFT_OUT}{score}" if SCORES[score].task in (SCORES[LOSS].task, DAMAGE_TASK) else score


def _finite(rho: float) -> float | None:
    return None if np.isnan(rho) else rho


def _rises(store: Warehouse, run: Mapping[str, Any]) -> tuple[dict[tuple[int, ...], float], str | None]:
    """Return the rise of the loss without each set of layers, in nats per token, and the task with the most sets."""
    where = (pc.field("revision") == run["revision"]) & (pc.field("metric") == LOSS)
    where &= pc.field("patch").is_null() & pc.field("sparsity_plan").is_null() & pc.field("factor").is_null()
    where &= pc.field("rounding").is_null()
    where &= pc.starts_with(pc.field("task"), PERPLEXITY)
    losses: dict[tuple[str, str], dict[Removals, float]] = {}
    for row in store.table("evaluations", where=where).to_pylist():
        losses.setdefault((row["run_id"], row["task"]), {})[decode_removals(row["drop"])] = row["value"]
    for (_, task), by_set in sorted(losses.items(), key=lambda item: -len(item[1])):
        if () in by_set:
            return {whole_layers(r): loss - by_set[()] for r, loss in by_set.items() if whole_layers(r) == r}, task
    return {}, None


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
        return SCORES[name].title
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
