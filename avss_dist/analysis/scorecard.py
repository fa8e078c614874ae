"""Score card of a model: agreement of each score with the ground truth.

For every score, recipe, site and threshold in the warehouse: Spearman's correlation with the loss without each layer,
with the Shapley value and with the first-order estimate, as `avss ablate` measured them. The correlation with the loss
comes with its ceiling (the correlation that the same measurement on other text would reach), and the share of pairs of
layers in the wrong order. One control is included: the position of a layer, counted from the end.

For every number format whose effect is measured, the same scores, the measured effects of other formats, and the
estimates of `tasks.map_damage.RoundingDamage` are correlated with the loss with the weights of each layer rounded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
import pyarrow.parquet as pq

from avss_dist.core.errors import QueryError, require_known
from avss_dist.core.intervention import InterventionKey
from avss_dist.core.names import LOSS
from avss_dist.core.registry import (
    BASELINES,
    DAMAGE_TASK,
    GROUND_TRUTH,
    MEASURED,
    OWN_VALUES,
    READING,
    ROUNDING_ESTIMATES,
    SCORES,
    score_functions,
)
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
from avss_dist.stats.rankings import count_lowest, spearman, spearman_interval
from avss_dist.warehouse.reader import Warehouse

SPLITS, SEED = 200, 0  # of sequences into halves
SPEARMAN = {name: f"spearman_{name}" for name in GROUND_TRUTH}
_TEXTS = ("run_id", "model", "score", "site", "recipe", "threshold_kind", "format")
_OF_LOSS = ("ceiling", "share_of_ceiling", "misranked")
MEASURED_ROUNDED = "rounded:"  # before a number format: the score that is the measured effect of another format
LEFT_OUT = "left_out:"  # before a measurement or estimate of layers that are left out, among those of rounded weights
SCHEMA = pa.schema(
    [
        *(
            (name, pa.string() if name in _TEXTS else pa.float64())
            for name in ("run_id", "model", "score", *READING, *SPEARMAN.values(), *_OF_LOSS, "format")
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
        own: names of scores that people bring, see `own_score`.

    Raises:
        QueryError: if no run has a measured ground truth. The message has the command that measures it.
    """
    rows: list[dict[str, Any]] = []
    missing: QueryError | None = None
    for run in runs:
        truths = {name: truth for name in MEASURED if (truth := find_layer_truth(store, run, name))}
        rounded = rounded_truths(store, run)
        if not truths.keys() & GROUND_TRUTH and not rounded:
            missing = missing or nothing_measured(store, run, LOSS)
            continue
        scored = store.table("scores", run_ids=[run["run_id"]]).to_pylist()
        values = {name: truth.by_layer(run["num_layers"]) for name, truth in truths.items()}
        if truths.keys() & GROUND_TRUTH:
            for name in own:
                values[name] = own_score(name, store, run).by_layer(run["num_layers"])
            ceiling = reliability(increases(store, truths[LOSS])) if LOSS in truths else np.nan
            for choice, score in _scores(scored, values):
                card = _identity(run, choice)
                card |= {SPEARMAN[n]: _finite(spearman(score, values[n])) for n in SPEARMAN.keys() & values.keys()}
                compared = _agreement(score, values[LOSS], ceiling) if LOSS in values and choice.by != LOSS else {}
                rows.append(card | compared)
        if rounded:
            scores = _scores(scored, {name: values[name] for name in truths})
            rows += _rounding_cards(store, run, [*scores], rounded)
    if not rows and missing:
        raise missing
    return pa.Table.from_pylist(rows, SCHEMA)


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
    place = dict(zip(READING, choice.reading, strict=True)) if choice.reading else {}
    return {"run_id": run["run_id"], "model": run["model"], "score": choice.by, **place}


def _rounding_cards(
    store: Warehouse,
    run: Mapping[str, Any],
    scores: Sequence[tuple[Choice, Float64]],
    rounded: Mapping[str, LayerTruth],
) -> Iterator[dict[str, Any]]:
    """Yield the score cards of a run for the loss with rounded weights, format by format.

    Args:
        scores: see `_scores`. Measurements of layers that are left out may have the name of an estimate of rounding.
        rounded: measurements of layers that are rounded, by number format.
    """
    number = run["num_layers"]
    for name, truth in sorted(rounded.items()):
        measured, ceiling = truth.by_layer(number), reliability(increases(store, truth))
        others = {f"{MEASURED_ROUNDED}{other}": values for other, values in rounded.items() if other != name}
        beside = rounding_estimates(store, run, truth) | others
        same = {score: estimate.text == truth.text for score, estimate in beside.items()}
        cards: list[tuple[dict[str, Any], Float64]] = []
        for choice, values in scores:
            left_out = LEFT_OUT if SCORES[choice.by].task in (SCORES[LOSS].task, DAMAGE_TASK) else ""
            cards.append((_identity(run, choice) | {"score": f"{left_out}{choice.by}"}, values))
        for score, estimate in beside.items():
            identity = {"run_id": run["run_id"], "model": run["model"], "score": score}
            cards.append((identity, estimate.by_layer(number)))
        for card, values in cards:
            card |= {"format": name, "same_text": same.get(card["score"])}
            yield card | {SPEARMAN[LOSS]: _finite(spearman(values, measured))} | _agreement(values, measured, ceiling)


def _finite(rho: float) -> float | None:
    return None if np.isnan(rho) else rho


def describe_agreement(
    store: Warehouse, run: Mapping[str, Any], scores: Sequence[Mapping[str, Any]], own: Sequence[str] = ()
) -> Iterator[str]:
    """Yield a line on how well AVSS, and scores that people bring, find the measured loss without each layer.

    The line of AVSS says how stable its lowest layers are over the shards. There is no line without such a loss.

    Args:
        scores: rows of ``scores`` of the run at one reading of AVSS.
        own: columns of these rows that have scores which people bring.
    """
    if (truth := find_layer_truth(store, run, LOSS)) is None:
        return
    number = run["num_layers"] or 0
    lowest = [row for row in scores if (row["rank"] or np.inf) <= count_lowest(len(scores))]
    kept = float(np.mean(np.array([row["lowest_set_probability"] for row in lowest], np.float64))) if lowest else np.nan
    stable = f"; resampling the shards keeps {kept:.0%} of its lowest layers" if np.isfinite(kept) else ""
    for column in ("avss_smoothed", *own):
        score = _truth({row["layer"]: np.nan if row[column] is None else row[column] for row in scores})
        rho = spearman(score.by_layer(number), truth.by_layer(number))
        low, high = spearman_interval(rho, number)
        if np.isfinite(low):
            found = f"Spearman {rho:z.2f} with the loss without each layer (95% interval {low:z.2f} to {high:z.2f})"
            yield f"{column}: {found}." if column in own else f"Smoothed AVSS: {found}{stable}."


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
    return tuple(card[name] for name in READING) == PUBLISHED


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


def own_score(name: str, warehouse: Warehouse, run: Mapping[str, Any]) -> LayerTruth:
    """Return the values of a user's own score for the layers of a run, low for unimportant layers.

    Args:
        name: ``FILE.csv:COLUMN`` or ``FILE.parquet:COLUMN``, a table with a column ``layer``, of which the rows of this
            run or model count where it has a column ``run_id`` or ``model``; or the name of an entry point of the group
            `registry.SCORE_GROUP`: a function of the run's statistics, ``dict[LayerKey, LayerStats]``, that returns a
            mapping from layer to value.

    Raises:
        QueryError: the file or the column does not exist, or a layer has more than one value.
    """
    if name.startswith(OWN_VALUES):
        return _truth(json.loads(name.removeprefix(OWN_VALUES)))
    if name in (functions := score_functions()):
        return _truth(functions[name].load()(warehouse.read_layer_stats(run["run_id"])))
    file, _, column = name.rpartition(":")
    try:
        table = pq.read_table(file) if Path(file).suffix != ".csv" else csv.read_csv(file)
    except (OSError, pa.ArrowException) as error:
        expected = "Expected FILE.csv:COLUMN or FILE.parquet:COLUMN."
        raise QueryError(f"{file} cannot be read: {error}", expected) from error
    for required in ("layer", column):
        require_known(f"column of {file}", required, table.column_names, QueryError)
    for key in ("run_id", "model"):
        if key in table.column_names:
            table = table.filter(pc.equal(table[key], run[key]))
    layers = table["layer"].to_pylist()
    if len(set(layers)) < len(layers):
        raise QueryError(f"{file} has more than one row for a layer.", "Keep one, or name each row's run_id or model.")
    return _truth(dict(zip(layers, table[column].cast(pa.float64()).to_numpy(), strict=True)))


def _truth(values: Mapping[Any, float]) -> LayerTruth:
    return LayerTruth(values={int(layer): float(value) for layer, value in values.items()}, run_id="", task="")


def increases(store: Warehouse, truth: LayerTruth) -> Float64:
    """Return the rise of each sequence's loss by the truth's change of each layer, float64[sequences, layers], in nats.

    The array has no sequences if the warehouse lacks the cells of the evaluation.
    """
    where = (pc.field("run_id") == truth.run_id) & (pc.field("task") == truth.task) & (pc.field("metric") == LOSS)
    rows = store.table("cells", where=where).to_pylist()
    by_key: dict[InterventionKey, dict[int, list[float]]] = {}
    for row in rows:
        by_key.setdefault(InterventionKey.of_row(row), {})[row["part"]] = row["samples"]
    samples = {key: np.concatenate([parts[part] for part in sorted(parts)]) for key, parts in by_key.items()}
    layers, whole = sorted(truth.values), InterventionKey()
    if samples.keys() != {whole, *map(truth.key, layers)} or len({len(one) for one in samples.values()}) > 1:
        return np.zeros((0, len(layers)))
    return np.stack([samples[truth.key(layer)] - samples[whole] for layer in layers], axis=1)


def reliability(samples: Float64) -> float:
    """Return the expected correlation of a measurement with a second one on other text of the same size.

    This is Spearman's correlation of two random halves of the sequences, averaged over splits and extrapolated to the
    whole by the formula of Spearman and Brown (1910): ``2 r / (1 + r)``. The splits are seeded.

    Args:
        samples: float64[sequences, layers].

    Returns:
        The correlation. NaN for fewer than four sequences, or if the halves do not correlate positively.
    """
    number = len(samples)
    if number < 4:
        return np.nan
    rng = np.random.default_rng(SEED)
    correlations = []
    for _ in range(SPLITS):
        order = rng.permutation(number)
        half, other = samples[order[: number // 2]].sum(axis=0), samples[order[number // 2 :]].sum(axis=0)
        correlations.append(spearman(half, other))
    r = float(np.mean(correlations))
    return 2 * r / (1 + r) if r > 0 else np.nan


def misranked(score: Float64, truth: Float64) -> float | None:
    """Return the share of untied pairs of layers that a score puts in the opposite order, or None if all are tied.

    Args:
        score, truth: float64[layers]. Layers with NaN in either are left out.
    """
    both = np.isfinite(score) & np.isfinite(truth)
    x, y = score[both], truth[both]
    product = np.sign(np.subtract.outer(x, x)) * np.sign(np.subtract.outer(y, y))  # every pair twice
    ordered = int(np.count_nonzero(product))
    return int(np.count_nonzero(product < 0)) / ordered if ordered else None
