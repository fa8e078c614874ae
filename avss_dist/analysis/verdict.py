"""Evaluations of models without layers: verdicts on the published claim, and the best removed set of each size.

The claim (arXiv 2411.02117, abstract): without the lowest 25% of layers by AVSS, over 90% of the performance is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import exp, isfinite
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from avss_dist.analysis.experiment_choices import ENDS_KEPT, REVERSED
from avss_dist.analysis.experiments import NewestExperiment, newest_experiments
from avss_dist.analysis.section import (
    BLUE,
    GRAY,
    Chart,
    ReportColumn,
    ReportRow,
    ReportTable,
    Section,
    interval,
    known_interval,
    page_number,
)
from avss_dist.core.intervention import count_removed, describe_removed, size_removed, stored_removals
from avss_dist.core.text import basename
from avss_dist.core.values import NewRow, TableRow
from avss_dist.plans.criteria import LEAVE_ONE_OUT, PUBLISHED
from avss_dist.stats.catalog import BLOCK_DISTANCE, LAST, MEASURED, RANDOM, READING, SCORES
from avss_dist.stats.intervals import MINIMUM_UNITS
from avss_dist.stats.metrics import CHANCE, LOSS, NO_INTERVAL, retention_of
from avss_dist.warehouse.names import PERPLEXITY, REPAIR, ROW_START, SEARCH, SUBLAYER_LOSS
from avss_dist.warehouse.reader import Warehouse, grouped

if TYPE_CHECKING:
    from altair.typing import ChartType

CLAIMED_SHARE = 0.25  # of the layers
CLAIMED_KEPT = 0.9  # retention
SMALLEST_AXIS = 1.1  # retention that every chart has room for
LARGEST_SHOWN = 1.5  # retention beyond which a chart cuts off
LARGEST_EXPONENT = 700  # of e in a float64, which overflows at 710
MENTIONED = 0.01  # a guess that keeps less is not worth a word
PRIMARY = (LOSS, "mc2", "acc_norm", "acc", "exact_match", "f1")  # of a task's metrics, the first that it has
WHOLE = "whole model"
OF_EVERY_LAYER = tuple({*(SCORES[name].task for name in MEASURED), SUBLAYER_LOSS, SEARCH})
"""Tasks that measure single layers, or candidate sets of a search, rather than a pruned model."""

_Results = Mapping[tuple[float, str], Mapping[str, TableRow]]
"""TableRow of each task, by share of removed layers and name of the method."""


def primary_metric(rows: Sequence[TableRow]) -> str:
    """Return the primary metric of a task: the first of `PRIMARY` that it has, else its first metric."""
    by_last_part: dict[str, str] = {}
    for row in rows:
        last_part = row["metric"].rpartition("/")[2]
        by_last_part.setdefault(last_part, row["metric"])
    for metric in PRIMARY:
        if metric in by_last_part:
            return by_last_part[metric]
    return str(rows[0]["metric"])


@dataclass(frozen=True, kw_only=True)
class _Claim:
    """A test of the published claim on one task, with one repair or without.

    Attributes:
        task: name of the task.
        row: result without the layers of the lowest AVSS, at the claimed share.
        rows: results of every method with the same task, metric, share and repair, and of the whole model.
        guess: retention of a guess, as returned by `kept_by_guess`.
    """

    task: str
    row: TableRow
    rows: Sequence[TableRow]
    guess: float | None


def verdicts(rows: Sequence[TableRow]) -> list[str]:
    """Return a paragraph for each task and repair of one experiment with a run on which the claim was tested."""
    paragraphs = []
    for claim in _claims(rows):
        sentences = " ".join(_sentences(claim))
        paragraphs.append(f"{claim.task}: {sentences}")
    return paragraphs


def claim_in_short(rows: Sequence[TableRow]) -> list[str]:
    """Return a line for each task of one experiment: the retention without the lowest AVSS, and the verdict."""
    lines = []
    for claim in _claims(rows):
        if claim.row.get("repair"):
            continue
        retention = _percent(claim.row["retention"])
        verdict = judgement(claim.row, claim.guess)
        lines.append(f"{claim.task}: {retention} by the lowest AVSS: {verdict}.")
    return lines


def _claims(rows: Sequence[TableRow]) -> Iterator[_Claim]:
    """Yield the test of the claim for each task and repair on which it was tested."""
    for task, of_task in grouped(rows, itemgetter("task")).items():
        metric = primary_metric(of_task)
        guess = kept_by_guess(of_task, metric)
        of_metric = [row for row in of_task if row["metric"] == metric]
        of_share = [row for row in of_metric if _is_at_claimed_share(row)]
        repairs = dict.fromkeys(row.get("repair") for row in of_share if not _is_whole(row))
        for repair in repairs:
            same_repair = []
            for row in of_share:
                if _is_whole(row) or row.get("repair") == repair:
                    same_repair.append(row)
            published = _published_row(same_repair, "avss")
            if published is not None:
                yield _Claim(task=task, row=published, rows=same_repair, guess=guess)


def _is_at_claimed_share(row: TableRow) -> bool:
    """Whether a row is of the claimed share of removed layers, or of the whole model. Scaled layers are not removed."""
    return row["share"] in (0.0, CLAIMED_SHARE) and not row.get("factor")


def kept_by_guess(rows: Sequence[TableRow], metric: str) -> float | None:
    """Return the retention of a model that guesses, or None if it is unknown or the metric is no accuracy or loss."""
    prefix, slash, name = metric.rpartition("/")
    of_whole = {row["metric"]: row["value"] for row in rows if _is_whole(row)}
    chance = of_whole.get(f"{prefix}{slash}{CHANCE}")
    whole = of_whole.get(metric)
    if not chance or not whole:
        return None
    if name == LOSS:
        return exp(min(whole - chance, LARGEST_EXPONENT))
    if name.startswith("acc") or name == "mc2":
        return float(chance / whole)
    return None


def _sentences(claim: _Claim) -> list[str]:
    """Return the verdict on a claim, then what a guess, random choices and the other criteria keep."""
    sentences = [_about_claim(claim)]
    if claim.guess is not None and MENTIONED <= claim.guess <= CLAIMED_KEPT:
        sentences.append(f"A guess keeps {_percent(claim.guess)}.")
    chances = []
    for row in claim.rows:
        if row["score"] == RANDOM and not row["control"]:
            chances.append(row["retention"])
    if chances:
        sentences.append(_about_chance(chances, claim.row))
    for criterion in _OTHER_CRITERIA:
        other = _published_row(claim.rows, criterion.score, criterion.control)
        if other is not None:
            sentences.append(f"{criterion.subject} keeps {_percent(other['retention'])}.")
    return sentences


class _Criterion(NamedTuple):
    """A criterion that the lowest AVSS is compared with.

    Attributes:
        subject: subject of a sentence on it.
        score: score by which layers are chosen.
        control: control of the choice; None if it has none.
    """

    subject: str
    score: str
    control: str | None = None


_OTHER_CRITERIA = (
    _Criterion("The reverse, the highest AVSS,", "avss", REVERSED),
    _Criterion("AVSS with the ends kept", "avss", ENDS_KEPT),
    _Criterion("Block influence", "block_influence"),
    _Criterion("Leaving out by the loss without each layer", LEAVE_ONE_OUT),
    _Criterion("Leaving out the last before the final one", LAST),
)


def _about_claim(claim: _Claim) -> str:
    """Return the sentence on the retention without the lowest AVSS, with the verdict."""
    row = claim.row
    removed = count_removed(stored_removals(row))
    repaired = _repair_in_words(row)
    if repaired and not row.get("patch"):
        repaired += " (nothing: no layer stands before them)"
    kept = _percent(row["retention"])
    span = ""
    ends = retention_interval(row)
    if ends is not None:
        low, high = ends
        span = f" ({_percent(low)} to {_percent(high)})"
    change = ""
    whole = next((other for other in claim.rows if _is_whole(other)), None)
    if whole is not None:
        change = f" ({describe_metric(row['metric'])} {shown_value(whole)}, then {shown_value(row)})"
    return (
        f"without the {removed} of the lowest AVSS ({CLAIMED_SHARE:.0%}){repaired}, "
        f"{kept}{span} is kept{change}: {judgement(row, claim.guess)}."
    )


def _about_chance(chances: Sequence[float], row: TableRow) -> str:
    """Return the sentence on the retentions of random choices, compared with that of a row."""
    best = _percent(max(chances))
    repaired = _repair_in_words(row)
    if len(chances) == 1:
        if repaired:
            repaired += ","
        return f"A random choice of as many layers{repaired} keeps {best}."
    better = len([chance for chance in chances if chance >= row["retention"]])
    if better == 0:
        keep = "none keep"
    elif better == 1:
        keep = "1 keeps"
    else:
        keep = f"{better} keep"
    return f"Of {len(chances)} random choices of as many layers{repaired}, {keep} as much or more (the best {best})."


def _repair_in_words(row: TableRow) -> str:
    """Return the repair of a row as the middle of a sentence. Empty without repair."""
    if not row.get("repair"):
        return ""
    return f", repaired by {row['repair']}"


def judgement(row: TableRow, guess: float | None = None) -> str:
    """Return the verdict of a row's interval on the claim that over 90% is kept.

    Args:
        guess: retention of a guess (`kept_by_guess`). If it exceeds the claim, the task is not conclusive.
    """
    if guess is not None and guess > CLAIMED_KEPT:
        return f"this task cannot tell, for a guess keeps {_percent(guess)}"
    ends = retention_interval(row)
    if ends is None:
        if row["retention"] == 0:
            return "the claim does not hold, for nothing is kept"
        return f"the claim is undecided, for there is no interval (fewer than {MINIMUM_UNITS} samples differ)"
    low, high = ends
    if low > CLAIMED_KEPT:
        return "the claim holds"
    if high < CLAIMED_KEPT:
        return "the claim does not hold"
    return "the claim is undecided, for want of data"


def _published_row(rows: Sequence[TableRow], score: str, control: str | None = None) -> TableRow | None:
    """Return the row of a score in its published reading, with the given control, or None if there is none.

    Schema 2 has the reading of AVSS only in the label of the method.
    """
    for row in rows:
        if row["score"] != score or row["control"] != control:
            continue
        reading = tuple(row.get(name) for name in READING)
        if reading == PUBLISHED:
            return row
        if None in reading and "(" not in row["method"]:
            return row
    return None


def _is_whole(row: TableRow) -> bool:
    return row["score"] is None


def retention_interval(row: TableRow) -> tuple[float, float] | None:
    """Return the lower and upper end of a row's retention interval, or None if it has no interval."""
    return known_interval(row.get("retention_low"), row.get("retention_high"))


def lacks_interval(rows: Sequence[TableRow]) -> bool:
    """Whether some row other than the whole model's has no retention interval."""
    return any(not _is_whole(row) and retention_interval(row) is None for row in rows)


def shown_method(row: TableRow) -> str:
    """Return the display name of a method: its choice of layers, and repair."""
    if row.get("repair"):
        return f"{row['method']} + {row['repair']}"
    return str(row["method"])


def shown_value(row: TableRow) -> str:
    """Return a formatted result. A loss is shown as perplexity."""
    return metric_format(row["metric"])(readable_value(row["metric"], row["value"]))


def readable_value(metric: str, value: float) -> float:
    """Return a result in its display unit. A loss becomes a perplexity."""
    if metric == LOSS:
        return exp(min(value, LARGEST_EXPONENT))
    return value


def metric_format(metric: str) -> Callable[[float], str]:
    """Return the function that formats the `readable_value` of a metric."""
    if metric == LOSS:
        return "{:,.4g}".format
    return "{:z.3f}".format


def describe_metric(metric: str) -> str:
    """Return the display name of a metric. A loss is shown as perplexity."""
    return "perplexity" if metric == LOSS else metric


def describe_task(task: str) -> str:
    """Return the display name of a task, without the folders of its text."""
    name, colon, text = task.partition(":")
    if colon:
        return f"{name}: {basename(text)}"
    return basename(task)


def _percent(share: float) -> str:
    if share < 0.001:
        return "under 0.1%"
    return f"{share:.1%}"


def without_layers(warehouse: Warehouse, runs: Sequence[TableRow]) -> list[dict[str, list[NewRow]]]:
    """Return the measurements of each run's checkpoint without some of its layers.

    Args:
        runs: rows of ``runs``.

    Returns:
        By run, ``blocks``: ``start``, ``length`` and ``distance`` of each block of consecutive layers, the mean angle
        between the hidden states before and after it, in units of pi radians. And ``sets``: the best removed set of
        each size, for every task and repair: ``series`` names both, ``dropped`` is the set in words, ``size`` the
        number of layers, of which a sublayer is a half, and ``kept`` the retention of the task's primary metric.
    """
    revisions = {run["revision"] for run in runs if run["revision"] is not None}
    rows: list[NewRow] = []
    if revisions:
        where = pc.field("revision").isin(pa.array(sorted(revisions), pa.string()))
        rows = warehouse.table("evaluations", where=where).to_pylist()
    by_revision = grouped(rows, itemgetter("revision"))
    blocks = {revision: _blocks(of_revision) for revision, of_revision in by_revision.items()}
    sets = {revision: _best_sets(of_revision) for revision, of_revision in by_revision.items()}
    measured = []
    for run in runs:
        revision = run["revision"]
        measured.append({"blocks": blocks.get(revision, []), "sets": sets.get(revision, [])})
    return measured


def _blocks(rows: Sequence[TableRow]) -> list[NewRow]:
    """Return the distances of blocks that the newest run measured, ordered by first layer and length."""
    of_blocks = [row for row in rows if row["metric"] == BLOCK_DISTANCE]
    measured = [row for row in of_blocks if isfinite(row["value"])]
    if not measured:
        return []
    newest = max(measured, key=itemgetter("created_at", "run_id"))
    distances: dict[tuple[int, int], float] = {}
    for row in measured:
        if row["run_id"] == newest["run_id"]:
            start = row["drop"][0]
            length = len(row["drop"])
            distances[start, length] = row["value"]
    blocks: list[NewRow] = []
    for (start, length), distance in sorted(distances.items()):
        blocks.append({"start": start, "length": length, "distance": distance})
    return blocks


def _best_sets(rows: Sequence[TableRow]) -> list[NewRow]:
    """Return the best removed set of each size, for every task and repair."""
    repairs = repair_names(rows)
    evaluated = [row for row in rows if evaluates_removals(row)]
    best_sets: list[NewRow] = []
    for of_task in grouped(evaluated, itemgetter("task")).values():
        # The run with the most results tried the most sets.
        of_run = max(grouped(of_task, itemgetter("run_id")).values(), key=len)
        best: dict[tuple[str, float], NewRow] = {}
        for removed_set in sorted(_removed_sets(of_run, repairs), key=itemgetter("kept")):
            best[removed_set["series"], removed_set["size"]] = removed_set
        best_sets += [best[key] for key in sorted(best)]
    return best_sets


def repair_names(rows: Sequence[TableRow]) -> dict[str, str]:
    """Return the name of the repair of each patch that evaluations have fitted.

    Args:
        rows: rows of ``evaluations``.
    """
    repairs: dict[str, str] = {}
    for row in rows:
        if row["patch"] and row["task"].startswith(REPAIR):
            repairs[row["patch"]] = row["task"].split(":")[1]
    return repairs


def evaluates_removals(row: TableRow) -> bool:
    """Whether a row evaluates a model from which whole layers or sublayers were removed, or nothing."""
    if row["factor"]:
        return False
    if row["layer"] is not None or row["sparsity_plan"] is not None or row["rounding"] is not None:
        return False
    return not row["task"].startswith((*OF_EVERY_LAYER, REPAIR, ROW_START))


def _removed_sets(rows: Sequence[TableRow], repairs: Mapping[str, str]) -> list[NewRow]:
    """Return the removed sets of one run and task, as `without_layers` describes them, whose retention is defined.

    Args:
        repairs: name of the repair of each patch.
    """
    metric = primary_metric(rows)
    of_metric = [row for row in rows if row["metric"] == metric]
    wholes = [row for row in of_metric if not stored_removals(row)]
    pruned = [row for row in of_metric if stored_removals(row)]
    sets: list[NewRow] = []
    for whole in wholes:
        for row in pruned:
            kept = float(retention_of(metric, np.array(whole["value"]), np.array(row["value"])))
            if not isfinite(kept):
                continue
            series = describe_task(row["task"])
            if row["patch"]:
                series += f", repaired by {repairs.get(row['patch'], 'a patch')}"
            removed = stored_removals(row)
            dropped = describe_removed(removed)
            sets.append({"series": series, "dropped": dropped, "size": size_removed(removed), "kept": kept})
    return sets


def experiment_sections(rows: Sequence[TableRow], labels: Mapping[str, str] | None = None) -> list[Section]:
    """Return the results of the newest experiment with each run.

    Args:
        rows: rows of the table ``experiments``.
        labels: labels of runs by id, in their order; by default the model and the id.
    """
    newest = newest_experiments(rows)
    if not labels:
        labels = {}
        for run_id, experiment in newest.items():
            model = experiment.rows[0]["model"]
            labels[run_id] = f"{model}  ({run_id})"
    sections = []
    for run_id, label in labels.items():
        if run_id in newest:
            sections.append(_section(label, newest[run_id]))
    return sections


def _section(label: str, experiment: NewestExperiment) -> Section:
    """Return the section on the results of one experiment with a run."""
    name = f"experiment-{page_number(label)}"
    metrics: dict[str, str] = {}
    guesses: dict[str, float | None] = {}
    for task, of_task in grouped(experiment.rows, itemgetter("task")).items():
        metrics[task] = primary_metric(of_task)
        guesses[task] = kept_by_guess(of_task, metrics[task])
    primary = []
    for row in experiment.rows:
        if row["metric"] == metrics[row["task"]]:
            primary.append(row)
    primary.sort(key=lambda row: float(row["share"]))
    methods = _results_by_method(primary)
    sentences = verdicts([{**row, "task": describe_task(row["task"])} for row in experiment.rows])
    if not sentences:
        sentences = ["No share of 25% by AVSS was tried."]
    return Section(
        label=label,
        about=experiment.describe(),
        sentences=sentences,
        charts=_charts(name, methods, guesses),
        tables=[_methods_table(name, methods, metrics, has_intervals=not lacks_interval(primary))],
    )


def _methods_table(name: str, methods: _Results, metrics: Mapping[str, str], *, has_intervals: bool) -> ReportTable:
    """Return the table of the results of each method at each share.

    Args:
        metrics: primary metric of every task.
    """
    columns = list(_METHOD_COLUMNS)
    for task, metric in metrics.items():
        columns += _result_columns(task, metric)
    rows = []
    for (share, method), results in methods.items():
        rows.append(_method_row(share, method, results, metrics))
    caption = "Kept: the metric over that of the whole model (of a perplexity: under it), and its 95% interval."
    if not has_intervals:
        caption = f"{caption} {NO_INTERVAL}"
    return ReportTable(name=name, title="Each method at each share", columns=columns, rows=rows, caption=caption)


def _charts(name: str, methods: _Results, guesses: Mapping[str, float | None]) -> list[Chart]:
    """Return a chart for each share and task in which a method has a result.

    Args:
        name: base name of their files, which are numbered.
        guesses: retention of a guess by task.
    """
    charts: list[Chart] = []
    for share in dict.fromkeys(share for share, method in methods if method != WHOLE):
        for task, guess in guesses.items():
            drawn = _chart_rows(methods, share, task, guess)
            if drawn:
                charts.append(_chart(f"{name}-{len(charts) + 1}", task, share, drawn))
    return charts


def _results_by_method(rows: Sequence[TableRow]) -> _Results:
    """Return the row of each task by share and method, in the order of the rows."""
    methods: dict[tuple[float, str], dict[str, TableRow]] = {}
    for row in rows:
        methods.setdefault((row["share"], shown_method(row)), {})[row["task"]] = row
    return methods


_METHOD_COLUMNS = (
    ReportColumn("layers chosen by", "method", number=False),
    ReportColumn("share", "share", "{:z.0%}".format),
    ReportColumn("dropped", "dropped", number=False, wraps=True, priority=3),
)
"""Columns that tell the methods apart."""


def _result_columns(task: str, metric: str) -> list[ReportColumn]:
    """Return the columns of a task: its metric, and the retention of it with its interval."""
    group = basename(task.removeprefix(PERPLEXITY))
    percent = "{:z.1%}".format
    return [
        ReportColumn(describe_metric(metric), f"{task}: value", metric_format(metric), group=group, priority=2),
        ReportColumn("kept", f"{task}: kept", percent, group=group),
        ReportColumn("95% interval", f"{task}: interval", interval(percent), group=group, priority=1),
    ]


def _method_row(share: float, method: str, results: Mapping[str, TableRow], metrics: Mapping[str, str]) -> ReportRow:
    """Return the row of a method at one share.

    Args:
        results: its rows of ``experiments`` by task. A task may lack one.
        metrics: primary metric of every task.
    """
    # All tasks are evaluated without the same layers. The whole model has no value.
    first_result = next(iter(results.values()))
    dropped = describe_removed(stored_removals(first_result)) or None
    values: NewRow = {"method": method, "share": share, "dropped": dropped}
    for task, metric in metrics.items():
        values[f"{task}: value"] = None
        values[f"{task}: kept"] = None
        values[f"{task}: interval"] = None
        if task not in results:
            continue
        result = results[task]
        values[f"{task}: value"] = readable_value(metric, result["value"])
        # The whole model is what the others are compared with.
        if not _is_whole(result):
            values[f"{task}: kept"] = result["retention"]
            values[f"{task}: interval"] = retention_interval(result)
    return ReportRow(values)


def _chart_rows(methods: _Results, share: float, task: str, guess: float | None) -> list[NewRow]:
    """Return a row for each method at a share of removed layers, for `_drawing`."""
    drawn = []
    for (of_share, method), results in methods.items():
        if of_share != share or method == WHOLE or task not in results:
            continue
        row = results[task]
        low, high = retention_interval(row) or (None, None)
        kept = min(row["retention"], LARGEST_SHOWN)
        drawn.append({"method": method, "kept": kept, "guess": guess, "low": low, "high": high})
    return drawn


def _chart(name: str, task: str, share: float, drawn: Sequence[TableRow]) -> Chart:
    """Return the chart of the retention of a task by each method at one share."""
    largest = max([SMALLEST_AXIS, *(row["kept"] for row in drawn)])
    return Chart(
        name=name,
        title=f"{describe_task(task)}, {share:.0%} dropped",
        meaning="What each method keeps, with its 95% interval.",
        rows=drawn,
        draw=partial(_drawing, largest, len(drawn)),
    )


def _drawing(largest: float, number: int) -> ChartType:
    """Return the chart of retention by method, with lines at the claim of the paper (dashed) and a guess (dotted)."""
    import altair as alt

    claim = alt.Chart().mark_rule(color=GRAY, strokeDash=[4, 3]).encode(x=alt.datum(CLAIMED_KEPT))
    guess = alt.Chart().mark_rule(color=GRAY, strokeDash=[1, 3]).encode(alt.X("guess:Q", aggregate="max"))
    methods = alt.Y("method:N", sort=None, title=None).axis(labelLimit=alt.ExprRef("room"))
    intervals = alt.Chart().encode(methods).mark_rule(color=BLUE, clip=True).encode(alt.X("low:Q"), alt.X2("high:Q"))
    retention = alt.X(
        "kept:Q",
        scale=alt.Scale(domain=[0, largest], clamp=True),
        title="retention",
        axis=alt.Axis(format="%", grid=False, tickCount=5),
    )
    points = alt.Chart().encode(methods).mark_point(filled=True, color=BLUE, size=45, opacity=1)
    points = points.encode(retention, tooltip=["method:N", alt.Tooltip("kept:Q", format=".1%")])
    return alt.layer(claim, guess, intervals, points).properties(height=17 * number)
