"""Score card of a model: agreement of each score with the ground truth.

For every score, recipe, site and threshold in the warehouse: Spearman's correlation with the loss without each layer,
with the Shapley value and with the first-order estimate, as `avss ablate` measured them. The correlation with the loss
comes with its ceiling (the correlation that the same measurement on other text would reach), and the share of pairs of
layers in the wrong order. One control is included: the position of a layer, counted from the end.

For every number format whose effect is measured, the same scores, the measured effects of other formats, and the
estimates of `tasks.map_damage.RoundingDamage` are correlated with the loss with the weights of each layer rounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from avss_dist.analysis.own_scores import own_labels, own_score
from avss_dist.analysis.section import (
    AMBER,
    BLUE,
    GRAY,
    VIOLET,
    Chart,
    ReportColumn,
    ReportRow,
    ReportTable,
    Row,
    Section,
    page_number,
)
from avss_dist.core.intervention import InterventionKey
from avss_dist.core.registry import (
    BASELINES,
    DAMAGE_TASK,
    FROM_ACTIVATIONS,
    GROUND_TRUTH,
    LOSS,
    MEASURED,
    READING,
    ROUNDING_ESTIMATES,
    SCORES,
)
from avss_dist.core.text import describe_threshold
from avss_dist.pruning.ground_truth import (
    LayerTruth,
    find_layer_truth,
    nothing_measured,
    rounded_truths,
    rounding_estimates,
)
from avss_dist.pruning.selection import LAST, PUBLISHED, Choice, reading_of
from avss_dist.stats.layer_stats import Float64
from avss_dist.stats.rankings import count_lowest, spearman, spearman_interval, spearman_rows
from avss_dist.warehouse.reader import Warehouse, grouped
from avss_dist.warehouse.schema import columns_of

SPLITS, SEED = 200, 0  # of sequences into halves
GOOD = 0.7  # a correlation that stands out
SCORED, ABLATED, OWN, CONTROL = "from the scoring pass", "from passes of avss ablate", "of your own", "a control"
KINDS = {SCORED: BLUE, ABLATED: AMBER, OWN: VIOLET, CONTROL: GRAY}
"""Colors of scores in a chart, by where they come from."""
TRUTHS = {"loss": "the loss without each layer", "shapley": "the Shapley value", "taylor": "the first-order estimate"}
SPEARMAN = {name: f"spearman_{name}" for name in GROUND_TRUTH}
MEASURED_ROUNDED = "rounded:"  # before a number format: the score that is the measured effect of another format
LEFT_OUT = "left_out:"  # before a measurement or estimate of layers that are left out, among those of rounded weights
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("run_id", "model", "score", "site", "recipe")),
        ("threshold", pa.float64()),
        ("threshold_kind", pa.string()),
        *((name, pa.float64()) for name in (*SPEARMAN.values(), "ceiling", "share_of_ceiling", "misranked")),
        ("format", pa.string()),
        ("same_text", pa.bool_()),
    ]
)


def _correlation_style(rho: float) -> str:
    return "bold" if rho > GOOD else ""


_CORRELATION = "{:z.2f}".format
_SHARE = "{:z.1%}".format
_CARD_COLUMNS = (
    ReportColumn("with loss", SPEARMAN["loss"], _CORRELATION, style=_correlation_style),
    ReportColumn("with shapley", SPEARMAN["shapley"], _CORRELATION, style=_correlation_style, priority=1),
    ReportColumn("with taylor", SPEARMAN["taylor"], _CORRELATION, style=_correlation_style, priority=2),
    ReportColumn("of the ceiling", "share_of_ceiling", _SHARE, priority=1),
    ReportColumn("misranked", "misranked", _SHARE, priority=3),
)
"""Columns of a score card. A table has those in which a score has a value."""


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
    for run in runs:
        truths = {name: truth for name in MEASURED if (truth := find_layer_truth(store, run, name))}
        rounded = rounded_truths(store, run)
        if not truths.keys() & GROUND_TRUTH and not rounded:
            continue
        about = {"run_id": run["run_id"], "model": run["model"]}
        scored = store.table("scores", run_ids=[run["run_id"]]).to_pylist()
        values = {name: truth.by_layer(run["num_layers"]) for name, truth in truths.items()}
        left_out = [*_scores(scored, values)] if rounded else []
        if truths.keys() & GROUND_TRUTH:
            for name, label in own_labels(own).items():
                values[label] = own_score(name, store, run).by_layer(run["num_layers"])
            ceiling = reliability(increases(store, truths[LOSS])) if LOSS in truths else np.nan
            for card, score in _scores(scored, values):
                agreement = _agreement(score, values[LOSS], ceiling) if LOSS in values and card["score"] != LOSS else {}
                correlations = {SPEARMAN[n]: spearman(score, values[n]) for n in SPEARMAN.keys() & values.keys()}
                rows.append(about | card | agreement | correlations)
        rows += (about | card for card in _rounding_cards(store, run, left_out, rounded))
    if runs and not rows:
        raise nothing_measured(store, runs[0], LOSS)
    return pa.table(columns_of(rows, SCHEMA), SCHEMA)


def _agreement(values: Float64, measured: Float64, ceiling: float) -> dict[str, Any]:
    """Return the columns of a score, float64[layers], that is compared with a measured loss."""
    rho = spearman(values, measured)
    return {
        SPEARMAN[LOSS]: rho,
        "ceiling": ceiling,
        "share_of_ceiling": rho / ceiling,
        "misranked": misranked(values, measured),
    }


def _scores(
    scored: Sequence[Mapping[str, Any]], truth: Mapping[str, Float64]
) -> Iterator[tuple[dict[str, Any], Float64]]:
    """Yield every reading of AVSS, other scores, measurements and a control: columns of a card, and float64[layers].

    Args:
        scored: rows of ``scores`` of a run; none if they are damaged. Then its measurements remain.
        truth: measurements of its layers, by name.
    """
    of_avss = [(Choice(by="avss", reading=reading), rows) for reading, rows in grouped(scored, reading_of).items()]
    names = (*BASELINES, *truth, LAST) if scored else tuple(truth)
    of_layers = [(Choice(by=name), scored) for name in names]
    for choice, rows in (*of_avss, *of_layers):
        place = dict(zip(READING, choice.reading, strict=True)) if choice.reading else {}
        yield {"score": choice.by, **place}, choice.scores(rows, truth)


def _rounding_cards(
    store: Warehouse,
    run: Mapping[str, Any],
    scores: Sequence[tuple[Mapping[str, Any], Float64]],
    rounded: Mapping[str, LayerTruth],
) -> Iterator[dict[str, Any]]:
    """Yield the score cards of a run for the loss with rounded weights, format by format.

    Args:
        scores: see `_scores`. Measurements of layers that are left out may have the name of an estimate of rounding.
        rounded: measurements of layers that are rounded, by number format.
    """
    for name, truth in sorted(rounded.items()):
        measured, ceiling = truth.by_layer(run["num_layers"]), reliability(increases(store, truth))
        beside = rounding_estimates(store, run, truth) | {
            f"{MEASURED_ROUNDED}{other}": values for other, values in rounded.items() if other != name
        }
        for card, values in scores:
            removes = SCORES[card["score"]].task in (SCORES[LOSS].task, DAMAGE_TASK)
            score = f"{LEFT_OUT if removes else ''}{card['score']}"
            yield {**card, "score": score, "format": name, **_agreement(values, measured, ceiling)}
        for score, estimate in beside.items():
            agreement = _agreement(estimate.by_layer(run["num_layers"]), measured, ceiling)
            yield {"score": score, "format": name, "same_text": estimate.text == truth.text, **agreement}


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
    stability = float(np.mean(np.array([row["lowest_set_probability"] for row in lowest] or [None], np.float64)))
    stable = f"; resampling the shards keeps {stability:.0%} of its lowest layers" if np.isfinite(stability) else ""
    for column in ("avss_smoothed", *own):
        by_layer = {row["layer"]: np.nan if row[column] is None else row[column] for row in scores}
        values = np.array([by_layer.get(layer, np.nan) for layer in range(number)], np.float64)
        rho = spearman(values, truth.by_layer(number))
        low, high = spearman_interval(rho, number)
        if np.isfinite(low):
            text = f"Spearman {rho:z.2f} with the loss without each layer (95% interval {low:z.2f} to {high:z.2f})"
            yield f"{column}: {text}." if column in own else f"Smoothed AVSS: {text}{stable}."


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
    scored = [i for i, row in enumerate(rows) if row["score"] == "avss" and row[order] is not None]
    readings = grouped(scored, lambda i: (rows[i]["run_id"], rows[i]["site"], rows[i]["format"])).values()
    best = {max(places, key=lambda i: float(rows[i][order])) for places in readings}
    keep = [i for i, row in enumerate(rows) if row["score"] != "avss" or i in best or is_published(row)]
    return cards.take(pa.array(keep, pa.int64()))


def increases(store: Warehouse, truth: LayerTruth) -> Float64:
    """Return the rise of each sequence's loss by the truth's change of each layer, float64[sequences, layers], in nats.

    The array has no sequences if the warehouse lacks the cells of the evaluation.
    """
    where = (pc.field("run_id") == truth.run_id) & (pc.field("task") == truth.task) & (pc.field("metric") == LOSS)
    parts = grouped(store.table("cells", where=where).sort_by("part").to_pylist(), InterventionKey.of_row)
    samples = {key: np.concatenate([row["samples"] for row in rows]) for key, rows in parts.items()}
    layers, whole = sorted(truth.values), InterventionKey()
    if samples.keys() != {whole, *map(truth.key, layers)} or len({len(values) for values in samples.values()}) > 1:
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
    halves = (np.split(samples[rng.permutation(number)], [number // 2]) for _ in range(SPLITS))
    sums = np.array([[half.sum(axis=0) for half in both] for both in halves])
    r = float(np.mean(spearman_rows(sums[:, 0], sums[:, 1])))
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


def scorecard_sections(cards: pa.Table) -> list[Section]:
    """Return the score card of each run, and that of each number format that its weights were rounded to.

    Args:
        cards: as `score_cards` returns them.
    """
    by_format = grouped(cards.to_pylist(), itemgetter("run_id", "model", "format"))
    return [
        Section(
            label=f"{model}  ({run_id}){f', weights rounded to {name}' if name else ''}",
            tables=[_table("scorecard", rows)],
        )
        for (run_id, model, name), rows in by_format.items()
    ]


def page_section(label: str, cards: Sequence[Row], layers: int, readings: int) -> Section | None:
    """Return the score card of one run with a chart and a sentence, or None if no score has a correlation.

    Args:
        layers: number of layers.
        readings: number of the readings of AVSS, of which ``cards`` has the best.
    """
    truth = next((name for name in TRUTHS if any(row[SPEARMAN[name]] is not None for row in cards)), "")
    column = SPEARMAN.get(truth, "")
    compared = [row for row in cards if row["score"] != truth and row.get(column) is not None]
    if not compared:
        return None
    compared.sort(key=lambda row: -float(row[column]))
    name, best = f"scorecard-{page_number(label)}", compared[0]
    ceiling = ""
    if best["ceiling"] is not None:
        ceiling = f" of at most {best['ceiling']:z.2f}, which the same measurement on other text would reach"
    references = [row for row in compared if is_published(row) or row["score"] == LAST]
    sentences = (
        f"Closest to {TRUTHS[truth]}: {_name(best)}, {best[column]:z.2f}{ceiling}.",
        *(f"{_name(row) if is_published(row) else 'The place alone'}: {row[column]:z.2f}." for row in references),
        f"Of {readings} readings of AVSS, the best of each site is shown; on other text, expect less of it.",
    )
    drawn = [
        {
            "score": _name(row),
            "kind": _kind(row["score"]),
            "correlation": row[column],
            "ceiling": row["ceiling"],
            **dict(zip(("low", "high"), spearman_interval(row[column], layers), strict=True)),
        }
        for row in compared
    ]
    return Section(
        label=label,
        sentences=[" ".join(sentences)],
        charts=[
            Chart(
                name=name,
                title=f"Correlation with {TRUTHS[truth]}",
                meaning="The correlation of each score with what leaving layers out does, and its 95% interval.",
                rows=drawn,
                draw=partial(_drawing, drawn),
            )
        ],
        tables=[_table(name, cards)],
    )


def _table(name: str, cards: Sequence[Row]) -> ReportTable:
    """Return the table of the scores of one run, the best first, with the columns that have a value."""
    columns = [ReportColumn("score", "title", number=False)]
    for column in _CARD_COLUMNS:
        if any(card[column.key] is not None for card in cards):
            columns.append(column)
    if len(columns) > 1:
        first_key = columns[1].key
        cards = sorted(cards, key=lambda card: -2.0 if card[first_key] is None else card[first_key], reverse=True)
    rows = [ReportRow({**card, "title": describe_score(card)}) for card in cards]
    return ReportTable(name=name, title="Each score", columns=columns, rows=rows, caption=_caption(cards))


def _caption(cards: Sequence[Row]) -> str:
    """Return the explanation of the table of the scores of one run."""
    change = "leaving them out"
    if cards[0]["format"]:
        change = f"rounding their weights to {cards[0]['format']}"
    caption = f"Spearman's correlation of each score, over layers, with what {change} does."
    ceiling = next((card["ceiling"] for card in cards if card["ceiling"] is not None), None)
    if ceiling:
        caption += (
            f" Its ceiling, which the loss of other text of the same size would reach: {ceiling:z.2f}. "
            "Misranked: pairs of layers in the wrong order."
        )
    estimates = {card["same_text"] for card in cards if card["score"] in ROUNDING_ESTIMATES}
    if True in estimates:
        caption += (
            " Estimates are of the same text, and share the chance of its selection: expect less of them elsewhere."
        )
    elif estimates:
        caption += " Estimates are of other text than that."
    return caption


def _name(card: Row) -> str:
    return "AVSS as published" if is_published(card) else describe_score(card).replace("avss  ", "AVSS ")


def _kind(score: str) -> str:
    """Return where a score comes from, of `KINDS`."""
    if score == LAST:
        return CONTROL
    if score in MEASURED:
        return ABLATED
    return SCORED if score in FROM_ACTIVATIONS else OWN


def _drawing(rows: Sequence[Row]) -> Any:
    """Return the chart of the correlation of each score with its interval, and a dashed line at the ceiling."""
    import altair as alt

    present = {row["kind"] for row in rows}
    kinds = [kind for kind in KINDS if kind in present]
    lowest = min(0.0, *(row["correlation"] for row in rows))
    base = alt.Chart().encode(
        alt.Y("score:N", sort=None, title=None).axis(labelLimit=alt.ExprRef("room")),
        alt.Color(
            "kind:N",
            scale=alt.Scale(domain=kinds, range=[KINDS[kind] for kind in kinds]),
            legend=alt.Legend(title=None, orient="top", columns=1, symbolType="circle", symbolOpacity=1),
        ),
    )
    scale = alt.Scale(domain=[lowest, 1])
    x = alt.X("correlation:Q", scale=scale, title="rank correlation", axis=alt.Axis(grid=False, tickCount=5))
    return alt.layer(
        alt.Chart().mark_rule(color=GRAY, opacity=0.5).encode(x=alt.datum(0)),
        alt.Chart().mark_rule(color=GRAY, strokeDash=[4, 3]).encode(alt.X("ceiling:Q", aggregate="max")),
        base.mark_rule(clip=True).encode(alt.X("low:Q", scale=scale), alt.X2("high:Q")),
        base.mark_point(filled=True, size=45, opacity=1).encode(
            x, tooltip=["score:N", alt.Tooltip("correlation:Q", format=".2f")]
        ),
    ).properties(height=18 * len(rows))
