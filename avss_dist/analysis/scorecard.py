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
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from avss_dist.analysis.ground_truth import (
    RoundedValues,
    find_measured_values,
    nothing_measured,
    rounded_values,
    rounding_estimates,
)
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
    Section,
    page_number,
)
from avss_dist.core.intervention import InterventionKey
from avss_dist.core.thresholds import describe_threshold
from avss_dist.core.values import NewRow, TableRow
from avss_dist.plans.catalog import ROUNDING_ESTIMATES
from avss_dist.plans.criteria import (
    LEAVE_ONE_OUT,
    PUBLISHED,
    LayerValues,
    count_layers,
    reading_of,
    stored_values,
    values_from_the_end,
)
from avss_dist.stats.catalog import (
    BASELINES,
    DAMAGE_TASK,
    FROM_ACTIVATIONS,
    GROUND_TRUTH,
    LAST,
    MEASURED,
    READING,
    SCORES,
)
from avss_dist.stats.layer_stats import Float64
from avss_dist.stats.metrics import LOSS
from avss_dist.stats.rankings import count_lowest, spearman, spearman_interval, spearman_rows
from avss_dist.warehouse.reader import Warehouse, grouped
from avss_dist.warehouse.schema import columns_of

if TYPE_CHECKING:
    from altair.typing import ChartType

SPLITS = 200  # of sequences into halves
SEED = 0
MIN_SEQUENCES = 4  # two for each half
GOOD = 0.7  # a correlation that stands out
SCORED = "from the scoring pass"
ABLATED = "from passes of avss ablate"
OWN = "of your own"
CONTROL = "a control"
KINDS = {SCORED: BLUE, ABLATED: AMBER, OWN: VIOLET, CONTROL: GRAY}
"""Colors of scores in a chart, by where they come from."""
TRUTHS = {"loss": "the loss without each layer", "shapley": "the Shapley value", "taylor": "the first-order estimate"}
SPEARMAN = {name: f"spearman_{name}" for name in GROUND_TRUTH}
MEASURED_ROUNDED = "rounded:"  # before a number format: the score that is the measured effect of another format
LEFT_OUT = "left_out:"  # before a measurement or estimate of layers that are left out, among those of rounded weights
_SPEARMAN_FIELDS = tuple((column, pa.float64()) for column in SPEARMAN.values())
SCHEMA = pa.schema(
    [
        ("run_id", pa.string()),
        ("model", pa.string()),
        ("score", pa.string()),
        ("site", pa.string()),
        ("recipe", pa.string()),
        ("threshold", pa.float64()),
        ("threshold_kind", pa.string()),
        *_SPEARMAN_FIELDS,
        ("ceiling", pa.float64()),
        ("share_of_ceiling", pa.float64()),
        ("misranked", pa.float64()),
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


def score_cards(store: Warehouse, runs: Sequence[TableRow], own: Sequence[str] = ()) -> pa.Table:
    """Return one row for each score and reading, of the runs whose ground truth is measured.

    Rows with a ``format`` compare with the loss with rounded weights, in the column of the loss; others with the loss
    without layers.

    Args:
        runs: rows of ``runs``.
        own: names of scores that people bring, see `own_score`.

    Raises:
        QueryError: if no run has a measured ground truth. The message has the command that measures it.
    """
    rows: list[NewRow] = []
    for run in runs:
        for card in _cards_of_run(store, run, own):
            rows.append({"run_id": run["run_id"], "model": run["model"], **card})
    if runs and not rows:
        raise nothing_measured(store, runs[0], LEAVE_ONE_OUT)
    return pa.table(columns_of(rows, SCHEMA), SCHEMA)


def _cards_of_run(store: Warehouse, run: TableRow, own: Sequence[str]) -> Iterator[NewRow]:
    """Yield the score cards of a run: first those of layers that are left out, then those of rounded weights.

    Args:
        own: names of scores that people bring, which are compared with layers that are left out.
    """
    num_layers = run["num_layers"]
    truths: dict[str, LayerValues] = {}
    for name in MEASURED:
        truth = find_measured_values(store, run, name)
        if truth is not None:
            truths[name] = truth
    rounded = rounded_values(store, run)
    has_ground_truth = any(name in truths for name in GROUND_TRUTH)
    if not has_ground_truth and not rounded:
        return
    scored = store.table("scores", run_ids=[run["run_id"]]).to_pylist()
    measured = {name: truth.by_layer(num_layers) for name, truth in truths.items()}
    if has_ground_truth:
        ceiling = np.nan
        if LEAVE_ONE_OUT in truths:
            ceiling = reliability(increases(store, truths[LEAVE_ONE_OUT]))
        own_values = {}
        for name, label in own_labels(own).items():
            own_values[label] = own_score(name, store, run).by_layer(num_layers)
        yield from _removal_cards(scored, {**measured, **own_values}, ceiling)
    if rounded:
        yield from _rounding_cards(store, run, list(_scores(scored, measured)), rounded)


def _removal_cards(scored: Sequence[TableRow], measured: Mapping[str, Float64], ceiling: float) -> Iterator[NewRow]:
    """Yield the score cards of a run for what leaving layers out does.

    Args:
        scored: rows of ``scores`` of the run.
        measured: measurements and scores that people bring, by name: float64[layers].
        ceiling: `reliability` of the measured loss.
    """
    for card, values in _scores(scored, measured):
        if LEAVE_ONE_OUT in measured and card["score"] != LEAVE_ONE_OUT:
            card |= _agreement(values, measured[LEAVE_ONE_OUT], ceiling)
        for name, column in SPEARMAN.items():
            if name in measured:
                card[column] = spearman(values, measured[name])
        yield card


def _agreement(values: Float64, measured: Float64, ceiling: float) -> NewRow:
    """Return the columns of a score, float64[layers], that is compared with a measured loss."""
    rho = spearman(values, measured)
    return {
        SPEARMAN[LEAVE_ONE_OUT]: rho,
        "ceiling": ceiling,
        "share_of_ceiling": rho / ceiling,
        "misranked": misranked(values, measured),
    }


def _scores(scored: Sequence[TableRow], measured: Mapping[str, Float64]) -> Iterator[tuple[NewRow, Float64]]:
    """Yield every reading of AVSS, other scores, measurements and a control: columns of a card, and float64[layers].

    Args:
        scored: rows of ``scores`` of a run; none if they are damaged. Then its measurements remain.
        measured: measurements of its layers, by name.
    """
    for reading, rows in grouped(scored, reading_of).items():
        values = stored_values(rows, "avss", reading).by_layer(count_layers(scored))
        yield {"score": "avss", **dict(zip(READING, reading, strict=True))}, values
    if scored:
        for name in BASELINES:
            yield {"score": name}, stored_values(scored, name).by_layer(count_layers(scored))
    for name, values in measured.items():
        yield {"score": name}, values
    if scored:
        num_layers = count_layers(scored)
        yield {"score": LAST}, values_from_the_end(num_layers).by_layer(num_layers)


def _rounding_cards(
    store: Warehouse,
    run: TableRow,
    scores: Sequence[tuple[TableRow, Float64]],
    rounded: Mapping[str, RoundedValues],
) -> Iterator[NewRow]:
    """Yield the score cards of a run for the loss with rounded weights, format by format.

    Args:
        scores: see `_scores`. Measurements of layers that are left out may have the name of an estimate of rounding.
        rounded: measurements of layers that are rounded, by number format.
    """
    num_layers = run["num_layers"]
    for name, truth in sorted(rounded.items()):
        measured = truth.by_layer(num_layers)
        ceiling = reliability(increases(store, truth))
        for card, values in scores:
            score = card["score"]
            if SCORES[score].task in (SCORES[LEAVE_ONE_OUT].task, DAMAGE_TASK):
                score = f"{LEFT_OUT}{score}"
            yield {**card, "score": score, "format": name, **_agreement(values, measured, ceiling)}
        estimates = rounding_estimates(store, run, truth)
        for other, other_truth in rounded.items():
            if other != name:
                estimates[f"{MEASURED_ROUNDED}{other}"] = other_truth
        for score, estimate in estimates.items():
            agreement = _agreement(estimate.by_layer(num_layers), measured, ceiling)
            yield {"score": score, "format": name, "same_text": estimate.text == truth.text, **agreement}


def describe_agreement(
    store: Warehouse, run: TableRow, scores: Sequence[TableRow], own: Sequence[str] = ()
) -> Iterator[str]:
    """Yield a line on how well AVSS, and scores that people bring, find the measured loss without each layer.

    The line of AVSS says how stable its lowest layers are over the shards. There is no line without such a loss.

    Args:
        scores: rows of ``scores`` of the run at one reading of AVSS.
        own: columns of these rows that have scores which people bring.
    """
    truth = find_measured_values(store, run, LEAVE_ONE_OUT)
    if truth is None:
        return
    num_layers = run["num_layers"] or 0
    measured = truth.by_layer(num_layers)
    for column in ("avss_smoothed", *own):
        rho = spearman(_by_layer(scores, column, num_layers), measured)
        low, high = spearman_interval(rho, num_layers)
        if not np.isfinite(low):
            continue
        text = f"Spearman {rho:z.2f} with the loss without each layer (95% interval {low:z.2f} to {high:z.2f})"
        if column in own:
            yield f"{column}: {text}."
        else:
            yield f"Smoothed AVSS: {text}{_describe_stability(scores)}."


def _by_layer(scores: Sequence[TableRow], column: str, num_layers: int) -> Float64:
    """Return a column of scores, float64[layers], with NaN for layers without a value."""
    values = np.full(num_layers, np.nan)
    for row in scores:
        if row["layer"] < num_layers and row[column] is not None:
            values[row["layer"]] = row[column]
    return values


def _describe_stability(scores: Sequence[TableRow]) -> str:
    """Return how stable the lowest layers are over the shards, as the end of a sentence. Empty if it is not known."""
    num_lowest = count_lowest(len(scores))
    probabilities = []
    for row in scores:
        if row["rank"] is not None and row["rank"] <= num_lowest:
            probabilities.append(row["lowest_set_probability"])
    if not probabilities:
        return ""
    stability = np.mean(np.array(probabilities, np.float64))
    if not np.isfinite(stability):
        return ""
    return f"; resampling the shards keeps {stability:.0%} of its lowest layers"


def describe_score(card: TableRow) -> str:
    """Return the title of a row's score. For AVSS, it contains the reading."""
    name: str = card["score"]
    if name.startswith(MEASURED_ROUNDED):
        return f"loss, rounded to {name.removeprefix(MEASURED_ROUNDED)}"
    if name.startswith(LEFT_OUT):
        return f"{SCORES[name.removeprefix(LEFT_OUT)].title}, without the layer"
    if card["format"] and name in ROUNDING_ESTIMATES:
        return ROUNDING_ESTIMATES[name].title
    if name != "avss" and name in SCORES:
        return SCORES[name].title
    if name != "avss":
        return name
    threshold = describe_threshold(card["threshold"], card["threshold_kind"])
    return f"avss  {card['site']} / {card['recipe']} / {threshold}"


def is_published(card: TableRow) -> bool:
    """Whether a row has the published reading of AVSS."""
    return tuple(card[name] for name in READING) == PUBLISHED


def best_readings(cards: pa.Table) -> pa.Table:
    """Return score cards without the readings of AVSS that are neither the published one nor the best of their site."""
    rows = cards.to_pylist()
    column = SPEARMAN["shapley"]
    if any(row[SPEARMAN["loss"]] is not None for row in rows):
        column = SPEARMAN["loss"]
    best: dict[tuple[str, str, str | None], int] = {}
    for place, row in enumerate(rows):
        if row["score"] != "avss" or row[column] is None:
            continue
        site = (row["run_id"], row["site"], row["format"])
        if site not in best or row[column] > rows[best[site]][column]:
            best[site] = place
    best_places = set(best.values())
    keep = []
    for place, row in enumerate(rows):
        if row["score"] != "avss" or place in best_places or is_published(row):
            keep.append(place)
    return cards.take(pa.array(keep, pa.int64()))


def increases(store: Warehouse, truth: LayerValues) -> Float64:
    """Return the rise of each sequence's loss by the truth's change of each layer, float64[sequences, layers], in nats.

    The array has no sequences if the warehouse lacks the cells of the evaluation.
    """
    where = pc.field("run_id") == truth.run_id
    where &= pc.field("task") == truth.task
    where &= pc.field("metric") == LOSS
    cells = store.table("cells", where=where).sort_by("part").to_pylist()
    samples: dict[InterventionKey, Float64] = {}
    for key, rows in grouped(cells, InterventionKey.of_row).items():
        samples[key] = np.concatenate([row["samples"] for row in rows])
    whole = InterventionKey()
    keys = [truth.key(layer) for layer in sorted(truth.values)]
    sizes = {len(values) for values in samples.values()}
    if samples.keys() != {whole, *keys} or len(sizes) > 1:
        return np.zeros((0, len(keys)))
    return np.stack([samples[key] - samples[whole] for key in keys], axis=1)


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
    if number < MIN_SEQUENCES:
        return np.nan
    random = np.random.default_rng(SEED)
    first_sums = []
    second_sums = []
    for _ in range(SPLITS):
        first, second = np.split(samples[random.permutation(number)], [number // 2])
        first_sums.append(first.sum(axis=0))
        second_sums.append(second.sum(axis=0))
    correlations = spearman_rows(np.array(first_sums), np.array(second_sums))
    mean = float(np.mean(correlations))
    if mean > 0:
        return 2 * mean / (1 + mean)
    return np.nan


def misranked(score: Float64, truth: Float64) -> float | None:
    """Return the share of untied pairs of layers that a score puts in the opposite order, or None if all are tied.

    Args:
        score, truth: float64[layers]. Layers with NaN in either are left out.
    """
    both = np.isfinite(score) & np.isfinite(truth)
    score = score[both]
    truth = truth[both]
    by_score = np.sign(np.subtract.outer(score, score))
    by_truth = np.sign(np.subtract.outer(truth, truth))
    # Every pair is in the product twice, once from each side.
    product = by_score * by_truth
    untied = int(np.count_nonzero(product))
    if not untied:
        return None
    return int(np.count_nonzero(product < 0)) / untied


def scorecard_sections(cards: pa.Table) -> list[Section]:
    """Return the score card of each run, and that of each number format that its weights were rounded to.

    Args:
        cards: as `score_cards` returns them.
    """
    sections = []
    by_format = grouped(cards.to_pylist(), itemgetter("run_id", "model", "format"))
    for (run_id, model, format_), rows in by_format.items():
        label = f"{model}  ({run_id})"
        if format_:
            label += f", weights rounded to {format_}"
        sections.append(Section(label=label, tables=[_table("scorecard", rows)]))
    return sections


def page_section(label: str, cards: Sequence[TableRow], layers: int, readings: int) -> Section | None:
    """Return the score card of one run with a chart and a sentence, or None if no score has a correlation.

    Args:
        layers: number of layers.
        readings: number of the readings of AVSS, of which ``cards`` has the best.
    """
    truth = _first_truth(cards)
    if truth is None:
        return None
    column = SPEARMAN[truth]
    compared = []
    for card in cards:
        if card["score"] != truth and card[column] is not None:
            compared.append(card)
    if not compared:
        return None
    compared.sort(key=lambda card: -float(card[column]))
    name = f"scorecard-{page_number(label)}"
    drawn = [_drawn(card, column, layers) for card in compared]
    chart = Chart(
        name=name,
        title=f"Correlation with {TRUTHS[truth]}",
        meaning="The correlation of each score with what leaving layers out does, and its 95% interval.",
        rows=drawn,
        draw=partial(_drawing, drawn),
    )
    conclusion = " ".join(_sentences(compared, truth, readings))
    return Section(label=label, sentences=[conclusion], charts=[chart], tables=[_table(name, cards)])


def _first_truth(cards: Sequence[TableRow]) -> str | None:
    """Return the first of `TRUTHS` with which a score has a correlation. None if there is none."""
    for name in TRUTHS:
        if any(card[SPEARMAN[name]] is not None for card in cards):
            return name
    return None


def _sentences(compared: Sequence[TableRow], truth: str, readings: int) -> Iterator[str]:
    """Yield what the correlations with a ground truth say.

    Args:
        compared: cards of the scores that have one, the highest first.
        readings: number of the readings of AVSS.
    """
    column = SPEARMAN[truth]
    best = compared[0]
    ceiling = ""
    if best["ceiling"] is not None:
        ceiling = f" of at most {best['ceiling']:z.2f}, which the same measurement on other text would reach"
    yield f"Closest to {TRUTHS[truth]}: {_name(best)}, {best[column]:z.2f}{ceiling}."
    for card in compared:
        if is_published(card):
            yield f"{_name(card)}: {card[column]:z.2f}."
        elif card["score"] == LAST:
            yield f"The place alone: {card[column]:z.2f}."
    yield f"Of {readings} readings of AVSS, the best of each site is shown; on other text, expect less of it."


def _drawn(card: TableRow, column: str, layers: int) -> NewRow:
    """Return the row of a score for `_drawing`.

    Args:
        column: column of its correlation.
        layers: number of layers.
    """
    low, high = spearman_interval(card[column], layers)
    return {
        "score": _name(card),
        "kind": _kind(card["score"]),
        "correlation": card[column],
        "ceiling": card["ceiling"],
        "low": low,
        "high": high,
    }


def _table(name: str, cards: Sequence[TableRow]) -> ReportTable:
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


def _caption(cards: Sequence[TableRow]) -> str:
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


def _name(card: TableRow) -> str:
    """Return the name of a row's score on the page."""
    if is_published(card):
        return "AVSS as published"
    return describe_score(card).replace("avss  ", "AVSS ")


def _kind(score: str) -> str:
    """Return where a score comes from, of `KINDS`: scores that people bring, and all other names, are their own."""
    if score == LAST:
        return CONTROL
    if score in MEASURED:
        return ABLATED
    if score in FROM_ACTIVATIONS:
        return SCORED
    return OWN


def _drawing(rows: Sequence[TableRow]) -> ChartType:
    """Return the chart of the correlation of each score with its interval, and a dashed line at the ceiling."""
    import altair as alt

    present = {row["kind"] for row in rows}
    kinds = [kind for kind in KINDS if kind in present]
    colors = alt.Scale(domain=kinds, range=[KINDS[kind] for kind in kinds])
    legend = alt.Legend(title=None, orient="top", columns=1, symbolType="circle", symbolOpacity=1)
    base = alt.Chart().encode(
        alt.Y("score:N", sort=None, title=None).axis(labelLimit=alt.ExprRef("room")),
        alt.Color("kind:N", scale=colors, legend=legend),
    )
    lowest = min(row["correlation"] for row in rows)
    scale = alt.Scale(domain=[min(0.0, lowest), 1])
    x = alt.X("correlation:Q", scale=scale, title="rank correlation", axis=alt.Axis(grid=False, tickCount=5))
    zero = alt.Chart().mark_rule(color=GRAY, opacity=0.5).encode(x=alt.datum(0))
    ceiling = alt.Chart().mark_rule(color=GRAY, strokeDash=[4, 3]).encode(alt.X("ceiling:Q", aggregate="max"))
    intervals = base.mark_rule(clip=True).encode(alt.X("low:Q", scale=scale), alt.X2("high:Q"))
    points = base.mark_point(filled=True, size=45, opacity=1)
    points = points.encode(x, tooltip=["score:N", alt.Tooltip("correlation:Q", format=".2f")])
    return alt.layer(zero, ceiling, intervals, points).properties(height=18 * len(rows))
